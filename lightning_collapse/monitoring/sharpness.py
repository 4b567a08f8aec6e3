"""Sharpness: the largest curvature of a loss, by warm power iteration on products with its Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import all_reduce_sum, max_over_processes, world_size
from lightning_collapse.utilities.private_torch import foreach

FIRST, LATER = 20, 5
"""Products with the Hessian: of the first time, and of later ones, which begin where the last one ended."""
STEP = 3e-4
"""Length of a difference over that of the weights. Five thousandths are as exact where the loss is quadratic, and were
wrong by 6 % on a trained network of hyperbolic tangents."""

Vector = list[Tensor]


class Sharpness:
    r"""Largest eigenvalue of the Hessian ``H`` of a loss, plain or preconditioned.

    .. math:: \lambda = \frac{u^\top P^{-1/2} H P^{-1/2} u}{u^\top u}

    A product is a second backward pass through the gradient of one forward pass, with attention computed in the way
    that can be derived twice. Where a model cannot be derived twice it is a central difference,
    :math:`(g(\theta + \epsilon v) - g(\theta - \epsilon v)) / 2 \epsilon`, of two gradients; weights are moved for it
    and put back to the last bit. Rectifiers have kinks that differences see and second derivatives do not.

    The iteration approaches the eigenvalue from below and slowly where others are near it; a point is good to a few per
    cent. Where negative eigenvalues are as large in magnitude the spectrum is shifted, so that the largest is read.

    Args:
        loss: Computes the loss, of the same data every time, on the weights as they are, with its graph; where there
            are several processes each of its own data, and their mean counts.
        parameters: The weights; of ``float32`` or ``float64``.

    Attributes:
        vectors: Where each iteration ended, by name.
        shifts: What it has added to the diagonal so that no negative eigenvalue leads.
        differences: Whether it has come to central differences.

    Example:
        >>> weights = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> sharpness = Sharpness(lambda: (torch.tensor([3.0, -0.5]) * weights**2).sum(), [weights])
        >>> round(sharpness.measure("raw").item(), 2), weights.tolist()
        (6.0, [1.0, 1.0])
    """

    def __init__(self, loss: Callable[[], Tensor], parameters: Sequence[torch.nn.Parameter]) -> None:
        self._loss, self._parameters = loss, list(parameters)
        self.vectors: dict[str, Vector] = {}
        self.shifts: dict[str, float] = {}
        self.differences = False

    @torch.no_grad()
    def measure(self, name: str, scale: Mapping[int, Tensor] | None = None) -> Tensor:
        r"""The eigenvalue, 0-dimensional; NaN where there is none. Collective, and it waits for the device.

        Args:
            name: Which iteration to go on with.
            scale: Diagonal of :math:`P^{-1/2}`, by index of the parameter; parameters without one are left as they are.
        """
        known = name in self.vectors
        vector, shift = self.vectors.pop(name, None) or self._begin(), self.shifts.get(name, 0.0)
        value = torch.full((), torch.nan)
        slopes = None if self.differences else self._slopes()
        for _ in range(LATER if known else FIRST):
            vector = _scaled(vector, 1 / _length(vector))
            direction = _multiplied(vector, scale)
            product = self._second_derivative(slopes, direction) if slopes is not None else None
            if product is None:
                slopes, product = None, self._difference(direction)
            product = _multiplied(product, scale)
            value, length = _dot(vector, product), _length(product)
            if not value.isfinite() or not length > 0:
                return value
            # 0 at a positive eigenvalue, all of a negative one, and in between where both signs are mixed
            shift = max(shift, float(length - value) / 2)
            vector = foreach.add(product, vector, alpha=shift)
        self.vectors[name], self.shifts[name] = vector, shift
        return value

    def _begin(self) -> Vector:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(p.shape, generator=generator).to(p) for p in self._parameters]

    def _slopes(self) -> Vector | None:
        """The gradient with its graph."""

        def slopes() -> Sequence[Tensor | None]:
            with sdpa_kernel(SDPBackend.MATH):
                return torch.autograd.grad(self._loss(), self._parameters, create_graph=True, allow_unused=True)

        return self._together(slopes, must=False, reduce=False)

    def _second_derivative(self, slopes: Vector, direction: Vector) -> Vector | None:
        """The Hessian times a vector; ``None`` if that cannot be had."""

        def derivative() -> Sequence[Tensor | None]:
            along = torch.stack([(g * v).sum() for g, v in zip(slopes, direction, strict=True)]).sum()
            return torch.autograd.grad(along, self._parameters, retain_graph=True, allow_unused=True)

        found = self._together(derivative, must=False)
        self.differences = found is None
        return found

    def _difference(self, direction: Vector) -> Vector:
        step = STEP * _length(self._parameters).clamp_min(1e-3) / _length(direction)
        kept = [p.detach().clone() for p in self._parameters]
        gradients = []
        try:
            for sign in (1, -1):
                for p, start, along in zip(self._parameters, kept, direction, strict=True):
                    p.copy_(start + sign * step.to(along) * along)
                gradients.append(
                    self._together(lambda: torch.autograd.grad(self._loss(), self._parameters, allow_unused=True))
                )
        finally:
            for p, start in zip(self._parameters, kept, strict=True):
                p.copy_(start)
        return _scaled(foreach.sub(*gradients), 1 / (2 * step))

    def _together(
        self, derive: Callable[[], Sequence[Tensor | None]], must: bool = True, reduce: bool = True
    ) -> Vector | None:
        """Derivatives, their mean over processes; ``None``, or an exception, if any process has none. Collective."""
        found: Sequence[Tensor | None] = ()
        problem: Exception | None = None
        try:
            with torch.enable_grad():
                found = derive()
        except Exception as error:  # the others must not wait for this one
            problem = error
        [failed] = max_over_processes([problem is not None], self._parameters[0].device)
        if failed:
            if must:
                raise problem or RuntimeError("the loss cannot be derived in another process")
            return None
        own = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self._parameters, strict=True)]
        return [all_reduce_sum(g) / world_size() for g in own] if reduce and world_size() > 1 else own


def _dot(first: Vector, other: Vector) -> Tensor:
    wide, device = accumulation_dtype(first[0].device), first[0].device
    return torch.stack([(a * b).sum(dtype=wide).to(device) for a, b in zip(first, other, strict=True)]).sum()


def _length(vector: Sequence[Tensor]) -> Tensor:
    return _dot(list(vector), list(vector)).sqrt()


def _scaled(vector: Vector, factor: Tensor) -> Vector:
    return [x * factor.to(x) for x in vector]


def _multiplied(vector: Vector, scale: Mapping[int, Tensor] | None) -> Vector:
    return [x * scale[i] if scale and i in scale else x for i, x in enumerate(vector)]
