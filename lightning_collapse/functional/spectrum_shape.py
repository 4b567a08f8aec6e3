"""Spectrum shape: decay exponent, condition number, isotropy and top share, how energy spreads over directions."""

import torch
from torch import Tensor

from lightning_collapse.functional.rank import participation_ratio
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.spectrum import Spectrum, values_of
from lightning_collapse.utilities.registry import register_measure


@register_measure(
    range="1 / min(n - 1, d) to 1",
    collapsed="near 1",
    source="explained-variance ratio of the first principal component",
)
@full_precision
def top_k_share(singular_values: Tensor | Spectrum, k: int = 1) -> Tensor:
    r"""Share of the variance in the ``k`` leading directions, :math:`\sum_{i \le k} \lambda_i / \sum_i \lambda_i`.

    Args:
        singular_values: Of centered features, descending, shape ``(..., K)``, or a ``Spectrum`` record.
        k: How many directions; the curve shows one.

    Returns:
        Shape ``(...)``, between ``k / K`` (isotropic) and 1 (nothing outside those directions); 0 for an all-zero
        spectrum.

    Example:
        >>> top_k_share(torch.tensor([3.0, 1.0, 0.0]), k=1)
        tensor(0.9000)
    """
    values = values_of(singular_values)
    energy = (values / values.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)).square()
    return energy[..., :k].sum(dim=-1) / energy.sum(dim=-1).clamp_min(torch.finfo(values.dtype).tiny)


@register_measure(
    record=True, range="1 to infinity", collapsed="large", source="largest over smallest", sketchable=False
)
@full_precision
def condition_number(singular_values: Tensor | Spectrum) -> Tensor:
    r"""Largest over smallest singular value, :math:`\sigma_1 / \sigma_K`.

    From features singular values are known down to about 1e-7 of the largest; below that it is infinite.

    Args:
        singular_values: Descending, shape ``(..., K)``, or a ``Spectrum`` record; then the smallest value that ``n``
            centered rows can have counts, not the zeros beyond it.

    Returns:
        Shape ``(...)``, at least 1; infinite if the smallest value is zero, 0 for an all-zero spectrum.

    Example:
        >>> condition_number(torch.tensor([4.0, 2.0, 1.0]))
        tensor(4.)
    """
    values = values_of(singular_values)
    largest, smallest = values[..., 0], values[..., -1]
    if isinstance(singular_values, Spectrum):
        last = (singular_values.count - 1).clamp(1, values.shape[-1]).long() - 1
        smallest = values.gather(-1, last.unsqueeze(-1)).squeeze(-1)
    invertible = smallest != 0
    ratio = largest / torch.where(invertible, smallest, 1.0)
    ratio = torch.where(invertible, ratio, torch.where(largest > 0, torch.inf, largest))
    return torch.where(values.isnan().any(dim=-1), torch.nan, ratio)


@register_measure(
    sketchable=False,
    record=True,
    range="0 to 1",
    collapsed="near 0",
    source="IsoScore: Rudman et al., ACL 2022, arXiv 2108.07344",
)
@full_precision
def isotropy(singular_values: Tensor | Spectrum) -> Tensor:
    r"""IsoScore: the share of the dimensions of the space that is used evenly.

    The paper normalizes the covariance eigenvalues to :math:`\hat\lambda = \sqrt{d} \lambda / \|\lambda\|`, takes the
    defect :math:`\delta = \|\hat\lambda - 1\| / \sqrt{2 (d - \sqrt d)}` and rescales
    :math:`\varphi = (d - \delta^2 (d - \sqrt d))^2 / d^2` to :math:`(d \varphi - 1) / (d - 1)`. Because
    :math:`\|\hat\lambda - 1\|^2 = 2 d - 2 \sqrt{d \operatorname{PR}}`, that is

    .. math:: \frac{\operatorname{PR} - 1}{d - 1}

    with the :func:`participation_ratio` PR.

    Args:
        singular_values: Of centered features, shape ``(..., K)`` with ``K = d``, or a ``Spectrum`` record, which knows
            ``d`` also where there are fewer rows.

    Returns:
        Shape ``(...)``, between 0 (one direction) and 1 (isotropic); 0 for an all-zero spectrum.

    References:
        Rudman et al., *IsoScore: Measuring the Uniformity of Embedding Space Utilization*, Findings of ACL 2022.
        https://arxiv.org/abs/2108.07344

    Example:
        >>> isotropy(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        tensor(0.6667)
    """
    dim = singular_values.dim if isinstance(singular_values, Spectrum) else singular_values.shape[-1]
    return ((participation_ratio(singular_values) - 1) / max(dim - 1, 1)).clamp_min(0)


@register_measure(
    range="0 to infinity; near 1 is said to generalize best",
    collapsed="large",
    source="Agrawal et al., NeurIPS 2022, arXiv 2202.05808",
    sketchable=False,
    key="alpha_req_4_100",
)
@full_precision
def alpha_req(singular_values: Tensor | Spectrum, first: int = 4, last: int = 100) -> Tensor:
    r"""Decay exponent of the covariance eigenvalues, :math:`\lambda_i \propto i^{-\alpha}`.

    Least squares of :math:`\log \lambda_i` on :math:`-\log i` with weights :math:`1 / i`, as in the authors' code.
    The paper does not fix the range; its code uses several, most often ranks 4 to 100, so the range is part of the
    curve's name. Eigenvalues
    below :math:`\lambda_1 K \epsilon` (of ``float32``) are rounding noise: the fit ends before the first of them. It is
    biased low for few rows: about 0.9 of a true 1 at ``n = 200``, ``d = 512``.

    Args:
        singular_values: Of centered features, descending, shape ``(..., K)``, or a ``Spectrum`` record.
        first: First rank of the fit, counted from 1.
        last: Last rank of the fit; the spectrum's end if that comes sooner.

    Returns:
        Shape ``(...)``; near 0 for isotropic features, large where few directions are left, NaN with fewer than three
        eigenvalues to fit.

    References:
        Agrawal et al., *alpha-ReQ: Assessing Representation Quality in Self-Supervised Learning by measuring
        eigenspectrum decay*, NeurIPS 2022.

    Example:
        >>> alpha_req(torch.arange(1.0, 65.0) ** -0.65)  # eigenvalues i ** -1.3
        tensor(1.3000)
    """
    return _power_law(singular_values, first, last)[0]


@register_measure(
    range="0 to 1",
    collapsed="does not tell",
    source="weighted R2 of the alpha_req fit",
    sketchable=False,
    key="alpha_req_fit_4_100",
)
@full_precision
def alpha_req_fit(singular_values: Tensor | Spectrum, first: int = 4, last: int = 100) -> Tensor:
    r"""How well a power law describes the spectrum: weighted :math:`R^2` of the fit behind :func:`alpha_req`.

    Args:
        singular_values: As in :func:`alpha_req`.
        first: As in :func:`alpha_req`.
        last: As in :func:`alpha_req`.

    Returns:
        Shape ``(...)``, at most 1 (a perfect power law); NaN with fewer than three eigenvalues to fit.

    Example:
        >>> alpha_req_fit(torch.arange(1.0, 65.0) ** -0.65)
        tensor(1.)
    """
    return _power_law(singular_values, first, last)[1]


def _power_law(singular_values: Tensor | Spectrum, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Weighted least squares; returns the exponent and the weighted R2."""
    values = values_of(singular_values)
    if not 1 <= first < last - 1:
        raise ValueError(f"`first` and `last` must span three ranks or more, counted from 1, got {first} and {last}.")
    if values.device.type != "mps":
        values = values.double()
    size = values.shape[-1]
    energy = (values / values.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)).square()
    rank = torch.arange(1, size + 1, device=values.device, dtype=values.dtype)
    present = (values > 0).sum(dim=-1, keepdim=True)  # not K: a Gram matrix may bring zeros beyond min(n, d)
    usable = (energy > present * torch.finfo(torch.float32).eps) & (rank >= first) & (rank <= last)
    weight = usable / rank
    total = weight.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    x = -rank.log()
    y = torch.where(usable, energy.clamp_min(torch.finfo(values.dtype).tiny).log(), 0.0)
    x = x - (weight * x).sum(dim=-1, keepdim=True) / total
    y = y - (weight * y).sum(dim=-1, keepdim=True) / total
    tiny = torch.finfo(values.dtype).tiny
    slope = (weight * x * y).sum(dim=-1) / (weight * x * x).sum(dim=-1).clamp_min(tiny)
    residual = (weight * (y - slope.unsqueeze(-1) * x).square()).sum(dim=-1)
    spread = (weight * y.square()).sum(dim=-1)
    # a flat spectrum is a perfect power law of exponent zero, not 0 / 0
    fit = torch.where(spread > 1e-20, 1 - residual / spread.clamp_min(1e-20), torch.ones_like(spread))
    enough = (usable.sum(dim=-1) >= 3) & ~values.isnan().any(dim=-1)
    dtype = values_of(singular_values).dtype
    return torch.where(enough, slope, torch.nan).to(dtype), torch.where(enough, fit, torch.nan).to(dtype)
