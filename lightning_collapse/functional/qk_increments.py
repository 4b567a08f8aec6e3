"""Query-key increments: how the matrix that makes a head's logits has moved, split by its order in the step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.rank import eigenvalue_effective_rank, stable_rank
from lightning_collapse.spectral.precision import full_precision


class Increment(NamedTuple):
    """Readings of one increment; every field has the leading shape ``(...)`` of the weights.

    Attributes:
        norm: Frobenius norm, 0 or more.
        stable_rank: Squared Frobenius over squared spectral norm; 0 where nothing moved.
        effective_rank: Exponential of the entropy of squared singular values; 0 where nothing moved.

    Example:
        >>> query = key = torch.eye(3, 2)
        >>> qk_increments(query, key, 1.5 * query, key).delta2.norm
        tensor(0.7071)
    """

    norm: Tensor
    stable_rank: Tensor
    effective_rank: Tensor


class QKIncrements(NamedTuple):
    """How far ``W_q W_k^T`` of heads has moved.

    Attributes:
        delta2: Of first order in the step, of rank ``2 d_k`` at most.
        delta3: Of second order, of rank ``d_k`` at most.
    """

    delta2: Increment
    delta3: Increment


@torch.no_grad()
@full_precision
def qk_increments(query_before: Tensor, key_before: Tensor, query_after: Tensor, key_after: Tensor) -> QKIncrements:
    r"""Size and rank of the increments of first and second order of a head's query-key product.

    With :math:`dW` the difference of a weight and its earlier value :math:`W`,

    .. math:: \Delta_2 = dW_q W_k^\top + W_q\, dW_k^\top, \quad \Delta_3 = dW_q\, dW_k^\top, \quad
        W_q' W_k'^\top - W_q W_k^\top = \Delta_2 + \Delta_3

    A numerical fault shows as updates that agree from step to step: the increments of a faulty run part from those of
    a healthy one. That they have low rank is no fault: healthy ones have it. Both are factored,
    :math:`\Delta_2 = [dW_q, W_q] [W_k, dW_k]^\top`, so singular values are those of a core of width :math:`2 d_k` from
    the QR decompositions of its factors: :math:`O(d\, d_k^2)` a head, and no ``d x d`` matrix.

    Give master weights in single precision. A difference of ``bfloat16`` weights is rounding: a step of rank one reads
    an effective rank of 40 where it is a thousandth of the weight. Gains of norms between projection and product
    belong into the weights.

    Args:
        query_before: Shape ``(..., d, d_k)``: columns are the outputs of one head, the transpose of rows of
            ``nn.Linear.weight``.
        key_before: Likewise; of grouped queries the head that they share.
        query_after: The same weight later.
        key_after: The same weight later.

    Returns:
        Readings of shape ``(...)``. Of Gaussian weights and steps with ``d = 256``, ``d_k = 64`` effective ranks are 81
        and 50, and stable ranks 30 of first order.

    Raises:
        ValueError: If shapes differ or are no matrices.

    References:
        arXiv 2606.28116, from an independent reading of it. https://arxiv.org/abs/2606.28116

    Example:
        >>> query, key, step = torch.eye(4, 2), torch.eye(4, 2), torch.tensor([[0.1, 0.0]] + 3 * [[0.0, 0.0]])
        >>> found = qk_increments(query, key, query + step, key)
        >>> found.delta2.norm, found.delta2.effective_rank, found.delta3.norm
        (tensor(0.1000), tensor(1.), tensor(0.))
    """
    weights = query_before, key_before, query_after, key_after
    if len({weight.shape for weight in weights}) > 1 or query_before.ndim < 2:
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise ValueError(f"All four weights must have one shape (..., d, d_k), got {shapes}.")
    query_step, key_step = query_after - query_before, key_after - key_before
    first = torch.cat([query_step, query_before], dim=-1), torch.cat([key_before, key_step], dim=-1)
    return QKIncrements(_increment(*first), _increment(query_step, key_step))


def _increment(left: Tensor, right: Tensor) -> Increment:
    """Readings of ``left @ right.mT``, each ``(..., d, r)``."""
    cores = [torch.linalg.qr(factor, mode="r").R for factor in (left, right)]
    core = cores[0] @ cores[1].mT
    finite = core.isfinite().all(dim=-1).all(dim=-1)
    values = torch.linalg.svdvals(core.where(finite[..., None, None], 0.0))  # LAPACK raises on what is not finite
    readings = torch.linalg.vector_norm(values, dim=-1), stable_rank(values), eigenvalue_effective_rank(values)
    return Increment(*(reading.where(finite, torch.nan) for reading in readings))
