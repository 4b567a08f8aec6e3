"""Activation monitor: outliers among what layers return, and what narrow formats lose of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.layer_monitor import LayerMonitor
from lightning_collapse.callbacks.monitors.monitor import Detail, Name
from lightning_collapse.functional.activation_outliers import activation_outliers, headroom_bits, outlier_nulls
from lightning_collapse.monitoring.activation_hooks import ActivationHooks
from lightning_collapse.utilities.modules import Tap
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve

_ALL = {"abs_max": max, "crest_factor": max, "neuron_kurtosis": max, "headroom_bits": min}
_OUTLIERS, _MASSIVE = "He et al., NeurIPS 2024, arXiv 2405.19279", "Sun et al., COLM 2024, arXiv 2402.17762"
_FP8 = "Micikevicius et al. 2022, arXiv 2209.05433"


class ActivationMonitor(LayerMonitor[ActivationHooks]):
    r"""Log how far the largest activations of a layer are from the others, and how near its format is to overflow.

    **Logged metrics**, ``activations/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    Formulas are those of :func:`~lightning_collapse.functional.activation_outliers`. Under ``all`` stand the largest
    ``abs_max``, ``crest_factor`` and ``neuron_kurtosis`` of any layer and the least ``headroom_bits``. The null of a
    point is what independent normals of its size read, see :func:`~lightning_collapse.functional.outlier_nulls`.

    Outliers exist in healthy models: what tells is where they begin to grow. That ``abs_max`` rises alone means few
    channels, that ``rms`` rises too that the whole layer grows.

    A point rests on every number that a layer returned in the step that ends in it, in all micro-batches and calls on
    all processes: of a sample of rows the largest would be too small. Sums are taken while the numbers pass; nothing is
    kept. Every token and every position of a map is a row. Padding (zeros in ``batch["attention_mask"]``) does not
    count, rows with NaN or infinity are left out and flagged ``NONFINITE``.

    Args:
        layers: Names of submodules, or glob patterns of them; ``"name:input"`` is what a module receives. ``None``
            takes up to a dozen by the rule of ``default_taps``.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing.

    Example::

        trainer = Trainer(callbacks=[ActivationMonitor()])
    """

    family = "activations"
    declares = (
        Curve("abs_max", "largest magnitude", "0 to infinity", "growing"),
        Curve("rms", "root mean square", "0 to infinity", "near 0, or growing"),
        Curve("crest_factor", "largest magnitude over root mean square", "1 to infinity", "growing"),
        Curve(
            "kurtosis",
            "fourth moment of all numbers over the square of the second",
            "1 to infinity; 3 is Gaussian",
            "large",
            _OUTLIERS,
        ),
        Curve(
            "neuron_kurtosis",
            "how unequal neurons are: kurtosis of their root mean squares, uncentered",
            "1 to the number of neurons",
            "large",
            _OUTLIERS,
        ),
        Curve(
            "max_median_ratio",
            "largest magnitude of the loudest neuron over that of the median one",
            "1 to infinity",
            "above 100",
        ),
        Curve("outlier_fraction", "share of magnitudes beyond 10 root mean squares", "0 to 0.01", "growing"),
        Curve(
            "massive", "how many magnitudes are beyond both 100 and 1,000 medians", "0 to infinity", "growing", _MASSIVE
        ),
        Curve(
            "headroom_bits",
            "how often the largest magnitude may double before its format overflows",
            "0 to infinity",
            "below 1",
        ),
        Curve(
            "flushed_fraction",
            "share of numbers that become 0 in the 8-bit format e4m3, scaled by the largest",
            "0 to 1",
            "growing",
            _FP8,
        ),
        Curve("n", "rows behind the point, over all processes", "0 to infinity", "few: maxima read low"),
        Curve("flag", "activations", "0 to 6", "above 0: why to doubt the point"),
    )

    def __init__(
        self, layers: Sequence[str] | None = None, every_n_steps: int | None = None, detail: Detail = "high"
    ) -> None:
        super().__init__(layers, every_n_steps, detail)
        self._widths: dict[str, int] = {}

    @override
    def make_hooks(self, taps: Sequence[Tap]) -> ActivationHooks:
        return ActivationHooks(taps, self.contained)

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        if self._hooks is None:
            return {}
        readings: dict[Name, Tensor] = {}
        moments = self._hooks.pop(pl_module.device)
        self._widths = {name: len(of.squares) for name, of in moments.items()}
        for name, of in moments.items():
            found = activation_outliers(of)
            own = {**found.as_dict(), "n": of.count, "seen": of.seen}
            if name in self._hooks.facts:
                own["headroom_bits"] = headroom_bits(found.abs_max, self._hooks.facts[name])
            readings |= {(name, key): value.to(pl_module.device) for key, value in own.items()}
        return readings

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        # what the first batch has shown to be no layer to look at has no point
        taps = [tap for tap in self._taps if tap in self._next]
        points = [point for tap in taps for point in self._points_of(tap.name, step, numbers)]
        for measure, extreme in _ALL.items():
            known = [point for point in points if point.measure == measure and isfinite(point.value)]
            if known:
                n = min(point.n for point in known)
                points.append(Point(self.family, "all", measure, step, extreme(point.value for point in known), n))
        return points

    def _points_of(self, name: str, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        own = {curve.name: numbers[name, curve.name] for curve in self.declares if (name, curve.name) in numbers}
        n, seen = (int(numbers.get((name, key), 0)) for key in ("n", "seen"))
        flag = _flag(n, seen, own.get("kurtosis", nan))
        if flag == Flag.NOT_CALLED:
            own = {curve.name: nan for curve in self.declares if curve.name != "headroom_bits"}
            if self._hooks is None or name not in self._hooks.left_out:
                self.warn_of_layer(name)
        own |= {"n": float(n), "flag": float(flag)}
        nulls = outlier_nulls(n, self._widths.get(name, 0))
        return [
            # of a layer of zeros nothing is near its format's end
            Point(self.family, name, key, step, value if isfinite(value) else nan, n, nulls.get(key, nan), flag)
            for key, value in own.items()
        ]


def _flag(n: int, seen: int, kurtosis: float) -> Flag:
    if not seen:
        return Flag.NOT_CALLED
    if not n:
        return Flag.FEW_ROWS
    if n < seen:
        return Flag.NONFINITE
    return Flag.OK if isfinite(kurtosis) else Flag.CONSTANT
