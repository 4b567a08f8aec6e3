"""Vector quantization (VQ): nearest codes, gradients past the choice, losses, and codebooks of running means."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_collapse.spectral.precision import full_precision

TILE_ELEMENTS = 1 << 22
"""Most numbers of a tile of distances: it bounds the memory."""
ANTIPODAL, SHORT = 1e-4, 1e-6
"""No rotation is taken below these: the length of the sum of two directions, and that of a row over its code's."""


@torch.no_grad()
@full_precision
def nearest_codes(features: Tensor, codebook: Tensor) -> Tensor:
    r"""Index of the code that is nearest to each row, :math:`\arg\min_k \|z - e_k\|_2`.

    In ``float32`` at least, about the mean of the codes, so that what they have in common cancels before it is rounded;
    in tiles of rows, so that memory does not grow as ``N x K``. Ties go to the first code, rows with NaN anywhere.

    Args:
        features: Shape ``(..., D)``.
        codebook: Shape ``(K, D)``.

    Returns:
        Integers from 0 to ``K - 1``, shape ``(...)``.

    Example:
        >>> nearest_codes(torch.tensor([[0.9, 0.1], [0.2, 0.7]]), torch.eye(2))
        tensor([0, 1])
    """
    center = codebook.mean(dim=0)
    rows = features.reshape(-1, codebook.shape[1]) - center
    codes = (codebook - center).to(rows.dtype)
    half = codes.square().sum(dim=1) / 2
    tiles = torch.split(rows, max(TILE_ELEMENTS // len(codes), 1))
    found = torch.cat([torch.addmm(half, tile, codes.T, alpha=-1).argmin(dim=1) for tile in tiles])
    return found.view(features.shape[:-1])


@full_precision
def rotation_trick(features: Tensor, codes: Tensor) -> Tensor:
    r"""Codes, as what features are rotated and stretched to: the gradient turns with them.

    .. math:: \tilde q = \frac{\|q\|}{\|z\|} R z, \quad
        R = I - 2 w w^\top + 2 \hat q \hat z^\top, \quad w = \frac{\hat z + \hat q}{\|\hat z + \hat q\|}

    with :math:`R` and the ratio of lengths held fixed. The gradient has to :math:`z` the angle that it had to
    :math:`q`, and ``|q| / |z|`` times its length. :math:`R` is never made. Where the two point in opposite directions
    there is no such rotation; there, and where one is zero, the gradient is passed on as it is (straight-through).

    Args:
        features: Shape ``(..., D)``.
        codes: One for each row, of the same shape; no gradient reaches them.

    Returns:
        Exactly the codes, in ``float32`` at least.

    References:
        Fifty et al., *Restructuring Vector Quantization with the Rotation Trick*, ICLR 2025.
        https://arxiv.org/abs/2410.06424, code at https://github.com/cfifty/rotation_trick.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> (rotation_trick(z, torch.tensor([[0.0, 1.0]])) @ torch.tensor([0.0, 1.0])).sum().backward()
        >>> z.grad.round(decimals=4)  # along the code before, along the row now, and half as long
        tensor([[0.5000, 0.0000]])
    """
    row, code = features.detach(), codes.detach()
    length, target = (vector.norm(dim=-1, keepdim=True) for vector in (row, code))
    from_, to = normalize(row, dim=-1, eps=torch.finfo(row.dtype).tiny), normalize(code, dim=-1)
    between = from_ + to
    gap = between.norm(dim=-1, keepdim=True)
    fine = (gap >= ANTIPODAL) & (length > SHORT * target) & (target > 0)
    # what is not chosen must be finite too: its gradient is multiplied by zero
    between = between / gap.clamp_min(ANTIPODAL)
    ratio = torch.where(fine, target / torch.where(fine, length, 1.0), 1.0)

    def along(axis: Tensor) -> Tensor:
        return (features * axis).sum(dim=-1, keepdim=True)

    turned = ratio * (features - 2 * between * along(between) + 2 * to * along(from_))
    moved = torch.where(fine, turned, features)
    return code + (moved - moved.detach())  # exactly the code


@full_precision
def quantization_loss(features: Tensor, codes: Tensor, commitment: float = 0.25, codebook: float = 1.0) -> Tensor:
    r"""Loss that holds features and their codes together.

    .. math:: \beta\, \overline{(z - \operatorname{sg} q)^2} + \alpha\, \overline{(q - \operatorname{sg} z)^2}

    Means are over all numbers. Published pairs: 0.25 and 1 (VQ-VAE, SimVQ); 1 and 0.25 (VQGAN's ``legacy`` code, which
    has them the other way round); a codebook of running means has 0 for the second.

    Args:
        features: Shape ``(..., D)``.
        codes: One for each row, of the same shape.
        commitment: β: weight of what moves the features.
        codebook: α: weight of what moves the codes.

    Returns:
        0-dimensional, in ``float32`` at least; 0 without a row.

    References:
        van den Oord, Vinyals & Kavukcuoglu, *Neural Discrete Representation Learning*, NeurIPS 2017.
        https://arxiv.org/abs/1711.00937

    Example:
        >>> quantization_loss(torch.zeros(1, 2), torch.ones(1, 2))
        tensor(1.2500)
    """
    numbers = max(features.numel(), 1)
    loss = commitment * (features - codes.detach()).square().sum() / numbers
    return loss + codebook * (codes - features.detach()).square().sum() / numbers if codebook else loss


def ema_codes(counts: Tensor, sums: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Codes that are running means of their rows, with Laplace smoothing of the counts.

    .. math:: e_k = m_k / \tilde N_k, \quad \tilde N_k = \frac{N_k + \epsilon}{\sum_j N_j + K \epsilon} \sum_j N_j

    Args:
        counts: Running means :math:`N` of how many rows a step brings to each code, shape ``(K,)``.
        sums: Those :math:`m` of the sums of these rows, shape ``(K, D)``.
        eps: That of VQ-VAE by default.

    Returns:
        Shape ``(K, D)``. A code without rows for long goes to zero.

    References:
        van den Oord et al., 2017, appendix A.1. https://arxiv.org/abs/1711.00937

    Example:
        >>> ema_codes(torch.tensor([1.0, 3.0]), torch.tensor([[2.0], [3.0]]), eps=0.0)
        tensor([[2.],
                [1.]])
    """
    total = counts.sum()
    smoothed = (counts + eps) * (total / (total + len(counts) * eps))
    return sums / smoothed.clamp_min(torch.finfo(sums.dtype).tiny).unsqueeze(1)


def code_expiry(mean: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    r"""Running count below which a code is dead, and the decay that such counts need, by the rows per code and step.

    .. math:: \theta = \min(2, \mu / 10), \quad \gamma' = \max(\gamma, 1 - \mu / 10)

    The usual threshold of 2 rows is more than a code in use gets where there are more than half as many codes as rows:
    all expire at every step. A mean that spans fewer than ten expected rows falls to a tenth of them by chance. A dead
    code is to begin again with a count of :math:`\mu`.

    Args:
        mean: :math:`\mu`: rows of all processes over codes, 0-dimensional.
        decay: :math:`\gamma`: share of the running count that is kept at a step.

    Returns:
        Threshold :math:`\theta` and decay :math:`\gamma'`, 0-dimensional.

    Example:
        >>> threshold, decay = code_expiry(torch.tensor(0.5), decay=0.8)
        >>> round(threshold.item(), 4), round(decay.item(), 4)
        (0.05, 0.95)
    """
    return (mean / 10).clamp_max(2.0), (1 - mean / 10).clamp_min(decay)
