"""Assignment perplexity: how many of the outputs of a softmax are the largest one of any row."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.registry import register_measure


@lru_cache(maxsize=1024)
def assignment_null(n: int, d: int) -> float:
    r"""Perplexity that ``n`` rows have whose choices among ``d`` are independent and equally likely.

    .. math:: \exp\Bigl(-d\, \mathbb E\bigl[\tfrac{B}{n} \log \tfrac{B}{n}\bigr]\Bigr), \quad B \sim \text{Bin}(n, 1/d)

    Args:
        n: Number of rows.
        d: Number of outputs.

    Returns:
        Between 1 and ``min(n, d)``; NaN for fewer than two rows.

    Example:
        >>> round(assignment_null(64, 64), 1), round(assignment_null(100000, 64), 1)
        (36.3, 64.0)
    """
    if n < 2 or d < 1:
        return math.nan
    if d == 1:
        return 1.0
    entropy, chance = 0.0, 1 / d
    # beyond forty standard deviations there is no probability left in double precision
    mean, reach = n / d, 40 * math.sqrt(n / d) + 40
    for count in range(max(1, int(mean - reach)), min(n, int(mean + reach)) + 1):
        log_probability = (
            math.lgamma(n + 1)
            - math.lgamma(count + 1)
            - math.lgamma(n - count + 1)
            + count * math.log(chance)
            + (n - count) * math.log1p(-chance)
        )
        entropy -= d * math.exp(log_probability) * count / n * math.log(count / n)
    return math.exp(entropy)


@register_measure(
    kind="rows",
    statistic=lambda scores, mask: assignment_counts(scores, mask),
    from_statistic=lambda counts: perplexity(counts),
    range="1 to D",
    collapsed="near 1",
    source="perplexity of the codebook, van den Oord et al., 2017, arXiv 1711.00937",
    null=lambda n, d: assignment_null(n, d),
    sketchable=False,
)
@full_precision
def assignment_perplexity(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Number of clusters, prototypes, codes or experts in use, when every row chooses the one of its largest score.

    .. math:: \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \quad p_k = \tfrac{1}{n} |\{i : \arg\max_j s_{ij} = k\}|

    For layers whose outputs go through a softmax that no target is compared with, such as the prototypes of DINO or
    SwAV and the scores of a router. It knows no temperature. The rows of one batch use fewer than there are, see
    :func:`assignment_null`.

    Args:
        scores: Shape ``(N, D)``. Rows with NaN or infinity are left out.
        mask: Boolean, shape ``(N,)``: rows to count.

    Returns:
        0-dimensional, between 1 (all rows choose the same) and ``D``; 0 without a row.

    Example:
        >>> assignment_perplexity(torch.tensor([[0.1, 2.0], [3.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
        tensor(2.)
    """
    return perplexity(assignment_counts(scores, mask)).to(scores.dtype)


def assignment_counts(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """How many rows choose each output, ``float64`` (``float32`` on devices without) of shape ``(D,)``."""
    counted = scores.isfinite().all(dim=1) if mask is None else scores.isfinite().all(dim=1) & mask
    dtype = torch.float32 if scores.device.type == "mps" else torch.float64
    chosen = torch.where(counted.unsqueeze(1), scores, 0).argmax(dim=1)
    return torch.zeros(scores.shape[1], dtype=dtype, device=scores.device).index_add_(0, chosen, counted.to(dtype))


def perplexity(counts: Tensor) -> Tensor:
    """That of :func:`assignment_counts`, 0-dimensional; 0 where nothing was counted."""
    total = counts.sum()
    shares = counts / total.clamp_min(1)
    entropy = -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum()
    return torch.where(total > 0, entropy.exp(), 0.0)
