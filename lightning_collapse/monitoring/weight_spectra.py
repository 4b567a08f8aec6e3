"""Weight spectra: from weight matrices to readings of their spectra, and of the matrices themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from math import hypot, isfinite, nan
from statistics import mean

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_collapse.functional.isotropic_null import marchenko_pastur_quantiles
from lightning_collapse.functional.marchenko_pastur import marchenko_pastur_fit
from lightning_collapse.functional.power_law import power_law_alpha, power_law_null
from lightning_collapse.spectral.cost import spectrum_flops
from lightning_collapse.spectral.matrices import alike, matrix_spectra
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import MEASURES, Measure, get_measure

Shape = tuple[int, int]
Reader = Callable[[Tensor, Shape], dict[str, Tensor]]


def _spectral_norm(values: Tensor, shape: Shape) -> dict[str, Tensor]:
    return {"spectral_norm": values[..., 0]}


def _outliers(values: Tensor, shape: Shape) -> dict[str, Tensor]:
    fit = marchenko_pastur_fit(values, shape)
    return {"outlier_share": fit.outlier_share, "noise_distance": fit.ks_distance}


def _power_law(values: Tensor, shape: Shape) -> dict[str, Tensor]:
    law = power_law_alpha(values.square())
    return {
        "power_law_alpha": law.alpha,
        "power_law_distance": law.ks_distance,
        "power_law_tail": torch.where(values.isfinite().all(dim=-1), law.tail_count, torch.nan),
    }


OF_WEIGHTS: dict[str, Reader] = {
    "norm": lambda values, shape: {},  # always there, and not from the spectrum
    "spectral_norm": _spectral_norm,
    "outliers": _outliers,
    "power_law": _power_law,
}
"""What can be read besides the registered measures."""
ONLY_WEIGHTS = ("outliers", "power_law")
"""Of these no reading of an update is made: there is no initialisation to tell it from."""
_TOGETHER: dict[str, Callable[[list[float]], float]] = {"norm": lambda norms: hypot(*norms), "spectral_norm": max}


def check_measures(names: Sequence[str]) -> list[str]:
    """The names without repetition.

    Raises:
        ValueError: If one is neither in :data:`OF_WEIGHTS` nor a registered measure of singular values or of weights.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"`measures` takes a list of names, got {names!r}.")
    known = [m.name for m in MEASURES.values() if m.kind in ("spectrum", "weights")]
    for name in names:
        if name not in OF_WEIGHTS and name not in known:
            raise ValueError(
                f"Unknown measure of weights {name!r}. Choose from: {', '.join(sorted([*OF_WEIGHTS, *known]))}."
            )
    return list(dict.fromkeys(names))


def of_updates(names: Sequence[str]) -> list[str]:
    """Those that can also be read of an update: not what is told from an initialisation, or is of weights as such."""
    return [name for name in names if name not in ONLY_WEIGHTS and not _reads_weights(name)]


def reading_flops(names: Sequence[str], shape: Shape, updates: bool) -> float:
    """What reading one matrix costs, in the units of :func:`~lightning_collapse.spectral.cost.spectrum_flops`."""
    costs = [MEASURES[name].flops for name in names if _reads_weights(name)]
    return spectrum_flops(max(shape), min(shape)) * (1 + updates) + sum(cost(*shape) for cost in costs if cost)


def read_matrices(matrices: Sequence[Tensor], names: Sequence[str]) -> list[dict[str, Tensor]]:
    """Readings of every matrix, curve by curve; ``norm`` and ``spectral_norm`` are always there.

    Args:
        matrices: Each ``(O, I)``.
        names: What :func:`check_measures` accepts.

    Returns:
        For each matrix a mapping from the last part of the curve's name to a 0-dimensional tensor.
    """
    readings: list[dict[str, Tensor]] = [{} for _ in matrices]
    for members in alike(matrices):
        values = matrix_spectra([matrices[i] for i in members])
        shape = max(matrices[members[0]].shape), min(matrices[members[0]].shape)
        norms = [torch.linalg.vector_norm(matrices[i], dtype=values.dtype) for i in members]
        curves = {"norm": torch.stack(norms)}
        for name in dict.fromkeys(["spectral_norm", *names]):
            if _reads_weights(name):
                curves |= _evaluate_each(get_measure(name), [matrices[i] for i in members], values)
            else:
                curves |= _evaluate(name, values, shape)
        for curve, batch in curves.items():
            for i, value in zip(members, batch.unbind(), strict=True):
                readings[i][curve] = value.to(values)
    return readings


def points_of(
    family: str,
    readings: Mapping[str, Mapping[str, float]],
    shapes: Mapping[str, Shape],
    hidden: Collection[str],
    step: int,
    called: bool = True,
) -> list[Point]:
    """Points of every matrix and of all together.

    Args:
        family: First part of the curves' names.
        readings: Of each matrix by name, from :func:`read_matrices`.
        shapes: Of the same matrices.
        hidden: Curves that are read but only drawn of all matrices together.
        step: The logging step.
        called: Whether there was anything to read.
    """
    points: list[Point] = []
    drawn: dict[str, list[float]] = {}
    gravest = Flag.OK
    for name, curves in readings.items():
        flag = _flag(curves["norm"], curves["spectral_norm"]) if called else Flag.NOT_CALLED
        gravest = max(gravest, flag)
        for curve, value in curves.items():
            value = nan if flag in (Flag.NONFINITE, Flag.NOT_CALLED) else value
            drawn.setdefault(curve, []).append(value)
            if curve not in hidden:
                points.append(Point(family, name, curve, step, value, null=_null(curve, shapes[name]), flag=flag))
        points.append(Point(family, name, "flag", step, float(flag), flag=flag))
    for curve, values in drawn.items():
        finite = [value for value in values if isfinite(value)]
        value = _TOGETHER.get(curve, mean)(finite) if finite else nan
        points.append(Point(family, "all", curve, step, value, flag=gravest))
    return [*points, Point(family, "all", "flag", step, float(gravest), flag=gravest)]


def _flag(norm: float, spectral_norm: float) -> Flag:
    if not isfinite(norm):
        return Flag.NONFINITE
    if not isfinite(spectral_norm):
        return Flag.SOLVER
    return Flag.OK if norm else Flag.CONSTANT


@lru_cache(maxsize=4096)
def _null(curve: str, shape: Shape) -> float:
    """What a matrix of independent random elements reads; NaN where that is a matter of scale."""
    if curve == "power_law_alpha":
        return power_law_null(*shape)
    if curve == "outlier_share":
        return 0.0
    measure = next((m for m in MEASURES.values() if m.curve == curve and m.kind in ("spectrum", "weights")), None)
    if measure is None or measure.kind == "weights":
        return nan if measure is None or measure.null is None else measure.null(*shape)
    values = torch.from_numpy(marchenko_pastur_quantiles(max(shape), min(shape))).sqrt()
    try:
        return measure.fn(values).item()  # of numbers on the host
    except Exception:  # a measure of the user's own, which says so when it reads a matrix
        return nan


def _evaluate(name: str, values: Tensor, shape: Shape) -> dict[str, Tensor]:
    if name in OF_WEIGHTS:
        return OF_WEIGHTS[name](values, shape)
    measure = get_measure(name)
    try:
        return {measure.curve: measure.fn(values).reshape(len(values))}
    except Exception as error:  # a measure of the user's own must not end the run
        return {measure.curve: _failed(name, error, values)}


def _reads_weights(name: str) -> bool:
    return name not in OF_WEIGHTS and get_measure(name).kind == "weights"


def _evaluate_each(measure: Measure, matrices: Sequence[Tensor], values: Tensor) -> dict[str, Tensor]:
    try:
        found = [full_precision(measure.fn)(matrix).reshape(()).to(values) for matrix in matrices]
    except Exception as error:  # a measure of the user's own must not end the run
        return {measure.curve: _failed(measure.name, error, values)}
    return {measure.curve: torch.stack(found)}


def _failed(name: str, error: Exception, values: Tensor) -> Tensor:
    rank_zero_warn(f"Measure `{name}` failed on weights and reads NaN: {error}")
    return values.new_full((len(values),), torch.nan)
