"""Low-pass gain of attention: how much of what differs between tokens a map lets through."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of

STEPS = 20
_WIDEST = 1.0  # beyond this spread single weights are heavy-tailed, and no law for their norm holds


@torch.no_grad()
@full_precision
def low_pass_gain(
    weights: Tensor, counts: Tensor | None = None, steps: int = STEPS, center: Literal["queries", "keys"] = "queries"
) -> Tensor:
    r"""Spectral norm of an attention map without the mean over its queries.

    .. math:: g = \|(I - J) A\|_2, \quad J = \tfrac1n \mathbf 1 \mathbf 1^\top

    Rows of :math:`A` sum to one, so it is also :math:`\|(I - J) A (I - J)\|_2`: the largest factor by which a layer of
    attention without skips may stretch what tells tokens apart. In encoders it falls with the length of the text, and
    long texts end up alike. **For bidirectional attention**: causal maps exceed 1, the more the longer they are (1.12
    for uniform weights over 32 keys, 1.55 over 1,024), and say nothing so.

    By power iteration, which approaches the norm from below: twenty steps read 1 % low where all singular values are
    alike (independent logits, 512 keys), and are exact where one leads.

    Args:
        weights: Maps, shape ``(..., n, n)``, rows that sum to one.
        counts: Boolean, broadcasts to ``(..., n)``: tokens that count, as queries and as keys; all by default.
        steps: Of the iteration, two matrix-vector products each.
        center: ``"keys"`` reads :math:`\|A (I - J)\|_2` instead, the gain :math:`\mu` of mean-mode diagnosis [2], which
            is nearly the same of bidirectional maps, and does not center what leaves.

    Returns:
        Shape ``(...)``, 0 (all queries look alike) or more; NaN where the map holds NaN or infinity.

    Raises:
        ValueError: If ``weights`` are not square, or ``center`` is another word.

    References:
        Zhou et al., *Length-Induced Embedding Collapse in PLM-based Models*, ACL 2025.
        https://arxiv.org/abs/2410.24200; [2] Lu, *Mean mode screaming*, 2026, https://arxiv.org/abs/2605.06169.

    Example:
        >>> low_pass_gain(torch.eye(4)), low_pass_gain(torch.ones(4, 4) / 4)
        (tensor(1.), tensor(0.))
    """
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"`weights` must be square maps (..., n, n), got {tuple(weights.shape)}.")
    require_one_of(("queries", "keys"), center=center)
    counted = torch.ones_like(weights[..., 0, :]) if counts is None else counts.to(weights).expand(weights.shape[:-1])
    rows = counted.unsqueeze(-1)
    if counts is not None:
        weights = weights.where((rows * rows.mT) > 0, 0.0)  # a factor would keep the NaN of padding
    number = rows.sum(dim=-2, keepdim=True).clamp_min(1)
    weights = weights if center == "queries" else weights.mT  # of A (I - J) the transpose has the same norm
    # a fixed start with all frequencies in it: no random number is drawn
    start = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
    vector = (start.square() * 1.7 + 0.3).cos().unsqueeze(-1).expand(*weights.shape[:-1], 1) * rows
    tiny = torch.finfo(weights.dtype).tiny
    for _ in range(steps):
        vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(tiny)
        vector = weights.mT @ _centered(weights @ vector, rows, number)
    vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(tiny)
    gain: Tensor = torch.linalg.vector_norm(_centered(weights @ vector, rows, number), dim=(-2, -1))
    return gain


def low_pass_gain_null(spread: Tensor, number: Tensor) -> Tensor:
    r"""What :func:`low_pass_gain` reads of independent Gaussian logits: :math:`2 \sqrt{e^{s^2} - 1} / \sqrt n`.

    The edge of the Marchenko-Pastur law for entries of variance :math:`(e^{s^2} - 1) / n^2`. One map scatters by 6 %
    about it at 32 keys and by 1 % at 512; average over heads and samples.

    Args:
        spread: Standard deviation :math:`s` of the logits, any shape.
        number: Tokens :math:`n`, broadcasts to it.

    Returns:
        Positive; NaN for a spread above 1, where weights have heavy tails and no such law holds.

    Example:
        >>> low_pass_gain_null(torch.tensor([0.5, 2.0]), torch.tensor(1024.0))
        tensor([0.0333,    nan])
    """
    null = 2 * (spread.square().expm1() / number).sqrt()
    return null.where(spread <= _WIDEST, torch.nan)


def _centered(columns: Tensor, rows: Tensor, number: Tensor) -> Tensor:
    return (columns - (columns * rows).sum(dim=-2, keepdim=True) / number) * rows
