"""Uniformity: representations spread over the sphere."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.rows import require_rows, unit_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.differentiable_once import differentiable_once
from lightning_collapse.utilities.distributed import all_gather_rows, all_reduce_sum_with_grad, world_size
from lightning_collapse.utilities.registry import register_loss

BLOCK = 2048
MAX_T = 40.0


@full_precision
def uniformity_loss(features: Tensor, t: float = 2.0) -> Tensor:
    r"""Logarithm of the mean Gaussian potential over pairs of rows on the unit sphere.

    .. math:: \log \frac{1}{N (N - 1)} \sum_{i \ne j} e^{-t \|x_i - x_j\|^2}, \qquad x_i = z_i / \|z_i\|

    From the Gram matrix, :math:`-t \|x_i - x_j\|^2 = 2 t (x_i^\top x_j - 1)`, in blocks of 2048 rows that the backward
    pass computes again: no ``N x N`` matrix is kept. It can be differentiated once.

    Collective: every process must call it. Rows of all processes travel, without their gradient; each process takes
    the pairs of its own rows. Several processes wait once for the device, to learn how many rows there are.

    Args:
        features: Representations, shape ``(N, D)``, with at least two rows over all processes; a row of zeros stays
            one.
        t: Inverse width of the potential; the paper's value by default.

    Returns:
        Scalar, at least ``float32``, the value on the global batch: 0 if all rows point one way,
        ``-2 t N / (N - 1)`` on a regular simplex, which is the least.

    Raises:
        ValueError: If ``features`` is not a matrix, or if there are fewer than two rows over all processes.

    References:
        Wang & Isola, *Understanding contrastive representation learning through alignment and uniformity on the
        hypersphere*, ICML 2020. https://arxiv.org/abs/2005.10242

    Example:
        >>> uniformity_loss(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])), uniformity_loss(torch.ones(4, 3)).abs() < 1e-6
        (tensor(-8.), tensor(True))
    """
    (features,) = separate_views("uniformity_loss", features=features)
    rows = unit_rows(features)
    n = len(rows)
    everything, mask = all_gather_rows(rows)
    ranks = world_size()
    start = torch.distributed.get_rank() * (len(everything) // ranks) if ranks > 1 else 0
    count = mask.sum().to(rows.dtype)
    require_rows("uniformity_loss", 2, count, n)
    potential: Tensor = _Potential.apply(rows, everything, mask if ranks > 1 else None, start, t)  # type: ignore[no-untyped-call]
    return (all_reduce_sum_with_grad(potential) / (count * (count - 1))).log() - 2 * t


class _Potential(torch.autograd.Function):
    r"""Sum over own rows :math:`i` and all rows :math:`j \ne i` of :math:`e^{2 t x_i^\top x_j}`.

    Every pair is met twice over all processes, once from either side, so the gradient with respect to an own row is
    twice the gradient of its own part, and no gradient has to travel.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, everything: Tensor, mask: Tensor | None, start: int, t: float) -> Tensor:
        ctx.start, ctx.t = start, t
        ctx.save_for_backward(own, everything, mask)
        total = own.new_zeros(())
        for first in range(0, len(own), BLOCK):
            total = total + _kernel(own, everything, mask, first, start, t).sum()
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        own, everything, mask = ctx.saved_tensors
        return _gradient(grads[0] * (4 * ctx.t), own, everything, mask, ctx.start, ctx.t), None, None, None, None


@full_precision  # the backward pass may run under autocast
def _gradient(scale: Tensor, own: Tensor, everything: Tensor, mask: Tensor | None, start: int, t: float) -> Tensor:
    starts = range(0, len(own), BLOCK)
    blocks = [_kernel(own, everything, mask, first, start, t) @ everything for first in starts]
    return torch.cat(blocks) * scale if blocks else torch.zeros_like(own)


def _kernel(own: Tensor, everything: Tensor, mask: Tensor | None, first: int, start: int, t: float) -> Tensor:
    """The potential between a block of own rows and all rows, zero between a row and itself."""
    kernel = (2 * t * (own[first : first + BLOCK] @ everything.mT)).exp()
    if mask is not None:
        kernel = kernel * mask
    kernel.diagonal(offset=start + first).zero_()
    return kernel


@register_loss
class Uniformity(AntiCollapseLoss):
    """Module form of ``uniformity_loss``, with one term, ``uniformity``.

    Args:
        t: Inverse width of the potential.

    Raises:
        ValueError: If ``t`` is not between 0 and 40, where ``float32`` still tells distances apart.

    Example:
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> round(Uniformity()(features).item(), 3)
        -1.257
    """

    source = "Wang & Isola, ICML 2020, arXiv 2005.10242, of normalized rows"

    def __init__(self, t: float = 2.0) -> None:
        super().__init__()
        if not 0 < t <= MAX_T:
            raise ValueError(f"`t` must be positive and at most {MAX_T:.0f}, got {t}: `float32` overflows beyond.")
        self.t = t
        self.coefficients = {"uniformity": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"uniformity": uniformity_loss(features)}`` for features of shape ``(N, D)``."""
        (features,) = views
        return {"uniformity": uniformity_loss(features, self.t)}

    @property
    def value_at_perfection(self) -> float:
        """``nan``: it depends on the shape, see :meth:`at_perfection`."""
        return math.nan

    def at_perfection(self, rows: int, dim: int) -> float:
        """A regular simplex of ``rows`` points where it fits, else the value of the uniform law on the sphere."""
        if rows <= dim + 1:
            return -2 * self.t * rows / (rows - 1)
        return sphere_potential(dim, self.t)

    @property
    def value_at_collapse(self) -> float:
        """0: all rows point one way."""
        return 0.0

    def extra_repr(self) -> str:
        """Show the hyperparameter in ``print(model)``."""
        return f"t={self.t}"


def sphere_potential(dim: int, t: float) -> float:
    r"""Value on the uniform law on the sphere, as the series of :math:`{}_0F_1(; D / 2; t^2)` less :math:`2 t`."""
    term = total = 1.0
    k = 0
    while term > 1e-17 * total:
        k += 1
        term *= t * t / (k * (dim / 2 + k - 1))
        total += term
    return math.log(total) - 2 * t
