"""Router monitor: how evenly a mixture of experts uses its experts, and whether its router can tell them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, nan
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.loss_reader import LossReader, reader_of
from lightning_collapse.callbacks.monitors.hooked_monitor import HookedMonitor
from lightning_collapse.callbacks.monitors.monitor import Detail, Name
from lightning_collapse.functional.routing import (
    SUMS,
    dead_experts_null,
    effective_experts_null,
    load_cv2_null,
    max_load_null,
    router_conditioning,
    router_similarity,
    routing_readings,
)
from lightning_collapse.monitoring.conditioning import ROUTER
from lightning_collapse.monitoring.router_hooks import Reader, RouterHooks
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.arguments import check_layers, check_reader
from lightning_collapse.utilities.distributed import all_reduce_sum, max_over_processes, world_size
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.module_tree import own_weight
from lightning_collapse.utilities.modules import curve_name, find_modules, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.routers import Router, find_routers, router_at
from lightning_collapse.utilities.weight_matrices import whole

_SHAZEER = "Shazeer et al. 2017, arXiv 1701.06538"
_FEDUS, _ZOPH = "Fedus et al. 2021, arXiv 2101.03961", "Zoph et al. 2022, arXiv 2202.08906"
_WEIGHTS = "arXiv 2606.28116"
_OF_LOAD = ("load_cv2", "load_entropy", "effective_experts", "max_load", "dead", "balance_loss")
_OF_LOGITS = ("z", "token_entropy", "margin")
_OF_WEIGHT = ("weight_similarity", "conditioning")
_POINT_AT = (
    'Point the monitor at them: `RouterMonitor(layers=["blocks.*.router"])`, and where a module returns no logits of'
    " experts `read=`, a function `read(module, args, output)` that returns `(logits, chosen)`."
)


class RouterMonitor(HookedMonitor[RouterHooks]):
    """Log how a mixture of experts spreads tokens over its experts, and how its router scores them.

    **Logged metrics**, ``router/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    A fair router does not read 0 where tokens are few: what it reads beside ``load_cv2``, ``effective_experts``,
    ``max_load`` and ``dead`` is the null of these points, for independent tokens; those of a sequence are not. Load
    counts tokens, ``balance_loss`` and ``token_entropy`` the gates before the choice. Compare points of as many tokens.

    A point rests on the last ``batches`` training batches before it. Routers are found by name, a ``gate`` or
    ``router`` beside ``experts``, as in Mixtral, Qwen-MoE, DeepSeek, OLMoE, Switch or written by hand; where there are
    none, layers whose softmax weighs what others return, as the graph of the first loss tells. See
    :class:`~lightning_collapse.monitoring.router_hooks.RouterHooks` for how the choice of experts is seen. Tokens that
    ``batch["attention_mask"]`` calls padding do not count.

    Others are told what to read::

        def read(moe, args, output):
            logits = moe.score(args[0])
            return logits, logits.topk(2, dim=-1).indices

        Trainer(callbacks=[RouterMonitor(layers=["blocks.*.moe"], read=read)])

    Args:
        layers: Names of routers, or glob patterns of them; ``None`` to find them.
        read: Called with a module of ``layers``, the arguments of its call and what it returned, without gradient;
            returns the logits ``(..., E)``, or these and the indices ``(..., k)`` of the experts chosen. It must not
            draw random numbers.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        batches: How many batches a point rests on, at most.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing.

    References:
        Shazeer et al., *Outrageously Large Neural Networks*, 2017, https://arxiv.org/abs/1701.06538; Fedus et al.,
        *Switch Transformers*, 2021, https://arxiv.org/abs/2101.03961; Zoph et al., *ST-MoE*, 2022,
        https://arxiv.org/abs/2202.08906.

    Example::

        trainer = Trainer(callbacks=[RouterMonitor()])
    """

    family = "router"
    declares = (
        Curve("load_cv2", "squared coefficient of variation of the load", "0 to E - 1", "far above its null", _SHAZEER),
        Curve("load_cv2_excess", "`load_cv2` less its null", "about 0 to E - 1", "growing", _SHAZEER),
        Curve("load_entropy", "entropy of the load, over log E", "0 to 1", "near 0", _SHAZEER),
        Curve("effective_experts", "exponential of the entropy of the load", "1 to E", "near 1 or k", _SHAZEER),
        Curve("max_load", "largest over mean load", "1 to E", "near E / k", _SHAZEER),
        Curve("dead", "experts without a token", "0 to E", "above 0", _SHAZEER),
        Curve(
            "balance_loss",
            "load of an expert times its mean gate, 1 if all are equal",
            "about 1 to E / k",
            "E / k",
            "Fedus et al. 2021, arXiv 2101.03961",
        ),
        Curve(
            "z", "squared log-partition of the logits", "0 to infinity", "growing", "Zoph et al. 2022, arXiv 2202.08906"
        ),
        Curve(
            "token_entropy", "entropy of the gates of a token, over log E", "0 to 1", "0: sure; 1: no choice", _SHAZEER
        ),
        Curve(
            "margin",
            "gate of the last expert that is chosen less that of the next",
            "0 to 1",
            "near 0: chosen by noise",
        ),
        Curve(
            "weight_similarity",
            "mean cosine between the rows of the router's weight",
            "-1 to 1",
            "near 1",
            "arXiv 2606.28116",
        ),
        Curve(
            "conditioning",
            "largest distance of a row of that weight from the mean of all, over its length",
            "0 to infinity",
            "near 0",
            "arXiv 2606.28116",
        ),
        Curve("experts_per_token", "experts that a token goes to", "1 to E", "does not tell"),
        Curve("n", "tokens behind the point, over all processes", "0 to infinity", "few: a rough reading"),
        Curve("flag", "router", "0 to 7", "above 0: why to doubt the point"),
    )
    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        read: Reader | None = None,
        every_n_steps: int | None = None,
        batches: int = 4,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "all routers")
        check_reader(read, layers)
        if batches < 1:
            raise ValueError(f"`batches` must be at least 1, got {batches}.")
        self.layers, self.reader, self.batches = layers, read, batches
        self._reader: LossReader | None = None
        self._routers: list[Router] = []
        self._root: LightningModule | None = None
        self._sums: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}

    @override
    def state(self) -> dict[str, Any]:
        sums = self._sums if world_size() == 1 else {}  # a checkpoint holds what one process has seen
        return {"sums": sums, "widths": dict(self._widths), "found": [router.name for router in self._routers]}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        if self._reader is not None and state["found"]:
            self._reader.remove()
            self._reader = None
            self._find(state["found"])
        names = {router.name for router in self._routers}
        self._sums = {name: sums for name, sums in state["sums"].items() if name in names}
        self._widths = {name: width for name, width in state["widths"].items() if name in names}

    @override
    def between(self, trainer: Trainer) -> int:
        return min(self.batches, super().between(trainer))

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        let_hooks_be_seen(pl_module)
        self._root, self._sums, self._widths = pl_module, {}, {}
        if self.layers is None:
            routers = find_routers(pl_module)
        else:
            routers = [router_at(tap.name, tap.module) for tap in self.choose_taps(self.layers, [], pl_module)]
        self._listen(routers)
        self._scope = StepScope(pl_module)
        self._reader = None if routers else reader_of(pl_module, self.contained)

    @override
    def stop(self) -> None:
        super().stop()
        if self._reader is not None:
            self._reader.remove()
        self._reader = self._root = None
        self._routers = []

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._reader is not None:
            self._reader.before_batch(batch)
        if self._hooks is not None and self._scope is not None and batches_left < self.between(trainer):
            self._hooks.mask = padding_mask(batch)
            self._scope.request(self._hooks)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._reader is not None:
            self._reader.before_backward(loss)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        for name, sums in ({} if self._hooks is None else self._hooks.pop()).items():
            before = self._sums.get(name)
            self._sums[name] = sums if before is None or before.shape != sums.shape else before + sums
        if self._reader is not None:
            self._reader.after_batch()
            if not self._reader.waits:
                use, self._reader = self._reader.use, None
                found = {} if use is None else use.conditioning
                self._find([curve_name(name) for name, reason in found.items() if reason == ROUTER])

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Sums of every router over all processes, and what its weight says. Collective."""
        device, own = pl_module.device, {name: len(sums) for name, sums in self._sums.items()}
        if world_size() > 1 and any(router.name not in self._widths for router in self._routers):
            widths = max_over_processes([own.get(router.name, 0) for router in self._routers], device)
            own = {router.name: int(width) for router, width in zip(self._routers, widths, strict=True)}
        self._widths = {name: width for name, width in own.items() if width} | self._widths
        watched = [router for router in self._routers if router.name in self._widths]
        if not watched:
            self._warn_of_none()
            return {}
        dtype, pieces = accumulation_dtype(device), []
        for router in watched:
            sums, width = self._sums.get(router.name), self._widths[router.name]
            fits = sums is not None and len(sums) == width
            pieces.append(sums.to(device, dtype) if fits and sums is not None else torch.zeros(width, dtype=dtype))
        self._sums = {}
        total = all_reduce_sum(torch.cat([piece.to(device) for piece in pieces]))
        readings: dict[Name, Tensor] = {}
        for router, sums in zip(watched, torch.split(total, [len(piece) for piece in pieces]), strict=True):
            readings[router.name, "sums"] = sums
            weight = own_weight(router.scorer or router.module)
            if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) > 1:
                matrix = whole(weight)
                readings[router.name, "weight_similarity"] = router_similarity(matrix)
                readings[router.name, "conditioning"] = router_conditioning(matrix)
        return readings

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points = []
        for layer in [layer for layer, kind in numbers if kind == "sums"]:
            sums = torch.tensor(numbers[layer, "sums"], dtype=torch.float64)  # on the host
            found = {name: value.item() for name, value in routing_readings(sums).items()}
            weights = {key: numbers[layer, key] for key in _OF_WEIGHT if (layer, key) in numbers}
            points += self._points_of(layer, step, found, (len(sums) - len(SUMS)) // 2, weights)
        return points

    def _points_of(
        self, layer: str, step: int, found: Mapping[str, float], experts: int, weights: Mapping[str, float]
    ) -> list[Point]:
        n, k, flag = int(found["n"]), found["k"], Flag.OK
        if found["nonfinite"]:
            flag = Flag.NONFINITE
        elif not n:
            flag = Flag.NOT_CALLED
            self.warn_of_layer(layer, "the router {} did not run before every point; the curves read NaN there.")
        of = (float(n), experts, k)
        nulls = {"load_cv2": load_cv2_null(*of), "dead": dead_experts_null(*of), "balance_loss": 1.0} if n else {}
        nulls |= {"effective_experts": effective_experts_null(*of), "max_load": max_load_null(*of)} if n else {}
        nulls |= {"load_entropy": log(nulls["effective_experts"]) / log(experts)} if n else {}
        values = {name: found[name] for name in (*_OF_LOAD, *_OF_LOGITS)}
        values["load_cv2_excess"] = values["load_cv2"] - nulls.get("load_cv2", nan)
        values |= {**weights, "experts_per_token": k, "n": float(n), "flag": float(flag)}
        return [
            Point(self.family, layer, name, step, value, n, nulls.get(name, nan), flag)
            for name, value in values.items()
            if value == value or not n  # there is no margin where every expert is chosen
        ]

    def _find(self, names: Sequence[str]) -> None:
        """Watch Linear layers by the names of their curves."""
        modules = find_modules(self._root, ["*"]) if self._root is not None and names else {}
        self._listen([router_at(curve_name(key), m) for key, m in modules.items() if curve_name(key) in names])

    def _listen(self, routers: Sequence[Router]) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        self._routers = [router for router in routers if self.reader is not None or router.scorer is not None]
        others = ", ".join(f"`{router.name}`" for router in routers if router not in self._routers)
        if others:
            self.warn_once(f"no weight with a row per expert was found in {others}. {_POINT_AT}")
        assert self._root is not None
        self._hooks = RouterHooks(self._root, self._routers, self.contained, self.reader) if self._routers else None

    def _warn_of_none(self) -> None:
        if self._reader is None and (self._hooks is None or self._points):
            self.warn_once(f"no router of a mixture of experts was found, or it did not run. {_POINT_AT}")
