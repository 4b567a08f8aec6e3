"""Soft orthogonality (SO, DSO, MC, SRIP): a pull of weights toward orthonormal rows or columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.functional.regularization.orthogonality import (
    KINDS,
    Kind,
    floor,
    gap,
    gram_error,
    tall_matrix,
    unit_vector,
)
from lightning_collapse.penalties.base import Parameters, Penalty
from lightning_collapse.penalties.support.shards import Layout, add_to_gradients, wide
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of
from lightning_collapse.utilities.hashing import GOLDEN, hashed
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.registry import register_penalty
from lightning_collapse.utilities.sharding import local

COLD_ITERATIONS = 50


@register_penalty
class SoftOrthogonality(Penalty):
    r"""Weights whose rows, or whose columns if these are fewer, stay near orthonormal [1].

    .. math::
        w \sum_W \|E\|_F^2, \quad w \sum_W 2 \|E\|_F^2 + |O - I|, \quad w \sum_W \max |E_{ij}| \quad \text{or} \quad
        w \sum_W \sigma(E), \qquad E = W^T W - I \ \text{ or } \ W W^T - I

    for ``kind`` SO, DSO, MC and SRIP, see :func:`~lightning_collapse.functional.regularization.soft_orthogonality`.
    It takes every parameter with two dimensions or more, kernels of convolutions flattened to ``(O, I k k)``; choose
    with ``WeightPenalty(..., parameters=["encoder.*"])``, since an embedding or a last layer is rarely meant. Biases
    are left alone. It acts from the first step and remembers no task.

    The spectral norm of SRIP is that along one vector for each weight, which is multiplied by :math:`E` once per step
    and kept, also in checkpoints; it begins with 50 products. ``released=True`` is the authors' code: one product with
    a new vector of positive numbers each time, and the square of the norm, which is not that of SRIP but a random
    number below its square. The code is not a number at exactly orthonormal weights; here value and pull are 0.

    Weights that ``fully_shard`` has cut are gathered one at a time. In half precision numbers are ``float32``. Whatever
    the batch, it takes the time of two thirds as many more samples as the smaller side of a matrix is long.

    Args:
        weight: ``w``. The authors begin with 1e-2 for the released form and end with 0: ``published_decay``.
        kind: Which one. DSO is twice SO and a constant: the wider side cannot be orthonormal.
        released: Of SRIP, what the authors' code does.

    Raises:
        ValueError: If an argument is out of range; at the start if no parameter is a matrix.

    References:
        [1] Bansal, Chen & Wang, *Can we gain more from orthogonality regularizations in training deep networks?*,
        NeurIPS 2018. https://arxiv.org/abs/1810.09102, code at https://github.com/VITA-Group/Orthogonality-in-CNNs.

    Example:
        >>> weights = {"w": torch.diag(torch.tensor([1.0, 2.0])).requires_grad_()}
        >>> penalty = SoftOrthogonality(weight=0.5)
        >>> penalty.start(weights)
        >>> penalty.value(weights).item()  # 0.5 * (2^2 - 1)^2
        4.5
        >>> penalty.add_gradients(weights)
        >>> weights["w"].grad
        tensor([[ 0.,  0.],
                [ 0., 12.]])
    """

    remembers = "no task: rows or columns of weights are to be orthonormal"
    source = "Bansal et al., NeurIPS 2018, arXiv 1810.09102"

    def __init__(self, weight: float = 1e-2, kind: Kind = "SO", released: bool = False) -> None:
        super().__init__(weight)
        require_one_of(KINDS, kind=kind)
        if released and kind != "SRIP":
            raise ValueError(f"`released` is of `kind='SRIP'` alone, got `kind={kind!r}`.")
        self.kind: Kind = kind
        self.released = released
        self._directions: dict[str, Tensor] = {}
        self._following: dict[str, Tensor] = {}
        self._draws = 0

    @override
    @torch.no_grad()
    def start(self, parameters: Parameters) -> None:
        parameters = self.state.place(parameters)
        matrices = list(self._matrices(parameters))
        if not matrices:
            raise ValueError(
                f"`SoftOrthogonality` is for weights of two dimensions or more, and there is none in:"
                f" {', '.join(parameters)}. Name some with `parameters=[...]`."
            )
        if self.kind != "SRIP" or self.released:
            return
        known, self._directions = self._directions, {}
        for name, weight in matrices:
            error = gram_error(weight)
            before = known.get(name, error.new_empty(0))
            self._directions[name] = before.to(error) if len(before) == len(error) else _top(error)

    @override
    @torch.no_grad()
    def add_gradients(self, parameters: Parameters, scale: Tensor | None = None) -> None:
        if not self.weight:
            return
        pulled, pulls = [], []
        for name, weight in self._matrices({n: p for n, p in parameters.items() if p.requires_grad}):
            error = gram_error(weight)
            pulled.append(parameters[name])
            pulls.append(Layout.of(parameters[name]).own(self._pull(name, weight, error)))
            if name in self._directions:
                self._following[name] = _multiplied(error, self._directions[name])
        if pulled:
            add_to_gradients(pulled, pulls, self.weight, scale)

    @override
    def after_step(self, parameters: Parameters) -> None:
        self._directions |= self._following
        self._following = {}
        self._draws += 1

    @override
    def consolidate(self, model: nn.Module, loader: Loader | None = None) -> None:
        """Nothing: one task is like another."""

    @override
    def value(self, parameters: Parameters) -> Tensor:
        values = [self._gap(name, gram_error(w)) + floor(w, self.kind) for name, w in self._matrices(parameters)]
        some = local(next(iter(parameters.values()), torch.zeros(())))
        return self.weight * (torch.stack(values).sum() if values else some.new_zeros((), dtype=wide(some)))

    @override
    @torch.no_grad()
    def curvature(self, parameters: Parameters) -> Tensor | None:
        r"""The largest second derivative, at the weights or at the orthonormal ones they are pulled to.

        With :math:`s` the largest singular value it is :math:`12 s^2 - 4` for SO, and 8 where that is orthonormal. MC
        and SRIP have a kink there; it is that of a single large singular value, 2.
        """
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        found = [gram_error(weight) for _, weight in self._matrices(trained)]
        if not found:
            return None
        if self.kind == "MC" or (self.kind == "SRIP" and not self.released):
            return self.weight * found[0].new_tensor(2.0)
        grams = [error + torch.eye(len(error)).to(error) for error in found]
        squares = torch.stack([torch.linalg.vector_norm(gram @ _top(gram)) for gram in grams]).max()
        return self.weight * (2 if self.kind == "DSO" else 1) * (12 * squares - 4).clamp_min(8)

    @override
    def state_dict(self) -> dict[str, Any]:
        directions = {name: direction.clone() for name, direction in self._directions.items()}
        return {"memory": {"direction": directions}, "draws": self._draws}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._directions = {name: part.clone() for name, part in state_dict["memory"]["direction"].items()}
        self._draws = state_dict["draws"]

    def _matrices(self, parameters: Parameters) -> Iterator[tuple[str, Tensor]]:
        """Weights that are whole, one at a time. Collective if any is sharded."""
        for name, parameter in parameters.items():
            if name in self.state.layouts and parameter.ndim > 1 and parameter.numel():
                yield name, Layout.of(parameter).gather(local(parameter))

    def _gap(self, name: str, error: Tensor) -> Tensor:
        direction = _uniform(error, self._draws) if self.released else self._directions.get(name)
        return gap(error, self.kind, direction, self.released)

    @full_precision
    def _pull(self, name: str, weight: Tensor, error: Tensor) -> Tensor:
        """The gradient: that of the Gram matrix, which is small, by autograd, and from there by hand."""
        with torch.enable_grad():
            [small] = torch.autograd.grad(self._gap(name, error.requires_grad_()), error)
        tall = tall_matrix(weight)
        pull = tall @ (small + small.T)
        return (pull if len(pull) == len(weight) else pull.T).reshape(weight.shape)


def published_decay(epoch: int, weight: float = 1e-2) -> float:
    """The weight of SRIP in an epoch, as the authors train on CIFAR: much at first, and none in the end.

    Args:
        epoch: Number of the epoch, from 0.
        weight: The one it begins with.

    Returns:
        The weight times 1e-3 from epoch 20 on, times 1e-4 from 50, times 1e-6 from 70, and 0 from 120.

    Example:
        >>> [f"{published_decay(epoch):.0e}" for epoch in (0, 20, 50, 70, 120)]
        ['1e-02', '1e-05', '1e-06', '1e-08', '0e+00']
    """
    factors = {120: 0.0, 70: 1e-6, 50: 1e-4, 20: 1e-3}
    return weight * next((factor for start, factor in factors.items() if epoch >= start), 1.0)


def _top(error: Tensor) -> Tensor:
    """The eigenvector of the largest eigenvalue, nearly; it raises nothing on what is no number."""
    direction = unit_vector(_uniform(error, 0) - 0.5)
    for _ in range(COLD_ITERATIONS):
        direction = _multiplied(error, direction)
    return direction


@full_precision
def _multiplied(error: Tensor, direction: Tensor) -> Tensor:
    """One power step; a direction that is lost, or no number, is kept as it was."""
    product = error @ direction
    length = torch.linalg.vector_norm(product)
    return torch.where((length > 0) & length.isfinite(), product / length, direction)


def _uniform(error: Tensor, draw: int) -> Tensor:
    """Numbers between 0 and 1 that a counter draws, for the columns of a matrix: the same on every process."""
    place = torch.arange(1, len(error) + 1, device=error.device) + (draw << 32)
    return ((hashed(hashed(place * GOLDEN)) >> 11 & (2**53 - 1)).to(error.dtype) + 0.5) / 2**53
