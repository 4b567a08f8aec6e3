"""CorInfoMax: views agree, and the running covariance of their features has a large determinant."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.products import logdet, product
from lightning_collapse.losses.support.rows import require_rows
from lightning_collapse.losses.support.state import finite_or
from lightning_collapse.losses.support.statistics import stack_views
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.arguments import require_positive
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad
from lightning_collapse.utilities.registry import register_loss


class RunningMoments(NamedTuple):
    """What CorInfoMax remembers of the two views.

    Attributes:
        means: Shape ``(2, D)``.
        covariances: Shape ``(2, D, D)``.
    """

    means: Tensor
    covariances: Tensor


@full_precision
def corinfomax_terms(
    first: Tensor,
    second: Tensor,
    means: Tensor,
    covariances: Tensor,
    forgetting: float = 0.01,
    eps: float = 1e-6,
) -> tuple[dict[str, Tensor], RunningMoments]:
    r"""The two terms of :class:`CorInfoMax`, unweighted, and the new running moments.

    .. math:: \mu \leftarrow \lambda \mu + \tfrac{1 - \lambda}{N} \sum_i z_i, \qquad
        R \leftarrow \lambda R + \tfrac{1 - \lambda}{N} \sum_i (z_i - \mu) (z_i - \mu)^\top

    Computed in ``float64``, where the device has it: ``eps`` is below what ``float32`` resolves. It can be
    differentiated once.

    Collective: every process must call it; two all-reduces, about ``2 D * D`` numbers.

    Args:
        first: Representations of one view, shape ``(N, D)``, with at least two rows over all processes.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        means: Running means before, shape ``(2, D)``, the same on all processes.
        covariances: Running covariances before, shape ``(2, D, D)``, the same on all processes.
        forgetting: Weight :math:`\lambda` of what was before.
        eps: Added to the diagonal of :math:`R` in the determinant.

    Returns:
        Scalars ``determinant`` and ``invariance``, at least ``float32``, of the global batch; and the moments with
        this batch in them, without gradient.

    Raises:
        ValueError: If the views are not matrices of one shape, or have fewer than two rows over all processes.

    Example:
        >>> first = torch.arange(12.0).reshape(4, 3).sin()
        >>> second = first.flip(1)
        >>> means, covariances = torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)
        >>> terms, running = corinfomax_terms(first, second, means, covariances)
        >>> {name: round(value.item(), 3) for name, value in terms.items()}
        {'determinant': 4.976, 'invariance': 0.94}
    """
    views = stack_views("corinfomax_terms", first=first, second=second)
    _, n, dim = views.shape
    rows = views.to(accumulation_dtype(views.device))
    means, covariances = means.to(rows), covariances.to(rows)
    apart = (rows[0] - rows[1]).square().sum()
    # the mean needs its gradient: rows minus the running mean do not sum to zero
    sums = torch.cat([rows.new_full((1,), n), apart.reshape(1), rows.sum(dim=1).flatten()])
    message = all_reduce_sum_with_grad(sums)
    count = message[0].detach()
    require_rows("corinfomax_terms", 2, count, n)
    means = forgetting * means + (1 - forgetting) * message[2:].view(2, dim) / count
    deviations = rows - means.unsqueeze(1)
    scatter = all_reduce_sum_with_grad(product(deviations.mT, deviations))
    covariances = forgetting * covariances + (1 - forgetting) * scatter / count
    identity = torch.eye(dim, dtype=rows.dtype, device=rows.device)
    terms = {
        "determinant": -logdet(covariances + eps * identity).sum() / dim,
        "invariance": message[1] / (count * dim),
    }
    return {name: term.to(views.dtype) for name, term in terms.items()}, RunningMoments(
        means.detach(), covariances.detach()
    )


@register_loss
class CorInfoMax(AntiCollapseLoss):
    r"""Correlative information maximization between two views.

    .. math:: -\tfrac{1}{D} \big( \log \det (R + \epsilon I) + \log \det (R' + \epsilon I) \big)
        + \alpha\, \tfrac{1}{N D} \sum_i \|z_i - z'_i\|^2

    with running covariances :math:`R`, :math:`R'`, see :func:`corinfomax_terms`. The determinant grows with the scale
    of the features without bound: invariance has to balance it, or the features to be normalized.

    It remembers: the running moments are the buffers ``means`` and ``covariances``, 0 and the identity until the first
    call, updated by every call in training mode, unless its batch is not finite, and by none in evaluation mode. They
    move with the module, in ``float32`` to a device without ``float64``; no ``state_dict`` holds them. At the default
    forgetting factor a hundredth of the step before is all they carry.

    Args:
        invariance: Coefficient α; the authors' value for CIFAR, with the mean over samples and features.
        forgetting: Weight of what was before in the running moments; the authors' value. Not the momentum of a moving
            average: nearly all comes from the batch.
        eps: Added to the diagonal in the determinant; the authors' value.

    Raises:
        ValueError: If an argument is out of range, or, when it is called, if the number of features has changed.

    References:
        Ozsoy et al., *Self-supervised learning with an information maximization criterion*, NeurIPS 2022.
        https://arxiv.org/abs/2209.07999, code at https://github.com/serdarozsoy/corinfomax-ssl.

    Example:
        >>> import torch
        >>> loss, equal = CorInfoMax(), torch.zeros(8, 4)
        >>> [round(loss(equal, equal).item(), 2) for _ in range(4)]  # -2 log(0.01 ** k + 1e-6)
        [9.21, 18.4, 26.24, 27.61]
    """

    source = "Ozsoy et al., NeurIPS 2022, arXiv 2209.07999; remembers covariances from step to step"
    views = 2
    means: Tensor | None
    covariances: Tensor | None

    def __init__(self, invariance: float = 500.0, forgetting: float = 0.01, eps: float = 1e-6) -> None:
        super().__init__()
        require_positive(eps=eps)
        if not 0 <= forgetting < 1:
            raise ValueError(f"`forgetting` must be at least 0 and less than 1, got {forgetting}.")
        self.forgetting = forgetting
        self.eps = eps
        self.coefficients = {"determinant": 1.0, "invariance": invariance}
        self.register_buffer("means", None, persistent=False)
        self.register_buffer("covariances", None, persistent=False)

    def reset(self) -> None:
        """Forget all batches: means 0, covariances the identity, of any number of features."""
        self.means = self.covariances = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # a device without `float64` refuses what was summed in it elsewhere
        dtype = accumulation_dtype(fn(torch.empty(0)).device)
        for name, buffer in self.named_buffers():
            if buffer.dtype.itemsize > dtype.itemsize:
                setattr(self, name, buffer.to(dtype))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`corinfomax_terms`; two views of shape ``(N, D)``."""
        first, second = views
        earlier = self._moments(first)
        terms, moved = corinfomax_terms(first, second, *earlier, self.forgetting, self.eps)
        if self.training:
            self.means, self.covariances = map(finite_or, moved, earlier)
        return terms

    def _moments(self, features: Tensor) -> RunningMoments:
        dim = features.shape[-1]
        if self.means is None or self.covariances is None:
            means = torch.zeros(2, dim, dtype=accumulation_dtype(features.device), device=features.device)
            return RunningMoments(means, torch.eye(dim, dtype=means.dtype, device=means.device).repeat(2, 1, 1))
        if self.means.shape[-1] != dim:
            raise ValueError(
                f"`CorInfoMax` remembers {self.means.shape[-1]} features, got {dim}. Use one loss per layer, or call"
                " `reset()` first."
            )
        return RunningMoments(self.means, self.covariances)

    @property
    def value_at_perfection(self) -> float:
        """Views that agree, whitened to unit variance (without Bessel's correction), for as long as it remembers."""
        return -2 * math.log1p(self.eps)

    @property
    def value_at_collapse(self) -> float:
        """``-2 log(eps)``, 27.6, once all it remembers is equal rows; a few steps at the default forgetting factor."""
        return -2 * math.log(self.eps)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"invariance={self.coefficients['invariance']}, forgetting={self.forgetting}, eps={self.eps}"
