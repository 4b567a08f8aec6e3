"""SIGReg: along random directions, features have the characteristic function of a standard normal variable."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_collapse.losses.support.directions import random_directions
from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.rows import require_rows
from lightning_collapse.losses.support.shuffle import ShufflingLoss
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_whole
from lightning_collapse.utilities.differentiable_once import differentiable_once
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad
from lightning_collapse.utilities.registry import register_loss

Quadrature = Literal["paper", "package"]
QUADRATURES = get_args(Quadrature)


@full_precision
def sigreg_loss(features: Tensor, directions: Tensor, quadrature: Quadrature = "paper") -> Tensor:
    r"""Epps-Pulley statistic against a standard normal variable, averaged over directions.

    .. math:: \frac{N}{M} \sum_m \int \Big| \tfrac{1}{N} \sum_n e^{i t\, a_m^\top z_n} - e^{-t^2 / 2} \Big|^2
        e^{-t^2 / 2}\, dt

    The integrand is even and vanishes at 0, so only positive knots are evaluated: 8 of the paper's 17, 16 of the
    package's 33. The backward pass computes sines and cosines again: one ``N x M`` matrix is kept. It can be
    differentiated once.

    Collective: every process must call it with the same directions; one all-reduce of ``2 M`` numbers per knot.

    Args:
        features: Representations, shape ``(N, D)``, at least one row over all processes.
        directions: Unit columns, shape ``(D, M)``.
        quadrature: Which published rule, see :class:`SIGReg`.

    Returns:
        Scalar, at least ``float32``, the value on the global batch. About 1.06 for samples of a standard normal law,
        whatever ``N``, and less for points that are more regular than that; grows with ``N`` for others.

    Raises:
        ValueError: If ``features`` is not a matrix, ``directions`` do not fit, or if there is no row over all
            processes.

    References:
        Balestriero & LeCun, *LeJEPA*, 2025, Algorithm 1. https://arxiv.org/abs/2511.08544

    Example:
        >>> sigreg_loss(torch.zeros(100, 2), torch.eye(2))
        tensor(40.8921)
    """
    require_one_of(QUADRATURES, quadrature=quadrature)
    (rows,) = separate_views("sigreg_loss", features=features)
    n, dim = rows.shape
    if directions.ndim != 2 or len(directions) != dim:
        raise ValueError(f"`directions` must have shape ({dim}, M), got {tuple(directions.shape)}: one per column.")
    knots, weights = half_rule(quadrature)
    normal = [math.exp(-t * t / 2) for t in knots]
    sums: Tensor = _CharacteristicSums.apply(product(rows, directions.to(rows)), knots)  # type: ignore[no-untyped-call]
    message = all_reduce_sum_with_grad(torch.cat([sums.flatten(), sums.new_full((1,), n)]))
    count = message[-1].detach()
    require_rows("sigreg_loss", 1, count, n)
    cosines, sines = message[:-1].view_as(sums) / count
    gaps = ((cosines - _filled(sums, normal)).square() + sines.square()).mean(dim=1, keepdim=True)
    statistic: Tensor = count * (gaps * _filled(sums, weights)).sum()
    return statistic


def _filled(like: Tensor, numbers: list[float]) -> Tensor:
    """A column of numbers, filled in on the device: a copy from the host would wait for it."""
    return torch.stack([like.new_full((1,), number) for number in numbers])


def half_rule(quadrature: Quadrature) -> tuple[list[float], list[float]]:
    """Positive knots, and their weights over the whole line times the Gaussian window."""
    reach, intervals = (5.0, 8) if quadrature == "paper" else (3.0, 16)
    step = reach / intervals
    knots = [step * k for k in range(1, intervals + 1)]
    # twice for the negative half, half at the end; at 0 the integrand vanishes
    return knots, [(2 if t < reach else 1) * step * math.exp(-t * t / 2) for t in knots]


class _CharacteristicSums(torch.autograd.Function):
    """Sums over rows of ``cos(t u)`` and ``sin(t u)`` for projections ``u``, ``(N, M)``, as ``(2, K, M)``."""

    @staticmethod
    def forward(ctx: Any, projections: Tensor, knots: list[float]) -> Tensor:
        ctx.knots = knots
        ctx.save_for_backward(projections)
        return torch.stack(
            [torch.stack([f(t * projections).sum(dim=0) for t in knots]) for f in (torch.cos, torch.sin)]
        )

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (projections,) = ctx.saved_tensors
        grad = torch.zeros_like(projections)
        for t, cosine, sine in zip(ctx.knots, *grads[0], strict=True):
            angle = t * projections
            grad += t * (sine * angle.cos() - cosine * angle.sin())
        return grad, None


@register_loss
class SIGReg(ShufflingLoss):
    r"""Sketched isotropic Gaussian regularization, the anti-collapse term of LeJEPA; one term, ``sigreg``.

    LeJEPA adds :math:`\lambda` times it to :math:`(1 - \lambda)` times the mean squared distance of views to their
    mean, with :math:`\lambda = 0.05`. See :func:`sigreg_loss`. Two rules of integration are published:

    - ``quadrature="paper"``, Algorithm 1: trapezoids, 17 knots on [-5, 5].
    - ``quadrature="package"``, what the authors released: trapezoids, 17 knots on [0, 3], doubled.

    Directions are drawn anew at every call in training mode, and stay what they were in evaluation mode. They depend
    on the number of such calls and on ``seed`` alone: all processes draw the same, and the training's own random
    numbers are untouched. The number is a buffer that no ``state_dict`` holds.

    Args:
        slices: Number of directions; what the paper recommends to start with (its Algorithm 1 and the released
            example have 256).
        quadrature: Which published rule of integration.
        seed: Another number gives other directions.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Balestriero & LeCun, *LeJEPA*, 2025. https://arxiv.org/abs/2511.08544, code at
        https://github.com/rbalestr-lab/lejepa.

    Example:
        >>> import torch
        >>> SIGReg()(torch.zeros(100, 8))
        tensor(40.8921)
    """

    source = (
        "Balestriero & LeCun, 2025, arXiv 2511.08544, the mean over samples of a normal law; "
        '`quadrature="package"` for the released rule'
    )

    def __init__(self, slices: int = 1024, quadrature: Quadrature = "paper", seed: int = 0) -> None:
        super().__init__()
        require_whole(1, slices=slices)
        require_one_of(QUADRATURES, quadrature=quadrature)
        self.slices = slices
        self.quadrature: Quadrature = quadrature
        self.seed = seed
        self.coefficients = {"sigreg": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`sigreg_loss`, along new directions; features of shape ``(N, D)``."""
        (features,) = views
        step = self.next_step().to(features.device)
        directions = random_directions(features.shape[-1], self.slices, step, self.seed)
        return {"sigreg": sigreg_loss(features, directions, self.quadrature)}

    @property
    def value_at_perfection(self) -> float:
        """Mean over samples of a standard normal law, whatever their number: 1.0594 (paper), 1.0527 (package)."""
        knots, weights = half_rule(self.quadrature)
        return sum(w * (1 - math.exp(-t * t)) for t, w in zip(knots, weights, strict=True))

    @property
    def value_at_collapse(self) -> float:
        """``nan``: it grows with the number of rows, see :meth:`at_collapse`."""
        return math.nan

    def at_collapse(self, rows: int, dim: int) -> float:
        """With all rows at the origin; elsewhere it is larger. 0.4089 per row (paper), 0.4022 (package)."""
        knots, weights = half_rule(self.quadrature)
        return rows * sum(w * (1 - math.exp(-t * t / 2)) ** 2 for t, w in zip(knots, weights, strict=True))

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"slices={self.slices}, quadrature={self.quadrature!r}, seed={self.seed}"
