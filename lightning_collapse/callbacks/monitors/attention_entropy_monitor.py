"""Attention entropy monitor: entropy collapse and entropic overload of heads of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.attention_entropy import entropy_sums
from lightning_collapse.functional.attention_rows import rows_of_call, rows_of_masked_logits
from lightning_collapse.monitoring.attention_hooks import AttentionHooks, Captured, Reader, ReaderHooks, names_attention
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.distributed import all_reduce_max, all_reduce_sum, max_over_processes, world_size
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.modules import Tap, find_taps, is_compiled, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve

MAX_ROWS = 512
_ZHAI = "Zhai et al., arXiv 2303.06296"
_VALUES = (
    "entropy_mean",
    "entropy_min",
    "entropy_max",
    "collapsed_share",
    "overloaded_share",
    "max_logit",
    "entropy_bound",
)
_NEWS = "a layer that begins to run"
_COLUMNS = 7  # five sums and two maxima of a head, see `entropy_sums`
_POINT_AT = (
    'Point the monitor at them: `layers={"blocks.*.attn": read}` with `def read(module, args, kwargs)` that returns'
    " `(query, key)`, each of shape (B, H, L, E)."
)


class AttentionEntropyMonitor(Monitor):
    """Log how sharply every head of attention looks: entropy collapse and entropic overload.

    The entropy of a query's attention weights, over its largest possible value (the logarithm of the number of keys
    the query sees, which causal and padding masks change), is 0 where one key has all the weight and 1 where all have
    the same. **Logged metrics**, ``attention/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    The bound is the mean over heads of :func:`~lightning_collapse.functional.entropy_bound`. Under
    ``attention/all/...`` stand ``entropy_mean`` over layers, ``collapsed_share`` and ``overloaded_share`` of all heads,
    and the largest ``max_logit``.

    A point rests on the training batch that ends in it. Captured are ``F.scaled_dot_product_attention``,
    ``nn.MultiheadAttention`` and attention written out with a softmax over the last of four dimensions, whatever model
    they are in (Hugging Face, timm, yours); see :class:`~lightning_collapse.monitoring.attention_hooks.AttentionHooks`
    for what is not. Queries that ``batch["attention_mask"]`` or a key padding mask calls padding do not count.

    In a compiled model, and for other kernels (flex attention, flash-attn), say how queries and keys are made::

        def read(attn, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            q, k = attn.q_proj(x), attn.k_proj(x)  # or: q, k, _ = attn.qkv(x).chunk(3, dim=-1)
            q, k = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k))
            return q, k, True  # causal; an `AttentionCall` takes masks and a scale too

        Trainer(callbacks=[AttentionEntropyMonitor(layers={"blocks.*.attn": read})])

    Args:
        layers: Names of submodules, or glob patterns of them, whose attention counts, each with all that runs inside
            it; ``None`` for every one that is captured. Or a mapping from patterns to functions that read: called
            before the module, without gradient, with the module and its arguments. A function must not draw random
            numbers.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Queries to read of each sequence; of a large batch some sequences, 512 queries in all.
        collapsed_below: Heads with less normalized entropy count as collapsed. No paper that we could read states a
            number; ours is 0.05.
        overloaded_above: Heads with more count as overloaded; ours is 0.95.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing.

    References:
        Zhai et al., *Stabilizing Transformer Training by Preventing Attention Entropy Collapse*, ICML 2023.
        https://arxiv.org/abs/2303.06296; Jha & Reagen, *Entropy-Guided Attention for Private LLMs*, 2025.
        https://arxiv.org/abs/2501.03489

    Example::

        trainer = Trainer(callbacks=[AttentionEntropyMonitor()])
    """

    family = "attention"
    declares = (
        Curve(
            "entropy_mean",
            "attention weights, over their maximum, mean over heads",
            "0 to 1",
            "0; 1 is overload",
            _ZHAI,
        ),
        Curve("entropy_min", "the head that looks most sharply, mean over its queries", "0 to 1", "0", _ZHAI),
        Curve("entropy_max", "the head that looks least sharply", "0 to 1", "near 1: overload", _ZHAI),
        Curve("collapsed_share", "heads below a threshold of entropy", "0 to 1", "1", _ZHAI),
        Curve(
            "overloaded_share",
            "heads above a threshold of entropy",
            "0 to 1",
            "1: overload",
            "Jha & Reagen, arXiv 2501.03489",
        ),
        Curve("max_logit", "the largest attention logit of any head", "any number", "grows without end", _ZHAI),
        Curve(
            "entropy_bound",
            "least entropy that logits of this spread allow: while it is high no head can collapse",
            "0 to 1, at most entropy",
            "0",
            _ZHAI,
        ),
        Curve("n", "queries per head behind the point, over all processes", "0 to infinity", "few: a rough reading"),
        Curve("flag", "attention", "0 to 7", "above 0: why to doubt the point"),
    )
    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | Mapping[str, Reader] | None = None,
        every_n_steps: int | None = None,
        rows: int = 16,
        collapsed_below: float = 0.05,
        overloaded_above: float = 0.95,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "all attention")
        if isinstance(layers, Mapping) and not all(map(callable, layers.values())):
            raise ValueError(f"`layers` as a mapping takes functions `read(module, args, kwargs)`, got {layers!r}.")
        if rows < 1:
            raise ValueError(f"`rows` must be at least 1, got {rows}.")
        if not 0 <= collapsed_below <= overloaded_above <= 1:
            raise ValueError(
                "`collapsed_below` and `overloaded_above` are shares of the largest entropy, in this order, between 0"
                f" and 1, got {collapsed_below} and {overloaded_above}."
            )
        self.layers = layers
        self.rows = rows
        self.collapsed_below = collapsed_below
        self.overloaded_above = overloaded_above
        self._taps: AttentionHooks | None = None
        self._readers: ReaderHooks | None = None
        self._scope: StepScope | None = None
        self._names: list[str] = []
        self._armed = False
        self._reset()

    def _reset(self) -> None:
        self._heads: dict[str, int] = {}
        self._news = True
        self._captured: dict[str, tuple[Tensor, Tensor]] = {}

    @override
    def state(self) -> dict[str, Any]:
        return {"heads": dict(self._heads)}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._heads = {name: heads for name, heads in state["heads"].items() if name in self._names}

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()
        try:
            taps = self._listen(pl_module)
        except ValueError as error:
            raise MisconfigurationException(
                f"`AttentionEntropyMonitor(layers={list(self.layers or ())!r})`: {error}"
            ) from error
        self._names = [tap.name for tap in taps]
        self._scope = StepScope(pl_module)

    @property
    @override
    def listeners(self) -> list[HookOwner]:
        return [] if self._readers is None else [self._readers]

    @override
    def stop(self) -> None:
        if self._readers is not None:
            self._readers.remove()
        if self._scope is not None:
            self._scope.remove()
        self._taps = self._readers = self._scope = None
        self._armed = False
        self._captured = {}

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        self._armed = batches_left == 0
        if self._armed:
            self._captured.clear()
            mask = padding_mask(batch)
            for taps in (self._taps, self._readers):
                if taps is not None and self._scope is not None:
                    taps.mask = mask if mask is None else mask.bool()
                    self._scope.request(taps)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        for taps in (self._taps, self._readers):
            if taps is not None:
                taps.mask = None

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Sums and maxima of the heads of every layer, seven numbers each, over all processes."""
        if not self._armed:  # an epoch ended inside an accumulation window: nobody could know, nobody listened
            return {}
        self._armed = False
        self._agree(pl_module.device)
        watched = [name for name in self._names if name in self._heads]
        if not watched:
            if not self._warned:  # else the reason has been told
                named = names_attention(pl_module)
                why = "its queries and keys are hidden" if named else "no module is called so, there may be none"
                self.warn_once(f"no attention was captured; {why}. {_POINT_AT}")
            return {}
        return self._share(watched, pl_module.device)

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points, heads = [], []
        self._news = bool(numbers.get(("", _NEWS), 0))
        for (name, kind), vector in numbers.items():
            if kind == _NEWS:
                continue
            of_layer = torch.tensor(vector, dtype=torch.float64).view(-1, _COLUMNS)  # on the host
            points += self._points_of(name, step, of_layer)
            heads.append(of_layer[of_layer[:, 0] > 0])
            if points[-1].flag == Flag.NOT_CALLED:
                self.warn_once(
                    f"the attention of `{name}` was not captured before every point; its curves read NaN there."
                )
        return points + self._summary(step, heads) if points else []

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        for name in self._names if self._heads else ():
            # a pattern may well match more than attention; a name is meant
            meant = isinstance(self.layers, Mapping) or (self.layers is not None and name in self.layers)
            if meant and name not in self._heads:
                self.warn_once(f"the attention of `{name}` was never captured. {_POINT_AT}")

    def _listen(self, pl_module: LightningModule) -> list[Tap]:
        if isinstance(self.layers, Mapping):
            let_hooks_be_seen(pl_module)
            self._readers = ReaderHooks(pl_module, self.layers, self._capture, self._failed, self.rows, MAX_ROWS)
            return self._readers.taps
        outermost = None
        if self.layers is None:
            taps = find_taps(pl_module, ["*"]) if list(pl_module.children()) else []
            # the attention of a softmax or a dropout is that of the module around it
            taps = [tap for tap in taps if any(True for _ in tap.module.parameters())]
            outermost = type(pl_module).__name__
            taps.append(Tap(outermost, pl_module))
        else:
            taps = find_taps(pl_module, list(self.layers))
        if is_compiled(pl_module):
            self.warn_once(f"compiled code hides its attention. {_POINT_AT}")
            return taps
        self._taps = AttentionHooks(taps, self._capture, self._failed, self.rows, MAX_ROWS, outermost)
        return taps

    def _capture(self, name: str, captured: Captured) -> None:
        readings = rows_of_masked_logits(captured) if isinstance(captured, Tensor) else rows_of_call(captured)
        sums, extremes = entropy_sums(readings)
        if name in self._captured:
            before, highest = self._captured[name]
            if len(before) != len(sums):
                return
            sums, extremes = before + sums, torch.maximum(highest, extremes)
        self._captured[name] = sums.to(accumulation_dtype(sums.device)), extremes

    def _failed(self, name: str, error: Exception) -> None:
        self.warn_once(f"the attention of `{name}` could not be read: {type(error).__name__}: {error}")

    def _agree(self, device: torch.device) -> None:
        """Let every process know every layer that any has captured, and its heads. Collective."""
        found = {name: len(sums) for name, (sums, _) in self._captured.items()}
        if world_size() > 1 and self._news:  # at a point, and as a rule once: it waits for the device
            heads = map(int, max_over_processes([found.get(name, 0) for name in self._names], device))
            found = dict(zip(self._names, heads, strict=True))
        if world_size() == 1 or self._news:
            self._heads = {name: heads for name, heads in found.items() if heads} | self._heads

    def _share(self, watched: Sequence[str], device: torch.device) -> dict[Name, Tensor]:
        """Sums and maxima of all heads of all layers, over all processes. Collective."""
        dtype = accumulation_dtype(device)
        sums, extremes = [], []
        for name in watched:
            heads = self._heads[name]
            of_layer = self._captured.get(name)
            if of_layer is None or len(of_layer[0]) != heads:
                of_layer = torch.zeros(heads, _COLUMNS - 2), torch.full((heads, 2), -torch.inf)
            sums.append(of_layer[0].to(device, dtype))
            extremes.append(of_layer[1].to(device, dtype))
        total, highest, news = torch.cat(sums), torch.cat(extremes), {}
        if world_size() > 1:
            # a layer that only now begins to run: told with the sums, agreed on at the next point
            late = torch.full_like(total[:1], float(any(name not in self._heads for name in self._captured)))
            total, highest = all_reduce_sum(torch.cat([total, late])), all_reduce_max(highest)
            news, total = {("", _NEWS): total[-1, 0]}, total[:-1]
        self._captured.clear()
        table = torch.cat([total, highest], dim=1)
        parts = torch.split(table, [self._heads[name] for name in watched])
        return {(name, "heads"): part.flatten() for name, part in zip(watched, parts, strict=True)} | news

    def _points_of(self, name: str, step: int, numbers: Tensor) -> list[Point]:
        """Curves of one layer, from the numbers ``(H, 7)`` of its heads."""
        read = numbers[numbers[:, 0] > 0]
        n, lost = int(read[:, 0].mean()) if len(read) else 0, float(numbers[:, 4].sum())
        flag = Flag.OK if n else Flag.FEW_ROWS
        if lost:
            flag = Flag.NONFINITE
        elif not len(read):
            flag = Flag.NOT_CALLED
        values = self._values(read) if len(read) else dict.fromkeys(_VALUES, nan)
        values |= {"n": float(n), "flag": float(flag)}
        return [Point(self.family, name, key, step, value, n, flag=flag) for key, value in values.items()]

    def _values(self, heads: Tensor) -> dict[str, float]:
        """Curves of some heads, from their numbers, which are on the host already."""
        entropy = heads[:, 1] / heads[:, 0]
        return {
            "entropy_mean": entropy.mean().item(),
            "entropy_min": entropy.amin().item(),
            "entropy_max": entropy.amax().item(),
            "collapsed_share": (entropy < self.collapsed_below).double().mean().item(),
            "overloaded_share": (entropy > self.overloaded_above).double().mean().item(),
            "max_logit": heads[:, 6].amax().item(),
            "entropy_bound": (heads[:, 3] / heads[:, 0]).mean().item(),
        }

    def _summary(self, step: int, layers: Sequence[Tensor]) -> list[Point]:
        heads = torch.cat(list(layers))
        values = self._values(heads) if len(heads) else dict.fromkeys(_VALUES, nan)
        if len(heads):
            values["entropy_mean"] = float(torch.stack([(h[:, 1] / h[:, 0]).mean() for h in layers if len(h)]).mean())
        names = ("entropy_mean", "collapsed_share", "overloaded_share", "max_logit")
        return [Point(self.family, "all", name, step, values[name]) for name in names]
