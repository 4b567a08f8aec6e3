"""Streaming measures of rank, each a function of the streaming :class:`~lightning_collapse.metrics.Spectrum`."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_collapse import functional as F  # noqa: N812
from lightning_collapse.metrics.spectrum import Spectrum
from lightning_collapse.spectral.spectrum import Spectrum as SpectrumRecord


class SpectralMetric(Spectrum):
    """Streaming form of one measure of a spectrum; a subclass names the measure.

    As input to ``update``: features of shape ``(N, dim)``, any floating dtype, and an optional boolean mask ``(N,)``.
    As output of ``compute``: the measure of all rows seen on all processes, 0-dimensional, ``float64``.

    Args:
        dim: Number of features ``D``.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    measure: ClassVar[Callable[[SpectrumRecord], Tensor]]
    centered: ClassVar[bool] = True

    def __init__(self, dim: int, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(dim, self.centered, dtype, **kwargs)

    def compute(self) -> Tensor:
        """The measure of everything seen so far."""
        return type(self).measure(self.record())


class EffectiveRank(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.effective_rank`, between 1 (collapsed) and ``dim``.

    Example:
        >>> metric = EffectiveRank(dim=2)
        >>> metric.update(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    higher_is_better = True
    measure = staticmethod(F.effective_rank)


class RankMe(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.rankme`, between 1 (collapsed) and ``dim``; not centered."""

    higher_is_better = True
    centered = False
    measure = staticmethod(F.rankme)


class EigenvalueEffectiveRank(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.eigenvalue_effective_rank`, between 1 (collapsed) and ``dim``."""

    higher_is_better = True
    measure = staticmethod(F.eigenvalue_effective_rank)


class ParticipationRatio(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.participation_ratio`, between 1 (collapsed) and ``dim``."""

    higher_is_better = True
    measure = staticmethod(F.participation_ratio)


class UnbiasedParticipationRatio(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.unbiased_participation_ratio`, from 1 (collapsed) to ``dim``."""

    higher_is_better = True
    measure = staticmethod(F.unbiased_participation_ratio)


class StableRank(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.stable_rank`, between 1 (collapsed) and ``dim``."""

    higher_is_better = True
    measure = staticmethod(F.stable_rank)


class NESum(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.nesum`, between 1 (collapsed) and ``dim``."""

    higher_is_better = True
    measure = staticmethod(F.nesum)


class NumericalRank(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.numerical_rank`, a whole number up to ``dim``."""

    higher_is_better = True
    measure = staticmethod(F.numerical_rank)


class SRank(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.srank`, a whole number between 1 (collapsed) and ``dim``."""

    higher_is_better = True
    measure = staticmethod(F.srank)


class AlphaReQ(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.alpha_req`: decay exponent of the covariance eigenvalues."""

    measure = staticmethod(F.alpha_req)


class ConditionNumber(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.condition_number`, 1 (isotropic) or more."""

    higher_is_better = False
    measure = staticmethod(F.condition_number)


class Isotropy(SpectralMetric):
    """Streaming :func:`~lightning_collapse.functional.isotropy` (IsoScore), between 0 (collapsed) and 1."""

    higher_is_better = True
    measure = staticmethod(F.isotropy)
