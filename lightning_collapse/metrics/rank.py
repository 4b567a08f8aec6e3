"""Effective rank, RankMe and other ranks, streaming: functions of :class:`~lightning_collapse.metrics.Spectrum`."""

from typing import Any, ClassVar

import torch
from torch import Tensor

import lightning_collapse.functional  # noqa: F401  # it fills the registry
from lightning_collapse.metrics.spectrum import Spectrum
from lightning_collapse.utilities.registry import get_measure


class SpectralMetric(Spectrum):
    """Streaming form of one registered measure of a spectrum; a subclass names the measure.

    As input to ``update``: features of shape ``(N, dim)``, any floating dtype, and an optional boolean mask ``(N,)``.
    As output of ``compute``: the measure of all rows seen on all processes, 0-dimensional, ``float64``; NaN before the
    first row.

    Args:
        dim: Number of features ``D``.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Attributes:
        measure: Name of the measure.

    Raises:
        TypeError: If the class names no measure.

    Example:
        >>> class TopShare(SpectralMetric):
        ...     measure = "top_k_share"
        >>> metric = TopShare(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        0.8
    """

    measure: ClassVar[str]

    def __init__(self, dim: int, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        if not hasattr(self, "measure"):
            raise TypeError(
                f"`{type(self).__name__}` names no measure. Take a subclass such as `EffectiveRank`, or set `measure`"
                " in one of your own."
            )
        super().__init__(dim, get_measure(self.measure).spectrum == "centered", dtype, **kwargs)

    def compute(self) -> Tensor:
        """The measure of everything seen so far."""
        return self._unless_empty(get_measure(self.measure).of_spectrum(self.record()))


class EffectiveRank(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.effective_rank`, between 1 (collapsed) and ``dim``.

    Example:
        >>> metric = EffectiveRank(dim=2)
        >>> metric.update(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    higher_is_better = True
    measure = "effective_rank"


class RankMe(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.rankme`, between 1 (collapsed) and ``dim``; not centered.

    Example:
        >>> metric = RankMe(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        1.89
    """

    higher_is_better = True
    measure = "rankme"


class EigenvalueEffectiveRank(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.eigenvalue_effective_rank`, between 1 (collapsed) and ``dim``.

    Example:
        >>> metric = EigenvalueEffectiveRank(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        1.649
    """

    higher_is_better = True
    measure = "eigenvalue_effective_rank"


class ParticipationRatio(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.participation_ratio`, between 1 (collapsed) and ``dim``.

    Example:
        >>> metric = ParticipationRatio(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        1.471
    """

    higher_is_better = True
    measure = "participation_ratio"


class UnbiasedParticipationRatio(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.unbiased_participation_ratio`, from 1 (collapsed) to ``dim``.

    Example:
        >>> metric = UnbiasedParticipationRatio(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        1.615
    """

    higher_is_better = True
    measure = "unbiased_participation_ratio"


class StableRank(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.stable_rank`, between 1 (collapsed) and ``dim``.

    Example:
        >>> metric = StableRank(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        1.25
    """

    higher_is_better = True
    measure = "stable_rank"


class NESum(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.nesum`, between 1 (collapsed) and ``dim``.

    Example:
        >>> metric = NESum(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        1.25
    """

    higher_is_better = True
    measure = "nesum"


class NumericalRank(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.numerical_rank`, a whole number up to ``dim``.

    Example:
        >>> metric = NumericalRank(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        2.0
    """

    higher_is_better = True
    measure = "numerical_rank"


class SRank(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.srank`, a whole number between 1 (collapsed) and ``dim``.

    Example:
        >>> metric = SRank(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        2.0
    """

    higher_is_better = True
    measure = "srank"


class AlphaReQ(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.alpha_req`: decay exponent of the covariance eigenvalues.

    Example:
        >>> metric = AlphaReQ(dim=64)
        >>> metric.update(torch.diag(torch.arange(1.0, 65.0) ** -1))
        >>> round(metric.compute().item(), 2)
        2.0
    """

    measure = "alpha_req"


class ConditionNumber(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.condition_number`, 1 (isotropic) or more.

    Example:
        >>> metric = ConditionNumber(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        2.0
    """

    higher_is_better = False
    measure = "condition_number"


class Isotropy(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.isotropy` (IsoScore), between 0 (collapsed) and 1.

    Example:
        >>> metric = Isotropy(dim=2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> round(metric.compute().item(), 3)
        0.471
    """

    higher_is_better = True
    measure = "isotropy"
