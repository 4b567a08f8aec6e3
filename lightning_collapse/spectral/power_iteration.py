"""Power iteration: the top singular pair of matrices that change slowly, one cheap step per look."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision

MAX_EXACT = 2048
"""Matrices whose smaller side is at most this start from the eigenvectors of their Gram matrix."""
COLD_ITERATIONS = 50
"""Block iterations that start a larger matrix."""


class TopSingularPair(NamedTuple):
    r"""Largest singular value of a matrix ``W``, its right singular vector, and how far to trust them.

    Attributes:
        direction: Unit vector ``v``, shape ``(I,)``.
        norm: :math:`s = \|W v\|`, the spectral norm; NaN if the matrix holds NaN or infinity.
        residual: :math:`\|W^T W v - s^2 v\| / s^2`; 0 for a singular vector, NaN where there is none.
        gap: :math:`1 - s_2^2 / s^2`, with the second singular value as the block sees it. By the theorem of Davis and
            Kahan the sine of the angle between ``v`` and the true vector is about ``residual / gap`` at most: the
            spectral norm can be right to three digits while ``v`` is still any vector.
    """

    direction: Tensor
    norm: Tensor
    residual: Tensor
    gap: Tensor


class PowerIteration:
    r"""Block power iteration on :math:`W^T W` with a Rayleigh-Ritz projection, warm from one call to the next.

    Each call multiplies a block of ``size`` orthonormal vectors once by the matrix and its transpose, reads the Ritz
    pair of that block with its residual, and keeps the product as the next block. The first call for a matrix starts
    from the eigenvectors of the smaller of its Gram matrices in ``float64``, or above :data:`MAX_EXACT` from a fixed
    block and :data:`COLD_ITERATIONS` iterations. The direction keeps its sign from call to call. The outcome depends
    on the weights alone, so it is the same on every process, and the random state is not touched.

    A block instead of one vector: at initialization singular values are so close that one vector does not converge,
    while a block of eight converges by the ratio of the ninth to the first.

    Nothing here raises on NaN, infinity or zeros; the norm or the residual is NaN then, and the block stays.

    Args:
        size: Vectors in a block; fewer for a matrix with a smaller side.

    Raises:
        ValueError: If ``size`` is not at least 2: the gap needs a second vector.

    Example:
        >>> power = PowerIteration()
        >>> pair = power.step({"layer": torch.diag(torch.tensor([1.0, 3.0, 2.0]))})["layer"]
        >>> pair.direction, pair.norm
        (tensor([0., 1., 0.]), tensor(3.))
    """

    def __init__(self, size: int = 8) -> None:
        if size < 2:
            raise ValueError(f"`size` must be at least 2, got {size}. The default is 8.")
        self.size = size
        self._blocks: dict[str, Tensor] = {}

    @torch.no_grad()
    @full_precision
    def step(self, weights: Mapping[str, Tensor], iterations: int = 1) -> dict[str, TopSingularPair]:
        """Follow every matrix; waits for the device, as decompositions do.

        Args:
            weights: Matrices ``(O, I)`` by name, half precision is promoted to ``float32``.
            iterations: Multiplications of the block; more if the weights have changed much since the last call.

        Returns:
            The pair of every matrix, under the same names.
        """
        weights = {name: _at_least_float(weight) for name, weight in weights.items()}
        alike: dict[tuple[Any, ...], list[str]] = {}
        for name, weight in weights.items():
            block = self._block(name, weight)
            alike.setdefault((*block.shape, block.dtype, block.device), []).append(name)
        pairs: dict[str, TopSingularPair] = {}
        for names in alike.values():  # small decompositions are batched, the products are not: that would copy weights
            pairs |= self._follow(names, [weights[name] for name in names], iterations)
        return {name: pairs[name] for name in weights}

    def state_dict(self) -> dict[str, Tensor]:
        """The blocks, by name."""
        return dict(self._blocks)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the blocks of :meth:`state_dict`; one that does not fit its matrix is not used."""
        self._blocks = dict(state)

    def _block(self, name: str, weight: Tensor) -> Tensor:
        """Orthonormal rows ``(k, I)``."""
        shape = (min(self.size, *weight.shape), weight.shape[1])
        block = self._blocks.get(name)
        if block is None or block.shape != shape:
            block = _cold_block(weight, shape[0])
        self._blocks[name] = block = block.to(weight)
        return block

    def _follow(self, names: list[str], weights: list[Tensor], iterations: int) -> dict[str, TopSingularPair]:
        start = blocks = torch.stack([self._blocks[name] for name in names])
        for _ in range(iterations - 1):
            blocks = _orthonormal(_products(weights, blocks))
        products = _products(weights, blocks)
        usable = products.sum(dim=(1, 2)).isfinite()[:, None]  # a sum is finite if and only if its terms are
        blocks, products = (torch.where(usable[:, None], rows, start) for rows in (blocks, products))
        squares, rotation = _eigh(torch.bmm(products, blocks.mT))
        directions = torch.bmm(rotation[:, :1], blocks)[:, 0]
        advanced = torch.bmm(rotation, products)
        top, second = squares[:, 0], squares[:, 1] if squares.shape[1] > 1 else 0
        off = torch.linalg.vector_norm(advanced[:, 0] - top[:, None] * directions, dim=1)
        numbers = torch.stack([top.sqrt(), off / top, 1 - second / top], dim=1)
        numbers = torch.where(usable, numbers, nan)
        directions = directions * _sign((directions * start[:, 0]).sum(dim=1, keepdim=True))
        following = _orthonormal(advanced)
        following[:, 0] *= _sign((following[:, 0] * directions).sum(dim=1, keepdim=True))
        self._blocks.update(zip(names, following.unbind(), strict=True))
        columns = zip(names, directions.unbind(), *(column.unbind() for column in numbers.unbind(dim=1)), strict=True)
        return {name: TopSingularPair(*column) for name, *column in columns}


def top_singular_pair(weight: Tensor) -> TopSingularPair:
    """The top singular pair of one matrix from a cold start, in ``float64`` where the device has it.

    Exact to rounding where the smaller side is at most :data:`MAX_EXACT`; ask the residual otherwise.

    Args:
        weight: Shape ``(O, I)``.

    Returns:
        The pair. Its direction's largest component is positive: a singular vector has no sign of its own.

    Example:
        >>> top_singular_pair(torch.tensor([[0.0, -2.0]])).direction
        tensor([0., 1.], dtype=torch.float64)
    """
    return PowerIteration().step({"": weight.to(accumulation_dtype(weight.device))})[""]


def _at_least_float(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype.itemsize < 4 else weight


def _products(weights: list[Tensor], blocks: Tensor) -> Tensor:
    """``B W^T W`` of every matrix."""
    return torch.stack([block @ weight.T @ weight for block, weight in zip(blocks.unbind(), weights, strict=True)])


def _orthonormal(rows: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(rows.mT)[0]  # completes the basis where the rows are dependent
    return columns.mT


def _sign(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values)


def _eigh(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and not negative, and the eigenvectors as rows."""
    try:
        values, vectors = torch.linalg.eigh(grams)
    except torch.linalg.LinAlgError:  # of the whole batch; the next look may fare better
        unknown = torch.full_like(grams[..., 0], nan)
        return unknown, torch.eye(grams.shape[-1]).to(grams).expand_as(grams)
    return values.flip(-1).clamp_min(0), vectors.flip(-1).mT


def _cold_block(weight: Tensor, size: int) -> Tensor:
    safe = weight.to(accumulation_dtype(weight.device)).nan_to_num(0.0, 0.0, 0.0)
    rows, columns = safe.shape
    if min(rows, columns) <= MAX_EXACT:
        tall = rows >= columns
        vectors = _eigh(safe.T @ safe if tall else safe @ safe.T)[1][:size]
        # the second product is a power iteration from the left, which gives the right vectors back
        block = _orthonormal(vectors if tall else vectors @ safe)
    else:
        generator = torch.Generator().manual_seed(0)
        block = _orthonormal(torch.randn(size, columns, generator=generator, dtype=torch.float64).to(safe))
        for _ in range(COLD_ITERATIONS):
            block = _orthonormal(block @ safe.T @ safe)
    largest = block[0].gather(0, block[0].abs().argmax(dim=0, keepdim=True))
    return torch.cat([block[:1] * _sign(largest), block[1:]])
