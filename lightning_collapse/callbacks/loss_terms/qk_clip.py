"""QK-Clip: attention logits are kept below a bound by scaling the weights that make queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_collapse.monitoring.logit_maxima import LogitMaxima
from lightning_collapse.monitoring.to_host import to_host
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.arguments import check_layers, require_positive
from lightning_collapse.utilities.attention_projections import AttentionProjections, Part, find_projections
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import all_reduce_max, world_size
from lightning_collapse.utilities.modules import find_modules, is_compiled
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.trainer import is_due, logging_step

FAMILY = "qk_clip"
_SOURCE = "Kimi Team, arXiv 2507.20534"


class QKClip(Callback):
    r"""Scales the query and key weights of every head whose largest logit is above a bound, after each optimizer step.

    With :math:`S` the largest logit of a head in the step's own forward passes, over all pairs a mask lets be seen,

    .. math:: \gamma = \min(1, \tau / S), \quad W_q \leftarrow \gamma^{\alpha} W_q, \quad
        W_k \leftarrow \gamma^{1 - \alpha} W_k

    and the same for biases, so that its logits are multiplied by :math:`\gamma`. Heads below the bound keep every bit.
    Query heads that share a key share the largest :math:`S` of their group. Moments of the optimizer stay as they are,
    and so does the pass that was made. :math:`S` is that of all processes and micro-batches; what a mask adds to logits
    (a position bias) is not in it, and is not scaled. Nothing waits for the device, but for one look after the first
    step: whether the queries and keys of a call are what the projections returned, up to a rotation or a scale.

    It costs the product of queries and keys a second time at every step, and in ``nn.MultiheadAttention`` their
    projections. Read are ``F.scaled_dot_product_attention`` and ``nn.MultiheadAttention``; weights are found by name
    (``in_proj_weight``, ``qkv``, ``c_attn``, ``q_proj`` and ``k_proj``, ``query`` and ``key`` ...). It works with
    automatic and manual optimization, accumulation, several optimizers, mixed precision (the weights in single
    precision are scaled) and data-parallel training.

    **Logged curves**, every ``log_every_n_steps``, of the steps since the last point: ``qk_clip/{layer}/max_logit``,
    ``over_tau``, the same over the bound, and ``clipped_share``, the share of heads and steps that were scaled.

    Args:
        tau: The bound; the authors train with 100.
        alpha: How much of the factor the queries take; the rest is the keys'.
        log_only: Measure and log, and scale nothing.
        layers: Names of modules, or glob patterns of them, whose attention counts, each with all inside it; by default
            every module whose projections are known.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When the fit starts, if a pattern matches nothing, no projections are found, the
            logits of a layer are not the product of its projections (query-key norms, multi-head latent attention, an
            unknown order of heads), its weights are sharded, quantized, shared between layers or trained by two
            optimizers, an optimizer keeps weights of its own, the model is compiled, or the strategy is ``"fsdp"`` or
            DeepSpeed. The message names the layer and the reason.

    References:
        Kimi Team, *Kimi K2: Open Agentic Intelligence*, 2025, algorithm 1. https://arxiv.org/abs/2507.20534

    Example::

        trainer = Trainer(callbacks=[QKClip(tau=100.0), AttentionLogitMonitor()])
    """

    family = FAMILY

    def __init__(
        self,
        tau: float = 100.0,
        alpha: float = 0.5,
        log_only: bool = False,
        layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        require_positive(tau=tau)
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must be between 0 and 1, got {alpha}.")
        check_layers(layers, "all attention")
        self.tau = tau
        self.alpha = alpha
        self.log_only = log_only
        self.layers = layers
        self.contained = Containment("QKClip")
        self._maxima: LogitMaxima | None = None
        self._restored: dict[str, Any] = {}
        self._seen: dict[str, Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        self._removers: list[Callable[[], None]] = []
        self._owned: dict[int, list[AttentionProjections]] = {}
        self._active: dict[int, dict[str, tuple[int, Part, Part]]] = {}
        self._frozen: list[AttentionProjections] = []
        self._groups = 0
        self._said: set[str] = set()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        self.contained = Containment("QKClip")
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy):
            raise MisconfigurationException(
                f"`QKClip` scales the weights that an optimizer steps, and {type(trainer.strategy).__name__} keeps them"
                " in pieces of its own. Train with `strategy='ddp'`, or clip inside the optimizer."
            )
        if is_compiled(pl_module):
            raise MisconfigurationException(
                "`QKClip` reads the logits of every step, and compiled code hides its attention. Compile the parts"
                " around it (`block.mlp.compile()`)."
            )
        chosen = self._choose(pl_module)
        self._check_optimizers(trainer.optimizers, chosen)
        self._maxima = LogitMaxima(pl_module, chosen, self._say)
        for optimizer in trainer.optimizers:
            hook = optimizer.register_step_post_hook(lambda stepped, *_: self._after_step(stepped, pl_module.device))
            self._removers.append(hook.remove)
        self._seen = {name: seen.to(pl_module.device) for name, seen in self._restored.items()}
        self._restored = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._maxima is not None:
            with self.contained("listening to attention", "nothing is clipped from now on"):
                self._adopt(trainer.optimizers, self._maxima)
                self._maxima.before_batch(batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._seen and is_due(trainer, trainer.log_every_n_steps):
            with self.contained("publishing its curves", "they may have gaps"):
                step, numbers = logging_step(trainer), to_host(self._seen)
                publish(trainer, pl_module, [p for name, n in numbers.items() for p in self._points(name, step, n)])
            self._seen = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seen": {name: seen.to("cpu", copy=True) for name, seen in self._seen.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict["seen"])

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        with self.contained("what it does at the end"):
            if self._maxima is not None:
                self._maxima.remove()
            for remove in self._removers:
                remove()
        self._maxima = None
        self._forget()

    def _choose(self, pl_module: LightningModule) -> list[AttentionProjections]:
        """Projections of the layers that count.

        Raises:
            MisconfigurationException: If there are none, or the logits of one cannot be scaled by them.
        """
        found = find_projections(pl_module)
        if self.layers is not None:
            try:
                named = find_modules(pl_module, list(self.layers))
            except ValueError as error:
                raise MisconfigurationException(f"`QKClip(layers={list(self.layers)!r})`: {error}") from error
            inside = {id(module) for root in named.values() for module in root.modules()}
            found = [projections for projections in found if id(projections.module) in inside]
        if not found:
            raise MisconfigurationException(
                f"`QKClip` finds no projections of queries and keys in {type(pl_module).__name__}: no"
                " `nn.MultiheadAttention`, and no module with children such as `qkv`, or `q_proj` and `k_proj`."
            )
        for projections in found:
            if projections.reason:
                raise MisconfigurationException(
                    f"`QKClip` cannot scale the logits of `{projections.name}` exactly: {projections.reason}. Name the"
                    " other layers with `layers=[...]`."
                )
        return found

    def _check_optimizers(self, optimizers: Sequence[Optimizer], chosen: Sequence[AttentionProjections]) -> None:
        """Note which optimizer trains which layer, and refuse what could not be scaled as one."""
        owners = _owners(optimizers)
        taken: dict[int, str] = {}
        for projections in chosen:
            name = f"`QKClip`, `{projections.name}`"
            query, key = (owners.get(id(weight)) for weight in projections.weights)
            if query is not key:
                raise MisconfigurationException(f"{name}: one optimizer must train its queries and keys.")
            for weight in set(projections.weights):
                if taken.setdefault(id(weight), projections.name) != projections.name:
                    raise MisconfigurationException(f"{name}: it shares a weight with `{taken[id(weight)]}`.")
            if callable(getattr(query, "eval", None)) and callable(getattr(query, "train", None)):
                raise MisconfigurationException(
                    f"{name}: {type(query).__name__} keeps weights of its own, which would come back."
                )
            if query is not None:
                self._owned.setdefault(id(query), []).append(projections)
            else:  # its logits grow by no step
                self._frozen.append(projections)
        self._groups = _number_of_groups(optimizers)

    def _adopt(self, optimizers: Sequence[Optimizer], maxima: LogitMaxima) -> None:
        """Clip layers that were frozen, once an optimizer has been given their weights."""
        if not self._frozen or self._groups == (groups := _number_of_groups(optimizers)):
            return
        self._groups, frozen, self._frozen = groups, self._frozen, []
        owners = _owners(optimizers)
        for projections in frozen:
            query, key = (owners.get(id(weight)) for weight in projections.weights)
            if query is None or query is not key:
                self._frozen.append(projections)
                continue
            maxima.forget(projections.name)
            self._owned.setdefault(id(query), []).append(projections)
            self._active.pop(id(query), None)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, device: torch.device) -> None:
        """Scale what this optimizer has stepped. Collective."""
        if self._maxima is None or id(optimizer) not in self._owned:
            return
        with self.contained("clipping", "weights are left as they are from now on", self._stop):
            if id(optimizer) not in self._active:
                self._active[id(optimizer)] = self._agree(optimizer, device)
            layers = self._active[id(optimizer)]
            if not layers:
                return
            read = [self._maxima.pop(name, heads, device) for name, (heads, _, _) in layers.items()]
            largest = all_reduce_max(torch.cat(read)) if world_size() > 1 else torch.cat(read)
            parts = torch.split(largest, [len(of_layer) for of_layer in read])
            for (name, (_, query, key)), of_layer in zip(layers.items(), parts, strict=True):
                self._clip(name, query, key, of_layer)

    def _agree(self, optimizer: Optimizer, device: torch.device) -> dict[str, tuple[int, Part, Part]]:
        """Heads and weights of the layers whose logits can be scaled, after the first step. Collective."""
        owned = {projections.name: projections for projections in self._owned[id(optimizer)]}
        shapes = {} if self._maxima is None else self._maxima.agree(list(owned), device)
        return {name: (heads, *owned[name].parts(heads, width)) for name, (heads, width) in shapes.items()}

    def _clip(self, name: str, query: Part, key: Part, largest: Tensor) -> None:
        """Scale one layer by the largest logits of its heads, ``(H,)``."""
        group = query.size // key.size
        of_group = largest.view(-1, group).amax(dim=1)
        above = (of_group > self.tau) & of_group.isfinite()
        factor = torch.where(above, self.tau / of_group, 1.0)
        if not self.log_only:
            query.scale_((factor**self.alpha).repeat_interleave(group))
            key.scale_(factor ** (1 - self.alpha))
        share = above.to(largest.dtype).mean() * (0.0 if self.log_only else 1.0)
        new = torch.stack([largest.amax(), share, torch.ones_like(share)])
        old = self._seen.get(name)
        self._seen[name] = new if old is None else torch.stack([old[0].maximum(new[0]), *(old[1:] + new[1:])])

    def _points(self, name: str, step: int, numbers: Any) -> list[Point]:
        largest, shares, steps = numbers
        if not isfinite(largest):  # it did not run, or is lost
            return []
        values = {"max_logit": largest, "over_tau": largest / self.tau, "clipped_share": shares / steps}
        return [Point(FAMILY, name, measure, step, value) for measure, value in values.items()]

    def _say(self, name: str, why: str) -> None:
        if name not in self._said:
            self._said.add(name)
            rank_zero_warn(f"`QKClip` leaves `{name}` alone: {why}.")


def _owners(optimizers: Sequence[Optimizer]) -> dict[int, Optimizer]:
    """The optimizer of every parameter, by its identity."""
    return {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _number_of_groups(optimizers: Sequence[Optimizer]) -> int:
    return sum(len(optimizer.param_groups) for optimizer in optimizers)


for _name, _facts in {
    "max_logit": {"reads": "the largest attention logit since the last point", "range": "any number"},
    "over_tau": {
        "reads": "the largest attention logit over the bound `tau`",
        "range": "any number",
        "collapsed": "above 1",
    },
    "clipped_share": {"reads": "heads and steps that were scaled", "range": "0 to 1", "collapsed": "does not fall"},
}.items():
    register_curve(FAMILY, _name, source=_SOURCE, **_facts)
