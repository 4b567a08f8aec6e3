"""Variance propagation monitor: whether activations and gradients vanish or explode with depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite, nan, prod
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.monitors.layer_monitor import LayerMonitor
from lightning_collapse.callbacks.monitors.monitor import Detail, Name
from lightning_collapse.monitoring.variance_hooks import GRADIENT, VarianceHooks
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.execution import Execution
from lightning_collapse.utilities.modules import Tap
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.trainer import logging_step

_GLOROT, _PRODUCT = "Glorot & Bengio, AISTATS 2010", "0 is vanishing, infinity exploding"


class VariancePropagationMonitor(LayerMonitor[VarianceHooks]):
    r"""Log how the variance of activations changes from layer to layer, and how that of gradients does on the way back.

    With :math:`h_1, \dots, h_L` what the watched layers return, in the order in which they run, and
    :math:`\delta_l = \partial \text{loss} / \partial h_l`,

    .. math:: F_l = \frac{\operatorname{Var} h_l}{\operatorname{Var} h_{l-1}}, \qquad
        B_l = \frac{\operatorname{Var} \delta_l}{\operatorname{Var} \delta_{l+1}}

    each variance taken over rows (samples, tokens, positions of maps, nodes), of every feature by itself, and averaged
    over features. A network that can be trained begins with ratios near 1; it is an initialization that decides, so the
    first steps are read one by one. **Logged metrics**, ``propagation/{layer}/...``, to every logger and to
    ``trainer.callback_metrics``:

    {curves}

    Under ``propagation/all/...`` stand the products over depth: below 1 they tell vanishing, above 1 exploding. All are
    ratios of variances of one step, so no loss scale and no accumulation moves them. The first layer has no
    ``forward_ratio``, the last no ``backward_ratio``, and where a gradient does not pass, or passes inside compiled
    code, there is none either.

    **A layer that ends in a norm reads 1 by construction**: watch what goes into it, ``layers=["*.norm2:input"]``. Name
    layers that run one after the other; branches beside each other have no ratio that means anything.

    A point rests on all numbers of the step that ends in it, in all micro-batches and calls on all processes; sums are
    taken while they pass. Padding does not count; rows with NaN or infinity, of values or of gradients, are left out
    and flagged.

    Args:
        layers: Names of submodules, or glob patterns of them; ``"name:input"`` is what a module receives. ``None``
            takes up to eleven outputs by the rule of ``default_taps``, blocks as a whole.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        first_steps: So many steps in the beginning all end in a point.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing.

    References:
        Glorot & Bengio, *Understanding the difficulty of training deep feedforward neural networks*, AISTATS 2010; Li
        et al., *On the Initialization of Graph Neural Networks*, ICML 2023. https://arxiv.org/abs/2312.02622

    Example::

        trainer = Trainer(callbacks=[VariancePropagationMonitor()])
    """

    family = "propagation"
    declares = (
        Curve(
            "forward_ratio",
            "variance of what a layer returns, over that of the watched layer before it",
            "0 to infinity; healthy near 1",
            "near 0, or large",
            _GLOROT,
        ),
        Curve(
            "backward_ratio",
            "variance of the gradient at a layer, over that at the watched layer behind it",
            "0 to infinity; healthy near 1",
            "near 0, or large",
            _GLOROT,
        ),
        Curve("forward_product", "variance of the last layer's output over the first's", "0 to infinity", _PRODUCT),
        Curve("backward_product", "variance of the first layer's gradient over the last's", "0 to infinity", _PRODUCT),
        Curve("n", "rows behind the point, over all processes", "0 to infinity", "few: a rough reading"),
        Curve("flag", "propagation", "0 to 6", "above 0: why to doubt the point"),
    )

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        every_n_steps: int | None = None,
        first_steps: int = 10,
        detail: Detail = "high",
    ) -> None:
        super().__init__(layers, every_n_steps, detail)
        require_whole(0, first_steps=first_steps)
        self.first_steps = first_steps

    @override
    def make_hooks(self, taps: Sequence[Tap]) -> VarianceHooks:
        return VarianceHooks(taps, self.contained)

    @override
    def default_layers(self, root: nn.Module, order: Execution | None = None) -> list[Tap]:
        return [tap for tap in super().default_layers(root, order) if tap.side == "output"]

    @override
    def cadence(self, trainer: Trainer) -> int:
        every = self.usual_cadence(trainer)
        return 1 if every and logging_step(trainer) < self.first_steps else every

    @override
    def usual_cadence(self, trainer: Trainer) -> int:
        return super().cadence(trainer)

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Variance and numbers of rows of the values and the gradients of every layer, over all processes."""
        moments = {} if self._hooks is None else self._hooks.pop(pl_module.device)
        readings: dict[Name, Tensor] = {}
        for name, of in moments.items():
            own = {"variance": of.variance, "n": of.count, "seen": of.seen}
            readings |= {(name, key): value.to(pl_module.device) for key, value in own.items()}
        return readings

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        places = {} if self._hooks is None else self._hooks.facts
        known = {tap.name for tap in self._next}  # the first batch shows what is no layer to look at
        ran = sorted((name for name in places if name in known), key=lambda name: places[name])
        forward = _ratios([numbers[name, "variance"] for name in ran])
        back = [numbers.get((GRADIENT + name, "variance"), nan) for name in ran]
        backward = _ratios(back[::-1])[::-1]
        points = []
        for name, ahead, behind in zip(ran, [nan, *forward], [*backward, nan], strict=False):
            points += self._points_of(name, step, {"forward_ratio": ahead, "backward_ratio": behind}, numbers)
        for name in (tap.name for tap in self._next if tap in self._taps and tap.name not in places):
            self.warn_of_layer(name)
            points += [Point(self.family, name, "flag", step, float(Flag.NOT_CALLED), flag=Flag.NOT_CALLED)]
        for measure, values in (("forward_product", forward), ("backward_product", backward)):
            if values and all(map(isfinite, values)):
                points.append(Point(self.family, "all", measure, step, prod(values)))
        return points

    def _points_of(self, name: str, step: int, ratios: Mapping[str, float], numbers: Mapping[Name, Any]) -> list[Point]:
        n, seen = (int(numbers[name, key]) for key in ("n", "seen"))
        lost = seen - n + numbers.get((GRADIENT + name, "seen"), 0) - numbers.get((GRADIENT + name, "n"), 0)
        flag = Flag.FEW_ROWS if n < 2 else Flag.NONFINITE if lost else Flag.OK
        if not flag and not numbers[name, "variance"]:
            flag = Flag.CONSTANT
        drawn = {key: value for key, value in ratios.items() if isfinite(value) or flag}
        drawn |= {"n": float(n), "flag": float(flag)}
        return [Point(self.family, name, key, step, value, n, flag=flag) for key, value in drawn.items()]


def _ratios(variances: Sequence[float]) -> list[float]:
    """Of each number to the one before it, NaN where that is 0 or not finite."""
    return [after / before if before > 0 else nan for before, after in pairwise(variances)]
