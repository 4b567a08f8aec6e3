"""Layer points: what measures read of the rows of layers, with what noise of the same size reads and where to doubt."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from lightning_collapse.functional.isotropic_null import expected_under_isotropy
from lightning_collapse.monitoring.evaluate import evaluate, flag_of
from lightning_collapse.monitoring.feature_buffer import LayerFeatures
from lightning_collapse.monitoring.to_host import to_host
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Measure, get_measure

JUDGED = ("effective_rank", "eigenvalue_effective_rank", "feature_std", "relative_spread", "direction_spread")
"""Names of the measures that rules of collapse read."""


def read_points(layers: Mapping[str, LayerFeatures], step: int, measures: Sequence[str] = JUDGED) -> list[Point]:
    """Points of the family ``collapse``, such as a :class:`~lightning_collapse.rules.Judge` takes; without a trainer.

    Collective: every process must call it, with layers of the same widths in the same order. Waits for the device once.

    Args:
        layers: What :meth:`FeatureWindow.features` returns.
        step: Of the points.
        measures: Names of measures of a layer.

    Example:
        >>> import torch
        >>> line = torch.arange(8.0).outer(torch.tensor([3.0, 4.0]))
        >>> layers = {"encoder": LayerFeatures(line, torch.ones(8, dtype=torch.bool), expected=8)}
        >>> [(point.key, round(point.value, 3)) for point in read_points(layers, 10, ["effective_rank"])][:2]
        [('collapse/encoder/effective_rank', 1.0), ('collapse/encoder/n', 8.0)]
    """
    chosen = [get_measure(name) for name in measures]
    readings = {(name, key): v for name, of in evaluate(layers, chosen).items() for key, v in of.readings().items()}
    numbers = to_host(readings)
    found: list[Point] = []
    for name, layer in layers.items():
        of_layer = {key: number for (of, key), number in numbers.items() if of == name}
        found += layer_points("collapse", name, step, layer, chosen, of_layer)
    return found


def layer_points(
    family: str,
    name: str,
    step: int,
    layer: LayerFeatures | None,
    measures: Sequence[Measure],
    numbers: Mapping[str, Any],
) -> list[Point]:
    """Points of one layer.

    Args:
        family: Of the points.
        name: Of the layer.
        step: Of the points.
        layer: The rows; ``None`` if it has not run.
        measures: What was read.
        numbers: Its :meth:`~lightning_collapse.monitoring.evaluate.Evaluation.readings` on the host.
    """
    n, seen = (int(numbers.get(key, 0)) for key in ("n", "seen"))
    flag = flag_of(n, seen, numbers.get("top", nan), layer is not None and layer.sketched)
    found = []
    for measure in measures:
        value = nan if flag in (Flag.NOT_CALLED, Flag.FEW_ROWS) else numbers[measure.curve]
        # corrected for the projection, a value is of the whole width, which the null would not be
        null = nan if layer is None or (measure.record and layer.sketched) else _null(measure, n, layer)
        found.append(Point(family, name, measure.curve, step, value, n, null, flag))
    found += [Point(family, name, key, step, float(value), n, flag=flag) for key, value in (("n", n), ("flag", flag))]
    lost = 1 - n / seen if seen else nan
    return [*found, Point(family, name, "nonfinite_fraction", step, lost, n, flag=flag, drawn=lost > 0)]


def _null(measure: Measure, n: int, layer: LayerFeatures) -> float:
    try:
        return expected_under_isotropy(measure.name, n, layer.rows.shape[1]) if n > 1 else nan
    except Exception:  # a measure of the user's own, which has said so already
        return nan
