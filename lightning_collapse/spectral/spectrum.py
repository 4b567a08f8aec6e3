"""Spectra of feature matrices, by the cheaper side and in double precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_collapse.spectral.eigenvalues import eigenvalues, safe_sqrt
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows

RESOLUTION = torch.finfo(torch.float32).eps
"""A feature whose standard deviation is below this share of its mean is constant."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a feature matrix, or of several of one shape, with what some measures need to know besides.

    Attributes:
        singular_values: Descending, shape ``(..., K)``.
        count: Number of rows behind them, shape ``(...)``.
        dim: Number of features ``D``.
        kurtosis: Sum of the fourth powers of the centered norms over the square of the sum of their squares,
            shape ``(...)``; ``None`` if the features were not centered.
        mean: Mean row, shape ``(..., D)``; ``None`` if the features were not centered.
        variance: Variance of every feature, shape ``(..., D)``; ``None`` if the features were not centered.
        sketched: Whether ``D`` is the width of a random Gaussian projection of wider features.

    Example:
        >>> record = spectrum_of(torch.ones(4, 2))
        >>> record.singular_values, record.count, record.dim
        (tensor([0., 0.], dtype=torch.float64), tensor(4., dtype=torch.float64), 2)
    """

    singular_values: Tensor
    count: Tensor
    dim: int
    kurtosis: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    sketched: bool = False


def singular_values(features: Tensor, center: bool = True) -> Tensor:
    """Singular values of a feature matrix, in descending order; differentiable, and never raising on bad numbers.

    From the eigenvalues of the smaller Gram matrix in ``float64``: an order of magnitude faster than an SVD when one
    side is short, and right down to about 1e-7 of the largest one; what is smaller is zero.

    Args:
        features: Representations, shape ``(N, D)``. Rows with NaN or infinity are left out.
        center: Subtract the mean over ``N`` first, so that ``s**2 / (N - 1)`` are covariance eigenvalues.

    Returns:
        Shape ``(min(N, D),)``, at least ``float32``.

    Raises:
        ValueError: If ``features`` is not a matrix.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), center=False)
        tensor([3., 2.])
    """
    return spectrum_of(features, center).singular_values.to(torch.promote_types(features.dtype, torch.float32))


def spectrum_of(features: Tensor, center: bool = True, mask: Tensor | None = None) -> Spectrum:
    """The full :class:`Spectrum` record of a feature matrix; see :func:`singular_values`.

    Args:
        features: Shape ``(N, D)``.
        center: Subtract the mean first.
        mask: Boolean, shape ``(N,)``: rows to count.

    Raises:
        ValueError: If ``features`` is not a matrix.

    Example:
        >>> record = spectrum_of(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]))
        >>> record.singular_values, record.count
        (tensor([4., 2.], dtype=torch.float64), tensor(4., dtype=torch.float64))
    """
    if features.ndim != 2:
        raise ValueError(
            f"`features` must have shape (N, D), got {tuple(features.shape)}. Flatten tokens or pool maps first."
        )
    gram, record = gram_of(features, center, mask)
    return finish_spectrum(eigenvalues(gram), record)


@full_precision
def gram_of(features: Tensor, center: bool = True, mask: Tensor | None = None) -> tuple[Tensor, Spectrum]:
    """The smaller Gram matrix of the rows that count, of moderate scale, and an unfinished record.

    Of features ``(..., N, D)``, with a mask ``(..., N)``: layers of one shape are taken together. The record holds the
    scale where the singular values will be. A feature that varies by less than the rounding of ``float32`` at its mean
    is constant: without that rule rows that are equal but for rounding have a spectrum of noise, which looks healthy.
    """
    dtype = accumulation_dtype(features.device)
    rows, _, weight = finite_rows(features, mask, dtype)
    count = weight.sum(dim=-1)
    scale = torch.ones_like(count)
    if features.dtype == dtype and rows.numel():  # fourth powers of narrower dtypes fit, of this one they may not
        scale = rows.detach().abs().amax(dim=(-2, -1)).clamp_min(torch.finfo(dtype).tiny)
        rows = rows / scale[..., None, None]
    record = Spectrum(scale, count, features.shape[-1])
    if center:
        mean = rows.sum(dim=-2) / count.clamp_min(1).unsqueeze(-1)
        rows.addcmul_(weight.unsqueeze(-1), mean.unsqueeze(-2), value=-1)
        scatter = rows.square().sum(dim=-2)
        varies = scatter > count.unsqueeze(-1) * (RESOLUTION * mean).square()
        rows = rows * varies.unsqueeze(-2) if rows.requires_grad else rows.mul_(varies.unsqueeze(-2))
        energy = torch.linalg.vector_norm(rows, dim=-1).square()
        kurtosis = relative_to_square(energy.square().sum(dim=-1), energy.sum(dim=-1))
        variance = scatter * varies * (scale.square() / (count - 1).clamp_min(1)).unsqueeze(-1)
        record = replace(record, kurtosis=kurtosis, mean=mean * scale.unsqueeze(-1), variance=variance)
    gram = rows @ rows.mT if rows.shape[-2] < rows.shape[-1] else rows.mT @ rows
    return gram, record


def uncentered(gram: Tensor, record: Spectrum) -> tuple[Tensor, Spectrum]:
    """What :func:`gram_of` makes of the rows as they are, from a Gram matrix ``(..., D, D)`` of the centered ones."""
    assert record.mean is not None  # of centered rows
    mean = record.mean * (record.count.sqrt() / record.singular_values).unsqueeze(-1)
    raw = replace(record, kurtosis=None, mean=None, variance=None)
    return gram + mean.unsqueeze(-1) * mean.unsqueeze(-2), raw


def finish_spectrum(values: Tensor, record: Spectrum) -> Spectrum:
    """Put the eigenvalues of the matrix that :func:`gram_of` made into its record.

    ``n`` rows have ``n`` singular values, ``n - 1`` once centered; what the solver returns beyond them, and below the
    rounding of the largest, is noise and set to zero.
    """
    size = values.shape[-1]
    ceiling = record.count - int(record.kurtosis is not None)
    exists = torch.arange(size, device=values.device) < ceiling.unsqueeze(-1)
    values = values * (exists & (values > size * torch.finfo(values.dtype).eps * values[..., :1]))
    return replace(record, singular_values=safe_sqrt(values) * record.singular_values.unsqueeze(-1))


def relative_to_square(quartic: Tensor, energy: Tensor) -> Tensor:
    """``quartic / energy ** 2``, and zero of nothing."""
    return quartic / energy.square().clamp_min(torch.finfo(energy.dtype).tiny)


def values_of(spectrum: Tensor | Spectrum) -> Tensor:
    """The singular values of a record, or the tensor itself: at least ``float32``, and a zero where there is none."""
    values = spectrum.singular_values if isinstance(spectrum, Spectrum) else spectrum
    if not values.shape[-1]:  # of no rows, or no features
        values = values.new_zeros(*values.shape[:-1], 1)
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
