"""Orthogonality of weights: how far rows or columns are from orthonormal, and a step that brings them nearer."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of

Kind = Literal["SO", "DSO", "MC", "SRIP"]
KINDS = get_args(Kind)


@full_precision
def gram_error(weight: Tensor) -> Tensor:
    r"""The smaller Gram matrix of a weight minus the identity: zero if and only if its rows or columns are orthonormal.

    .. math:: E = W^T W - I \ \text{ or } \ W W^T - I

    whichever is smaller: the other one has no full rank, and is never the identity.

    Args:
        weight: Shape ``(O, ...)``, a matrix or the weight of a convolution, which is flattened to ``(O, I k k)``.

    Returns:
        Shape ``(K, K)`` with ``K = min(O, I k k)``, at least ``float32``.

    Example:
        >>> gram_error(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        tensor([[0., 0.],
                [0., 3.]])
    """
    tall = tall_matrix(weight)
    return tall.T @ tall - torch.eye(tall.shape[1], dtype=tall.dtype, device=tall.device)


def soft_orthogonality(weight: Tensor, kind: Kind = "SO") -> Tensor:
    r"""How far a weight is from orthonormal, by one of the published norms of :func:`gram_error` :math:`E` [1].

    .. math::
        \text{SO: } \|E\|_F^2 \qquad
        \text{DSO: } \|W^T W - I\|_F^2 + \|W W^T - I\|_F^2 = 2 \|E\|_F^2 + |O - I| \qquad
        \text{MC: } \max_{ij} |E_{ij}| \qquad
        \text{SRIP: } \sigma(E)

    Args:
        weight: Shape ``(O, ...)``; all but the first dimension count as one.
        kind: ``"SO"``, soft orthogonality; ``"DSO"``, both sides, whose floor is the difference of the sides and whose
            gradient is twice that of SO; ``"MC"``, mutual coherence, the largest entry; ``"SRIP"``, spectral restricted
            isometry, the largest singular value, exactly.

    Returns:
        A scalar, at least ``float32``: 0 for orthonormal rows or columns, but for the floor of DSO. Its gradient is
        finite there too.

    Raises:
        ValueError: If there is no such ``kind``.

    References:
        [1] Bansal, Chen & Wang, *Can we gain more from orthogonality regularizations in training deep networks?*,
        NeurIPS 2018. https://arxiv.org/abs/1810.09102

    Example:
        >>> weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> [soft_orthogonality(weight, kind).item() for kind in ("SO", "DSO", "MC", "SRIP")]
        [9.0, 19.0, 3.0, 3.0]
    """
    require_one_of(KINDS, kind=kind)
    return gap(gram_error(weight), kind) + floor(weight, kind)


@full_precision
def gap(error: Tensor, kind: Kind, direction: Tensor | None = None, released: bool = False) -> Tensor:
    """The norm of a Gram error; of SRIP along a direction ``(K,)``, once multiplied and squared if ``released``."""
    if kind == "MC":
        return error.abs().amax()
    if kind != "SRIP":
        return error.square().sum() * (2 if kind == "DSO" else 1)
    if direction is None:
        return torch.linalg.eigvalsh(error).abs().amax()  # type: ignore[no-any-return]
    along = error @ (unit_vector(error @ direction) if released else direction)
    return along.square().sum() if released else torch.linalg.vector_norm(along)


def floor(weight: Tensor, kind: Kind) -> int:
    """What no weight of that shape comes below."""
    return abs(len(weight) - weight[0].numel()) if kind == "DSO" else 0


def tall_matrix(weight: Tensor) -> Tensor:
    """The weight as a matrix with at least as many rows as columns."""
    matrix = weight.flatten(1)
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def unit_vector(vector: Tensor) -> Tensor:
    """A vector of length 1, or of zeros where there is no direction; its gradient is finite."""
    length: Tensor = torch.linalg.vector_norm(vector)
    return vector / length.clamp_min(torch.finfo(vector.dtype).tiny)


@full_precision
def parseval_step(weight: Tensor, beta: float = 3e-4) -> Tensor:
    r"""One step of a weight toward orthonormal rows or columns [1].

    .. math:: W \leftarrow (1 + \beta) W - \beta W W^T W

    Singular vectors stay; a singular value :math:`s` becomes :math:`s (1 + \beta - \beta s^2)`, so that 1 stays and
    others come nearer, from anywhere below :math:`\sqrt{1 + 1 / \beta}`.

    Args:
        weight: Shape ``(O, I)``, a whole matrix or some of its rows.
        beta: How far.

    Returns:
        The shape of the weight, at least ``float32``. It takes ``min(O, I)`` squared times ``max(O, I)`` products.

    References:
        [1] Cissé, Bojanowski, Grave, Dauphin & Usunier, *Parseval networks: improving robustness to adversarial
        examples*, ICML 2017. https://arxiv.org/abs/1704.08847

    Example:
        >>> parseval_step(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), beta=0.1)
        tensor([[1.0000, 0.0000],
                [0.0000, 1.4000]])
    """
    rows, columns = weight.shape
    cube = weight @ (weight.T @ weight) if rows > columns else (weight @ weight.T) @ weight
    return (1 + beta) * weight - beta * cube
