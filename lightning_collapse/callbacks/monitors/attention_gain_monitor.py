"""Attention gain monitor: how much of what differs between tokens the attention of an encoder lets through."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.attention_monitor import AttentionMonitor
from lightning_collapse.callbacks.monitors.monitor import Detail, Name
from lightning_collapse.monitoring.attention_gain import GainStatistics
from lightning_collapse.monitoring.attention_hooks import Reader
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve

_ZHOU = "Zhou et al., arXiv 2410.24200"


class AttentionGainMonitor(AttentionMonitor):
    r"""Log the low-pass gain of bidirectional attention: at 0 every token leaves it as the same mean.

    Attention averages; a map whose gain is low passes on what tokens share and drops what tells them apart, so that
    skips alone keep tokens different, and long texts end up alike (length collapse). **Logged metrics**,
    ``attention/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    The null of a point is what independent Gaussian logits of the same spread and length read, see
    :func:`~lightning_collapse.functional.low_pass_gain_null`; none where the spread is above 1. Under
    ``attention/all/...`` stands the mean over layers.

    **Only attention in which every query sees every key that counts has these curves**: under a causal mask the gain
    exceeds 1 and grows with length. A decoder draws nothing, which is said once; windows, packed documents and
    attention to other tokens than the queries' neither. Padding does not count.

    A point rests on whole maps of some sequences of the training batch that ends in it, 512 tokens in all but one
    sequence at least, and of as many heads as have 4 million weights together. What is captured, and how to point at
    what is not, is as in :class:`~lightning_collapse.AttentionEntropyMonitor`.

    Args:
        layers: As in ``AttentionEntropyMonitor``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        detail: As for every monitor; here it leaves nothing away.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing.

    References:
        Zhou et al., *Length-Induced Embedding Collapse in PLM-based Models*, ACL 2025.
        https://arxiv.org/abs/2410.24200

    Example::

        trainer = Trainer(callbacks=[AttentionGainMonitor()])
    """

    family = "attention"
    declares = (
        Curve(
            "low_pass_gain",
            "norm of the map without the mean over its queries, mean over heads; of encoders alone",
            "0 to infinity",
            "near 0: tokens become alike",
            _ZHOU,
        ),
        Curve(
            "low_pass_gain_max",
            "the same of the head and sequence that let most through",
            "0 to infinity",
            "near 0",
            _ZHOU,
        ),
    )

    def __init__(
        self,
        layers: Sequence[str] | Mapping[str, Reader] | None = None,
        every_n_steps: int | None = None,
        detail: Detail = "high",
    ) -> None:
        super().__init__(layers, every_n_steps, sys.maxsize, detail)

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen(pl_module, GainStatistics())

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Sums and the largest of every head of every layer, over all processes."""
        return {} if self._attention is None else self._attention.read(pl_module.device)

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        tables = {} if self._attention is None else self._attention.tables(numbers)
        points: list[Point] = []
        for layer, table in tables.items():
            found = GainStatistics.read(table)
            n, flag = int(found["maps"]), Flag.NONFINITE if found["lost"] else Flag.OK
            if n or flag:  # a layer that is not bidirectional, or did not run, has no point
                mean, largest = found["mean"], found["largest"]
                points.append(Point(self.family, layer, "low_pass_gain", step, mean, n, found["null"], flag))
                points.append(Point(self.family, layer, "low_pass_gain_max", step, largest, n, flag=flag))
        if tables and not points:
            self.warn_once("no attention is bidirectional here, and of other attention there is no gain to draw.")
        known = [point.value for point in points if point.measure == "low_pass_gain" and isfinite(point.value)]
        return points + ([Point(self.family, "all", "low_pass_gain", step, sum(known) / len(known))] if known else [])
