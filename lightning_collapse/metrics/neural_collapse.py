"""Neural collapse, streaming: class statistics in, the published measures out."""

from __future__ import annotations

from math import nan
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.cdnv import over_pairs
from lightning_collapse.functional.neural_collapse.class_means import centered_means, rounding_variance
from lightning_collapse.functional.neural_collapse.gnc2 import log_kernel
from lightning_collapse.functional.neural_collapse.gof import gof_error, norm_count_slope
from lightning_collapse.functional.neural_collapse.minority import minority_cosine, minority_norm
from lightning_collapse.functional.neural_collapse.nc1 import within_over_between
from lightning_collapse.functional.neural_collapse.nc2 import angle_error, frame_distance, norm_variation
from lightning_collapse.functional.neural_collapse.nc3 import bias_collapse, cosine_variance, duality_distance
from lightning_collapse.functional.neural_collapse.vci import vci
from lightning_collapse.metrics.sums import StatisticsMetric
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.spectral.precision import full_precision

EXACT = 5000
"""Classes up to which all pairs are taken."""
IMBALANCE = ("minority_cosine", "minority_norm", "gof_error", "norm_count_slope", "norm_count_slope_means")
PAIRS = 100_000
"""Random pairs of more classes."""


class NeuralCollapse(StatisticsMetric[ClassMoments]):
    r"""Neural collapse of all features seen since the last reset, from one pass.

    Keeps :class:`~lightning_collapse.spectral.ClassMoments`: memory is ``O(num_classes * dim + dim ** 2)`` however many
    samples arrive, and ``compute`` gives every process the measures of the rows of all of them, by all-reduces of the
    statistics; a class may be missing on any process, or on all. Rows with NaN or infinity and rows whose label names
    no class are left out and counted. Feed it features in eval mode, of clean, unmixed data.
    Of more than 5,000 classes with rows 100,000 random pairs are taken instead of all, the same in every call.

    As input to ``update``:

    - ``features`` (:class:`~torch.Tensor`): What the classifier multiplies, shape ``(N, dim)``, any floating dtype.
    - ``labels`` (:class:`~torch.Tensor`): Classes, shape ``(N,)``, integers; ``ignore_index`` is skipped.

    As input to ``compute``:

    - ``weight`` (:class:`~torch.Tensor`, optional): Of the classifier, shape ``(num_classes, dim)``.
    - ``bias`` (:class:`~torch.Tensor`, optional): Of the classifier, shape ``(num_classes,)``.

    As output of ``compute`` a dictionary of scalars, ``float64``, NaN where undefined:

    - ``nc1``: :func:`~lightning_collapse.functional.nc1`, falls to 0.
    - ``nc2_equinorm``, ``nc2_equiangular``, ``nc2_etf``: :func:`~lightning_collapse.functional.nc2_equinorm`,
      :func:`~lightning_collapse.functional.nc2_equiangular` and :func:`~lightning_collapse.functional.etf_error` of the
      class means, fall to 0.
    - ``nc3``: :func:`~lightning_collapse.functional.nc3`, falls to 0; NaN without ``weight``.
    - ``bias_collapse``: :func:`~lightning_collapse.functional.bias_collapse`, falls to 0; NaN without ``weight``.
    - ``cdnv``, ``cdnv_median``: :func:`~lightning_collapse.functional.cdnv`, fall to 0.
    - ``vci``: :func:`~lightning_collapse.functional.vci`, falls to 0; also for ``n <= dim + 1`` rows whatever they are.
    - ``log_cdnv``: Mean over pairs of the logarithm of CDNV (not the logarithm of the mean), falls; minus infinity if
      two classes have no variance, so also two of one row each: see ``min_count``.
    - ``gnc2``: The variance of :func:`~lightning_collapse.functional.gnc2`, falls to 0.
    - ``unc3``: :func:`~lightning_collapse.functional.unc3`, falls to 0; NaN without ``weight``.
    - ``minority_cosine``, ``minority_norm``: :func:`~lightning_collapse.functional.minority_cosine` and
      :func:`~lightning_collapse.functional.minority_norm` of the rows of ``weight``; NaN without it.
    - ``gof_error``: :func:`~lightning_collapse.functional.gof_error` of the class means, falls to 0.
    - ``norm_count_slope``, ``norm_count_slope_means``: :func:`~lightning_collapse.functional.norm_count_slope` of the
      rows of ``weight`` (NaN without it) and of the class means. These five are NaN where the largest class has at most
      twice the rows of the smallest.
    - ``n``, ``classes``: Rows, and classes with at least ``min_count`` of them, that the others are of.
    - ``missing``, ``rare``: Classes left out: without rows, and with fewer.
    - ``rank``: Rank of the between-class covariance that ``nc1`` inverts, at most ``classes - 1``.

    Args:
        num_classes: Number of classes ``C``, at least 2.
        dim: Number of features ``D``.
        ignore_index: Label of rows to skip.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        min_count: Rows that a class must have to be in a measure: means of a few are noise, and one row has no
            variance. The shape of the within-class scatter stays that of all rows, its size is that of the classes
            that are in.
        kwargs: Passed to :class:`torchmetrics.Metric`; what ``compute`` returns is not cached by default, since it
            depends on the weight.

    Raises:
        ValueError: If an argument is out of range; in ``update``, if a shape does not fit or labels are not integers.
            Labels out of range do not raise, which would wait for the device: they are counted in ``invalid``.

    Example:
        >>> metric = NeuralCollapse(num_classes=2, dim=2)
        >>> features = torch.tensor([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]])
        >>> metric.update(features, torch.tensor([0, 0, 1, 1]))
        >>> measures = metric.compute(weight=torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> {name: round(measures[name].item(), 3) for name in ("nc1", "nc3", "cdnv", "rank")}
        {'nc1': 0.0, 'nc3': 0.0, 'cdnv': 0.062, 'rank': 1.0}
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    sizes = ("num_classes", "dim")

    ignored: Tensor
    invalid: Tensor
    nonfinite: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        ignore_index: int = -100,
        dtype: torch.dtype = torch.float64,
        min_count: int = 1,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("compute_with_cache", False)
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        if dim < 1:
            raise ValueError(f"`dim` is the number of features and must be positive, got {dim}.")
        self.num_classes = num_classes
        self.dim = dim
        if min_count < 1:
            raise ValueError(f"`min_count` is a number of rows and must be positive, got {min_count}.")
        self.ignore_index = ignore_index
        self.min_count = min_count
        self._begin(ClassMoments(num_classes, dim, dtype=dtype))

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add rows of shape ``(N, dim)`` and their classes ``(N,)``."""
        self.moments().update(features, labels)

    def compute(self, weight: Tensor | None = None, bias: Tensor | None = None) -> dict[str, Tensor]:
        """All measures of everything seen so far; those of the classifier if its weight is given."""
        return measures(self.moments(), weight, bias, self.min_count)

    def _from_states(self, states: dict[str, Any]) -> ClassMoments:
        return ClassMoments.from_states(states, self.ignore_index)


def measures(
    moments: ClassMoments, weight: Tensor | None = None, bias: Tensor | None = None, min_count: int = 1
) -> dict[str, Tensor]:
    """What :class:`NeuralCollapse` computes, from statistics with scatter."""
    size, kept = len(moments.count), moments.count >= min_count
    found = {"bias_collapse": moments.count.new_full((), nan)}
    if weight is not None:
        center = torch.where(kept.unsqueeze(1), moments.means, 0.0).sum(dim=0) / kept.sum()
        found["bias_collapse"] = bias_collapse(weight.to(center), bias, center)
    if size > EXACT:  # what is not there takes no part in any pair
        there = (moments.count > 0).nonzero().flatten()
        moments, weight = moments.select(there), None if weight is None else weight[there]
    counts = torch.where(moments.count >= min_count, moments.count, 0.0)
    found |= of_classes(moments, weight, min_count)
    found |= of_imbalance(moments, min_count, counts, weight, counts)
    present = (moments.count > 0).sum().to(counts)
    return found | {"missing": size - present, "rare": present - found["classes"]}


def of_classes(
    moments: ClassMoments, weight: Tensor | None, min_count: int = 1, rank: Tensor | None = None
) -> dict[str, Tensor]:
    """The measures of the classes that have at least ``min_count`` rows.

    Args:
        moments: Statistics with scatter, of ``C`` classes.
        weight: Of the classifier, a row for each of these, shape ``(C, D)``.
        min_count: See above.
        rank: As ``largest`` in :func:`~lightning_collapse.functional.neural_collapse.nc1.within_over_between`.
    """
    counts = torch.where(moments.count >= min_count, moments.count, 0.0)
    within = within_covariance(moments, counts)
    found = of_means(moments, within, counts, weight, rank)
    return found | {"vci": vci(moments.means, within, counts, resolution=moments.resolution)}


def of_imbalance(
    moments: ClassMoments, min_count: int, sizes: Tensor, weight: Tensor | None, seen: Tensor
) -> dict[str, Tensor]:
    """The measures that are NaN unless the largest class has more than twice the rows of the smallest.

    Args:
        moments: Statistics of ``C`` classes.
        min_count: Rows that one of these must have.
        sizes: How large they are, ``(C,)``: rows so far, which may be more than the statistics hold.
        weight: Rows of the classifier, ``(S, D)``.
        seen: How large the classes of these are, ``(S,)``; 0 for those that do not count.
    """
    found = dict.fromkeys(IMBALANCE, sizes.new_full((), nan))
    if not bool(seen.amax() > 2 * torch.where(seen > 0, seen, torch.inf).amin()):  # decompositions wait, too
        return found
    counts = torch.where(moments.count >= min_count, sizes, 0.0)
    if weight is not None:
        rows = weight.to(counts)
        found |= {"minority_cosine": minority_cosine(rows, seen), "minority_norm": minority_norm(rows, seen)}
        found["norm_count_slope"] = norm_count_slope(rows, seen)
    found["norm_count_slope_means"] = norm_count_slope(moments.means, counts)
    return found | {"gof_error": gof_error(moments.means, counts, sample=_sample(counts))}


def _sample(counts: Tensor) -> int | None:
    """How many random pairs of so many classes are taken, if not all."""
    return PAIRS if len(counts) > EXACT else None


@full_precision
def of_means(
    moments: ClassMoments, within: Tensor, counts: Tensor, weight: Tensor | None, rank: Tensor | None = None
) -> dict[str, Tensor]:
    """The measures of class means: NC1 to NC3, GNC2, UNC3 and CDNV, with what they are of.

    Args:
        moments: Class means and variances.
        within: Covariance within the classes that count, shape ``(D, D)``.
        counts: Rows per class, shape ``(C,)``; 0 leaves a class out.
        weight: Of the classifier, shape ``(C, D)``.
        rank: As in :func:`of_classes`.
    """
    # the public functions each center the means anew, which takes them half of their time
    means = moments.means
    part, n, undefined = centered_means(means, counts), counts.sum(), means.new_full((), nan)
    rounding = rounding_variance(means, within, counts, moments.resolution)
    trace, kept = within_over_between(part, within, rounding, rank)
    sample = _sample(counts)
    variances = torch.where(part.present, moments.within_traces / counts.clamp_min(1), 0.0)
    pairs = over_pairs(part, variances, torch.zeros_like(variances), sample=sample)
    return {
        "nc1": trace / part.classes,
        "nc2_equinorm": norm_variation(part),
        "nc2_equiangular": angle_error(part, sample=sample),
        "nc2_etf": frame_distance(part.rows, part.rows, part.present),
        "nc3": undefined if weight is None else duality_distance(part, weight).square(),
        "gnc2": log_kernel(part, sample=sample).variance,
        "unc3": undefined if weight is None else cosine_variance(part, weight),
        "cdnv": pairs.mean,
        "cdnv_median": pairs.median,
        "log_cdnv": pairs.mean_log,
        "n": n,
        "classes": part.classes.to(n),
        "rank": kept,
    }


def within_covariance(moments: ClassMoments, counts: Tensor) -> Tensor:
    """The pooled scatter as a covariance ``(D, D)``: of classes left out its size is taken off, its shape cannot be."""
    scatter = moments.within_scatter
    kept, everything = torch.where(counts > 0, moments.within_traces, 0.0).sum(), scatter.trace()
    return torch.where(everything > 0, kept / everything, 1.0) / counts.sum() * scatter
