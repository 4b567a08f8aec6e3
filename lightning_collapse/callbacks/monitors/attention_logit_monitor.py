"""Attention logit monitor: logits that grow, heads and queries that look alike, and query-key increments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.attention_monitor import AttentionMonitor
from lightning_collapse.callbacks.monitors.monitor import Detail, Name
from lightning_collapse.functional.attention_logits import logit_bound
from lightning_collapse.monitoring import qk_increment_window
from lightning_collapse.monitoring.attention_hooks import Reader
from lightning_collapse.monitoring.attention_statistics import LogitStatistics
from lightning_collapse.monitoring.attention_window import MAX_ROWS
from lightning_collapse.monitoring.qk_increment_window import QKIncrementWindow
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.attention_calls import AttentionCall
from lightning_collapse.utilities.distributed import all_reduce_max
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve

_BOUND = "bound"
_K2 = "Kimi Team, arXiv 2507.20534"
_INCREMENTS = "arXiv 2606.28116"


class AttentionLogitMonitor(AttentionMonitor):
    """Log how large attention logits are, whether heads and queries differ, and how ``W_q W_k^T`` moves.

    Logits that grow without end are how many large trainings diverge; :class:`~lightning_collapse.QKClip` bounds them.
    **Logged metrics**, ``attention/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    Nulls stand beside the points: of ``head_cosine`` and ``effective_keys`` what independent Gaussian logits of the
    same spread read, of ``query_nmi`` uniform attention under the same mask, of ``key_participation`` Gaussian keys.
    Under ``attention/all/...`` stand the largest ``max_logit`` and ``qk_bound``, and the smallest ``min_logit``.

    A point rests on the training batch that ends in it, on 16 queries of each sequence and 512 in all, each against all
    keys it sees: maxima and minima are exact for these, and means are means over them. ``qk_bound`` is of every
    training step since the last point, of all queries and keys of as many sequences as hold 512 queries, and of those
    calls alone that show both as they are (``F.scaled_dot_product_attention``); nothing leaves the device for it.
    Logits have what a mask adds in them, the bound has not. What is captured, and how to point at what is not, is as in
    :class:`~lightning_collapse.AttentionEntropyMonitor`.

    Increments ``W_q W_k^T - W_q' W_k'^T`` since the last point are split into what is of first order in the step
    (``delta2``) and of second (``delta3``); they need weights in single precision, in projections that are known by
    name with nothing between them and their product, and are the mean over ``heads`` heads.

    Args:
        layers: As in ``AttentionEntropyMonitor``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Queries to read of each sequence; of a large batch some sequences, 512 queries in all.
        bound: Whether to read the bound, for which it listens at every step: 3 % of the steps of a small transformer.
        heads: Heads of each layer whose increments are read, evenly chosen; 0 for none.
        detail: ``"low"`` keeps ``n`` and ``flag`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing.

    References:
        Kimi Team, *Kimi K2*, 2025. https://arxiv.org/abs/2507.20534; Park et al., *What Do Self-Supervised Vision
        Transformers Learn?*, ICLR 2023. https://arxiv.org/abs/2305.00729; Gu et al., *When Attention Sink Emerges in
        Language Models*, ICLR 2025. https://arxiv.org/abs/2410.10781

    Example::

        trainer = Trainer(callbacks=[AttentionLogitMonitor()])
    """

    family = "attention"
    declares = (
        Curve("max_logit", "the largest attention logit of any head", "any number", "grows without end", _K2),
        Curve("min_logit", "the smallest attention logit of any head", "any number", "falls without end", _K2),
        Curve(
            "qk_bound",
            "longest query times longest key, scaled, of every step: no logit is larger",
            "0 to infinity",
            "grows without end",
        ),
        Curve("head_cosine", "cosine of the attention rows of two heads, mean over pairs", "0 to 1", "1: heads alike"),
        Curve("head_divergence", "Jensen-Shannon divergence of heads, over its maximum", "0 to 1", "0: heads alike"),
        Curve(
            "query_nmi",
            "normalized mutual information of queries and keys",
            "0 to 1",
            "near its null: queries alike",
            "Park et al., arXiv 2305.00729",
        ),
        Curve(
            "query_nmi_excess",
            "`query_nmi` less that of uniform attention under the same mask",
            "-1 to 1",
            "0 or less: queries alike",
            "Park et al., arXiv 2305.00729",
        ),
        Curve(
            "sink_share",
            "heads that give the first key 0.3 of their weight, over sequences",
            "0 to 1",
            "does not tell: most heads of language models do",
            "Gu et al., arXiv 2410.10781",
        ),
        Curve(
            "effective_keys",
            "one over the sum of squared weights, over the number of keys seen",
            "0 to 1",
            "near 0: one key",
        ),
        Curve(
            "logit_lead",
            "how far the largest logit leads in the sharpest row, over what a weight of 0.9 takes",
            "0 to infinity",
            "below 1: no head selects",
        ),
        Curve("key_participation", "participation ratio of keys, over their width", "0 to 1", "near 0: keys alike"),
        *(
            Curve(
                f"delta{order}_{name}",
                f"{words} of the change of W_q W_k^T, of {degree} order in the step",
                reach,
                "does not tell",
                _INCREMENTS,
            )
            for order, degree, most in ((2, "first", "2 d_k"), (3, "second", "d_k"))
            for name, words, reach in (
                ("norm", "Frobenius norm", "0 to infinity"),
                ("stable_rank", "stable rank", f"0 to {most}"),
                ("erank", "effective rank", f"0 to {most}"),
            )
        ),
        Curve("n", "queries per head behind the point, over all processes", "0 to infinity", "few: a rough reading"),
        Curve("flag", "attention", "0 to 7", "above 0: why to doubt the point"),
    )

    def __init__(
        self,
        layers: Sequence[str] | Mapping[str, Reader] | None = None,
        every_n_steps: int | None = None,
        rows: int = 16,
        bound: bool = True,
        heads: int = 1,
        detail: Detail = "high",
    ) -> None:
        super().__init__(layers, every_n_steps, rows, detail)
        require_whole(1, rows=rows)
        require_whole(0, heads=heads)
        self.bound = bound
        self.heads = heads
        self._increments: QKIncrementWindow | None = None
        self._reset()

    def _reset(self) -> None:
        self._bounds: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}

    @override
    def state(self) -> dict[str, Any]:
        if self._attention is None:
            return {}
        return {
            "heads": self._attention.state_dict(),
            "bounds": {name: bound.to("cpu", copy=True) for name, bound in self._bounds.items()},
            "widths": dict(self._widths),
            "weights": {} if self._increments is None else self._increments.state_dict(),
        }

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        if self._attention is None:
            return
        self._attention.load_state_dict(state["heads"])
        self._bounds = {name: bound.to(self._device, copy=True) for name, bound in state["bounds"].items()}
        self._widths = dict(state["widths"])
        if self._increments is not None:
            self._increments.load_state_dict(state["weights"], self._device)

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()
        self._device = pl_module.device
        whole = self._take_bound if self.bound else None
        window = self.listen(pl_module, LogitStatistics(), whole)
        if self.heads:
            self._increments = QKIncrementWindow(pl_module, window.taps, self.heads, self.warn_once)

    @override
    def stop(self) -> None:
        super().stop()
        self._increments, self._bounds = None, {}

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._attention is not None:
            # where the first point has seen no call whole there is nothing to listen for between points
            self._attention.before_batch(batch, batches_left == 0, between=self.bound and bool(self._widths))

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Sums and maxima of the heads of every layer and their bounds, over all processes; and increments."""
        if self._attention is None:
            return {}
        readings = self._attention.read(pl_module.device)
        if not readings:
            return {}
        heads = self._attention.heads
        bounds = {name: self._bounds.get(name, torch.empty(0)) for name in heads}
        none = torch.full((1,), -torch.inf, device=pl_module.device)
        parts = [b.to(none) if len(b) == heads[name] else none.expand(heads[name]) for name, b in bounds.items()]
        largest = all_reduce_max(torch.stack([part.amax() for part in parts]))
        self._bounds = {}
        readings |= {(name, _BOUND): bound for name, bound in zip(bounds, largest, strict=True)}
        return readings if self._increments is None else readings | self._increments.read(heads, self._widths)

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        if self._attention is None or not numbers:
            return []
        known = {name: number for name, number in numbers.items() if name[1] in (_BOUND, *qk_increment_window.CURVES)}
        tables = self._attention.tables({name: vector for name, vector in numbers.items() if name not in known})
        points: list[Point] = []
        for layer, table in tables.items():
            points += self._points_of(layer, step, table)
            self.say_if_not_called(points[-1])
        for (layer, curve), number in known.items():
            if isfinite(number):
                points.append(Point(self.family, layer, "qk_bound" if curve == _BOUND else curve, step, number))
        return points + self._summary(step, points)

    def _take_bound(self, name: str, call: AttentionCall) -> None:
        batch, _, length, _ = call.query.shape
        step = max(batch * length // MAX_ROWS, 1)
        keys = call.key[::step] if len(call.key) > 1 else call.key
        bound = logit_bound(call.query[::step], keys, call.scale)
        before = self._bounds.get(name)
        if before is None or len(before) == len(bound):
            self._bounds[name] = bound if before is None else torch.maximum(before, bound)
        self._widths[name] = call.query.shape[-1]

    def _points_of(self, layer: str, step: int, table: Tensor) -> list[Point]:
        """Curves of one layer, from the statistics of its heads."""
        read = table[table[:, 0] > 0]
        n, lost = int(read[:, 0].mean()) if len(read) else 0, float(table[:, 1].sum())
        flag = Flag.NONFINITE if lost else Flag.OK if n else Flag.NOT_CALLED
        values = LogitStatistics.read(table) | {"n": (float(n), nan), "flag": (float(flag), nan)}
        return [Point(self.family, layer, name, step, value, n, null, flag) for name, (value, null) in values.items()]

    def _summary(self, step: int, points: Sequence[Point]) -> list[Point]:
        found = []
        for name, pick in (("max_logit", max), ("min_logit", min), ("qk_bound", max)):
            values = [point.value for point in points if point.measure == name and isfinite(point.value)]
            if values:
                found.append(Point(self.family, "all", name, step, pick(values)))
        return found
