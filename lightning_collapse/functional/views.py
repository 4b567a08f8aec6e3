"""Retrieval between two views (recall@1): whether a representation still tells samples apart."""

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.registry import register_measure


@register_measure(
    kind="pairs",
    range="0 to 1",
    collapsed="near 1 / N",
    source="nearest neighbor between views, by cosine",
    null=lambda n, d: 1 / n,
)
@full_precision
def recall_at_1(x: Tensor, y: Tensor) -> Tensor:
    r"""Share of first views whose nearest second view, by cosine, is their own.

    .. math:: \frac{1}{N} \sum_i \frac{[s_{ii} = \max_j s_{ij}]}{|\{j : s_{ij} = s_{ii}\}|},
        \quad s_{ij} = \frac{x_i \cdot y_j}{\|x_i\| \|y_j\|}

    No rank sees a partial collapse whose lost directions are filled with noise; this does. Chance is ``1 / N``, which
    constant features read exactly, since ties count as one over their number. It falls as ``N`` grows: compare at the
    same ``N`` only. Its standard error is that of a binomial share.

    Args:
        x: First views, shape ``(..., N, D)``, real. Pairs with NaN or infinity or a zero row are left out.
        y: Second views of the same samples, likewise.

    Returns:
        Shape ``(...)``, between 0 and 1; NaN without a pair.

    Raises:
        ValueError: If the shapes differ or have fewer than two dimensions.

    Example:
        >>> x = torch.eye(4)
        >>> recall_at_1(x, x), recall_at_1(torch.ones(4, 3), torch.ones(4, 3))
        (tensor(1.), tensor(0.2500))
    """
    if x.shape != y.shape or x.ndim < 2:
        raise ValueError(f"`x` and `y` are views of the same rows, got shapes {tuple(x.shape)} and {tuple(y.shape)}.")
    hits, counts = _hits(*_units(x, y))
    return torch.where(counts > 0, hits / counts.clamp_min(1), torch.nan).to(x.dtype)


@full_precision
def view_statistics(x: Tensor, y: Tensor) -> Tensor:
    """What adds up over batches and processes of two views of the same rows.

    Args:
        x: First views, shape ``(..., N, D)``, real. Pairs with NaN or infinity are left out.
        y: Second views, likewise.

    Returns:
        ``float64`` (``float32`` on devices without) of shape ``(..., 5)``: pairs; those found again, see
        :func:`recall_at_1`; how many chance finds; the sum of the squared distances on the unit sphere; and the
        uniformity of the first views times the pairs (Wang & Isola, 2020, arXiv 2005.10242).

    Example:
        >>> x = torch.eye(4)
        >>> view_statistics(x, x)[:4].tolist()
        [4.0, 4.0, 1.0, 0.0]
    """
    first, second, weight = _units(x, y)
    hits, counts = _hits(first, second, weight)
    apart = ((first - second).square().sum(dim=-1) * weight).sum(dim=-1)
    others = weight.unsqueeze(-1) * weight.unsqueeze(-2) * (1 - torch.eye(x.shape[-2]).to(weight))
    potential = (4 * (first @ first.mT - 1)).clamp_max(0).masked_fill(others == 0, -torch.inf)
    uniform = potential.flatten(-2).logsumexp(dim=-1) - (counts * (counts - 1)).clamp_min(1).log()
    found = torch.stack([counts, hits, (counts > 0).to(counts), apart, counts * uniform], dim=-1)
    return torch.where(counts.unsqueeze(-1) > 1, found, 0.0)


def _units(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of unit length, zero where a pair does not count, and which do."""
    whole = (x.isfinite() & y.isfinite()).all(dim=-1) & (x != 0).any(dim=-1) & (y != 0).any(dim=-1)
    # rows in a narrow cone differ by less than single precision tells
    first, second = (torch.where(whole.unsqueeze(-1), v, 0).to(accumulation_dtype(v.device)) for v in (x, y))
    # of huge rows the square would overflow
    first, second = (v / torch.where(whole, v.abs().amax(dim=-1), 1).unsqueeze(-1) for v in (first, second))
    unit = torch.nn.functional.normalize
    return unit(first, dim=-1), unit(second, dim=-1), whole.to(first.dtype)


def _hits(first: Tensor, second: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows found again, ties by their number, and rows that count."""
    cosine = (first @ second.mT).masked_fill(weight.unsqueeze(-2) == 0, -torch.inf)
    nearer = cosine - cosine.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    rounding = 16 * torch.finfo(cosine.dtype).eps
    found = ((nearer > rounding).sum(dim=-1) == 0) * weight / (nearer.abs() <= rounding).sum(dim=-1).clamp_min(1)
    return found.sum(dim=-1), weight.sum(dim=-1)
