"""Attention entropy monitor: entropy collapse and entropic overload of heads of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.attention_monitor import AttentionMonitor
from lightning_collapse.callbacks.monitors.monitor import Detail, Name
from lightning_collapse.functional.attention_entropy import entropy_sums
from lightning_collapse.functional.attention_rows import rows_of_call, rows_of_masked_logits
from lightning_collapse.monitoring.attention_hooks import Captured, Reader
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve

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


class Entropies:
    """The statistics of :func:`~lightning_collapse.functional.attention_entropy.entropy_sums`."""

    columns = 5, 2

    def __call__(self, captured: Captured) -> tuple[Tensor, Tensor]:
        """Sums ``(H, 5)`` and maxima ``(H, 2)``."""
        return entropy_sums(rows_of_masked_logits(captured) if isinstance(captured, Tensor) else rows_of_call(captured))


class AttentionEntropyMonitor(AttentionMonitor):
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

    def __init__(
        self,
        layers: Sequence[str] | Mapping[str, Reader] | None = None,
        every_n_steps: int | None = None,
        rows: int = 16,
        collapsed_below: float = 0.05,
        overloaded_above: float = 0.95,
        detail: Detail = "high",
    ) -> None:
        super().__init__(layers, every_n_steps, rows, detail)
        if rows < 1:
            raise ValueError(f"`rows` must be at least 1, got {rows}.")
        if not 0 <= collapsed_below <= overloaded_above <= 1:
            raise ValueError(
                "`collapsed_below` and `overloaded_above` are shares of the largest entropy, in this order, between 0"
                f" and 1, got {collapsed_below} and {overloaded_above}."
            )
        self.collapsed_below = collapsed_below
        self.overloaded_above = overloaded_above

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen(pl_module, Entropies())

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Sums and maxima of the heads of every layer, seven numbers each, over all processes."""
        return {} if self._attention is None else self._attention.read(pl_module.device)

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points, heads = [], []
        for name, of_layer in ({} if self._attention is None else self._attention.tables(numbers)).items():
            points += self._points_of(name, step, of_layer)
            heads.append(of_layer[of_layer[:, 0] > 0])
            self.say_if_not_called(points[-1])
        return points + self._summary(step, heads) if points else []

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
