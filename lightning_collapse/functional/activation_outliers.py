"""Activation outliers: how far the largest numbers of a layer are from the others, and what formats lose of them."""

from __future__ import annotations

from functools import lru_cache
from math import erf, erfc, log2, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.entry_moments import EntryMoments
from lightning_collapse.spectral.spectrum import RESOLUTION

OUTLIER = 10.0
"""Root mean squares beyond which a number is an outlier."""
MASSIVE = (100.0, 1000.0)
"""Magnitude, and medians of all magnitudes, beyond which a number is a massive activation."""
E4M3_MAX, E4M3_TIE = 448.0, 2.0**-10
"""Largest number of the 8-bit format ``float8_e4m3fn``, and the largest that it rounds to zero."""


class ActivationOutliers(NamedTuple):
    """Readings of all numbers of a layer, ``x`` of shape ``(n, d)``; 0-dimensional, NaN where there are none.

    Attributes:
        abs_max: Largest magnitude.
        rms: Root mean square.
        crest_factor: Their ratio, at least 1.
        kurtosis: Fourth moment of all numbers about their mean over the square of the second; 3 for a Gaussian.
        neuron_kurtosis: The same ratio, uncentered, of the root mean squares of the ``d`` neurons: 1 if all are
            equal, ``d`` if one has it all.
        max_median_ratio: Largest magnitude of the loudest neuron over that of the median neuron; NaN if that is zero.
        outlier_fraction: Share of the magnitudes beyond ten root mean squares.
        massive: How many magnitudes are beyond 100 and beyond a thousand medians.
        flushed_fraction: Share of the numbers, zeros apart, that become zero in the 8-bit format e4m3 if the largest
            is scaled to its maximum.
    """

    abs_max: Tensor
    rms: Tensor
    crest_factor: Tensor
    kurtosis: Tensor
    neuron_kurtosis: Tensor
    max_median_ratio: Tensor
    outlier_fraction: Tensor
    massive: Tensor
    flushed_fraction: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        """The readings by name."""
        return dict(zip(type(self).__annotations__, self, strict=True))


def activation_outliers(features: Tensor | EntryMoments, mask: Tensor | None = None) -> ActivationOutliers:
    r"""Outliers among the activations of a layer.

    .. math::
        \kappa = \frac{E(x - \mu)^4}{(E(x - \mu)^2)^2}, \qquad
        \kappa_{neuron} = \frac{\frac1d \sum_j r_j^4}{(\frac1d \sum_j r_j^2)^2}, \quad r_j^2 = \frac1n \sum_i x_{ij}^2

    Extremes and moments are exact. Thresholds of the shares and of ``massive`` are resolved by the bins of
    :class:`~lightning_collapse.spectral.EntryMoments`, sixteen per octave, within which magnitudes count as evenly
    spread. Ratios do not change when the layer is multiplied by a constant. ``kurtosis`` sees a single outlier only
    when it is massive: one of ``A`` root mean squares among a million numbers reads
    :math:`(3 + A^4 / 10^6) / (1 + A^2 / 10^6)^2`; ``crest_factor`` is what sees the onset.

    Args:
        features: What the layer returned, shape ``(n, d)``, or the statistics of a stream of it. Rows with NaN or
            infinity do not count.
        mask: Boolean, shape ``(n,)``: rows to count, for instance tokens that are not padding.

    Returns:
        Nine readings, at least ``float32``.

    Raises:
        ValueError: If ``features`` is no matrix.

    References:
        He et al., *Understanding and minimising outlier features in transformer training*, NeurIPS 2024,
        https://arxiv.org/abs/2405.19279, for the kurtosis over neurons; Sun et al., *Massive activations in large
        language models*, COLM 2024, https://arxiv.org/abs/2402.17762, for the massive ones. That zeros do not count
        as flushed is our choice.

    Example:
        >>> found = activation_outliers(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        >>> found.abs_max, found.kurtosis, found.neuron_kurtosis
        (tensor(1., dtype=torch.float64), tensor(1., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    moments = features if isinstance(features, EntryMoments) else _moments_of(features, mask)
    known, n, dim = moments.count > 0, moments.entries.clamp_min(1), len(moments.squares)
    abs_max, energy = moments.largest.max(), moments.squares.sum()
    rms = (energy / n).sqrt()
    _, second, _, fourth = (moments.about(moments.mean) / n).unbind()
    # of a constant only rounding is left
    varies = second > (RESOLUTION * moments.mean).square()
    loudest = moments.largest.sort().values
    middle = (loudest[(dim - 1) // 2] + loudest[dim // 2]) / 2
    massive = torch.maximum(MASSIVE[1] * moments.quantile(0.5), torch.full_like(abs_max, MASSIVE[0]))
    everything = torch.full_like(abs_max, torch.inf)
    readings = (
        abs_max,
        rms,
        abs_max / rms,
        torch.where(varies, fourth / second.square(), torch.nan),
        dim * moments.squares.square().sum() / energy.square(),
        torch.where(middle > 0, loudest[-1] / middle, torch.nan),
        (moments.below(everything) - moments.below(OUTLIER * rms)) / n,
        (moments.below(everything) - moments.below(massive)).round(),
        moments.below(abs_max * (E4M3_TIE / E4M3_MAX)) / n,
    )
    return ActivationOutliers(*(torch.where(known, reading, torch.nan) for reading in readings))


def headroom_bits(abs_max: Tensor, format: torch.dtype | float) -> Tensor:
    r"""How often a layer's largest magnitude may double before it overflows: :math:`\log_2(\text{max} / |x|_{max})`.

    Args:
        abs_max: Largest magnitude, any shape.
        format: The format, or its largest number: 65,504 of ``float16``, 57,344 of ``float8_e5m2``, 448 of
            ``float8_e4m3fn``, 3.4e38 of ``bfloat16``.

    Returns:
        Same shape; below 1 the next doubling overflows, infinite for a layer of zeros.

    Example:
        >>> headroom_bits(torch.tensor([1.0, 32752.0]), torch.float16).round(decimals=3)
        tensor([15.9990,  1.0000])
    """
    largest = torch.finfo(format).max if isinstance(format, torch.dtype) else format
    return log2(largest) - abs_max.log2()


@lru_cache(maxsize=4096)
def expected_crest_factor(entries: int) -> float:
    r"""Mean of the largest magnitude of so many independent standard normals: the null of ``crest_factor``.

    .. math:: E \max |x| = \int_0^\infty 1 - \operatorname{erf}(t / \sqrt 2)^N \, dt

    Args:
        entries: Their number ``N``, at least 1.

    Raises:
        ValueError: If ``entries`` is not positive.

    Example:
        >>> [round(expected_crest_factor(n), 2) for n in (1, 10**5, 10**6, 10**7)]
        [0.8, 4.53, 5.0, 5.43]
    """
    if entries < 1:
        raise ValueError(f"`entries` must be at least 1, got {entries}.")
    t = torch.arange(0, 40 * 64, dtype=torch.float64) / 64 + 1 / 128
    return float((1 - (entries * torch.log1p(-torch.special.erfc(t / sqrt(2)))).exp()).sum() / 64)


def outlier_nulls(n: int, d: int) -> dict[str, float]:
    r"""What independent normals of one variance read, by the name of the reading: means, but for the ratio of extremes.

    ``neuron_kurtosis`` is :math:`d (n + 2) / (n d + 2)` and ``kurtosis`` :math:`3 (N - 1) / (N + 1)` of :math:`N = n d`
    numbers, both exactly; ``max_median_ratio`` has the mean of the extreme of all over the median of that of one
    neuron.

    Args:
        n: Rows.
        d: Neurons.

    Returns:
        All readings that do not depend on the unit; empty without rows.

    Example:
        >>> nulls = outlier_nulls(2048, 512)
        >>> round(nulls["crest_factor"], 2), round(nulls["kurtosis"], 3), round(nulls["neuron_kurtosis"], 3)
        (5.01, 3.0, 1.001)
    """
    entries = n * d
    if not entries:
        return {}
    crest = expected_crest_factor(entries)
    of_one = sqrt(2) * float(torch.erfinv(torch.tensor(0.5, dtype=torch.float64) ** (1 / n)))
    return {
        "crest_factor": crest,
        "kurtosis": 3 * (entries - 1) / (entries + 1),
        "neuron_kurtosis": d * (n + 2) / (entries + 2),
        "max_median_ratio": crest / of_one,
        "outlier_fraction": erfc(OUTLIER / sqrt(2)),
        "massive": 0.0,
        "flushed_fraction": erf(crest * E4M3_TIE / E4M3_MAX / sqrt(2)),
    }


def _moments_of(features: Tensor, mask: Tensor | None) -> EntryMoments:
    if features.ndim != 2:
        raise ValueError(f"`features` must have shape (n, d), got {tuple(features.shape)}. Flatten tokens first.")
    moments = EntryMoments(features.shape[1], features.device)
    moments.update(features, mask)
    return moments
