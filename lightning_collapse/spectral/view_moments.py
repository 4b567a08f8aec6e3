"""Moments of views, streaming: scatter between samples and within the views of each, on any split, any rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_collapse.spectral.moments import STATES, Moments, reduce_moments
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.distributed import all_reduce_sum

VIEW_STATES = (*STATES, "within", "degrees")


class ViewMoments:
    r"""Sufficient statistics of a stream of samples, each seen in several views.

    The moments of the samples' means :math:`\mu_i`, see :class:`~lightning_collapse.spectral.Moments`, and
    :math:`\sum_i \sum_j (x_{ij} - \mu_i)(x_{ij} - \mu_i)^\top` with its degrees of freedom: all views of a sample come
    in one update, so the second sum needs no anchor. Samples with NaN or infinity in any view are left out. Nothing
    here waits for the device.

    Args:
        dim: Number of features ``D``.
        device: Where the sums live.
        dtype: What they are summed in; the default is ``float64`` wherever the device has it.

    Attributes:
        means: Moments of the samples' means.
        within: Sum of outer products of views less their sample's mean, ``(D, D)``.
        degrees: ``Q - 1`` for each sample, 0-dimensional.

    Example:
        >>> moments = ViewMoments(1)
        >>> moments.update(torch.tensor([[[1.0], [5.0]], [[3.0], [5.0]]]))
        >>> moments.means.mean, moments.within, moments.degrees
        (tensor([3.5000], dtype=torch.float64), tensor([[2.]], dtype=torch.float64), tensor(2., dtype=torch.float64))
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or accumulation_dtype(device)
        self.means = Moments(dim, device, dtype)
        self.within = torch.zeros(dim, dim, dtype=dtype, device=device)
        self.degrees = torch.zeros((), dtype=dtype, device=device)

    @classmethod
    def from_states(cls, states: dict[str, Tensor]) -> ViewMoments:
        """The accumulator whose :meth:`states` these are (the tensors themselves, not copies)."""
        moments = cls.__new__(cls)
        moments.means = Moments.from_states(states)
        moments.within, moments.degrees = states["within"], states["degrees"]
        return moments

    def states(self) -> dict[str, Tensor]:
        """The tensors by name: all there is to save or to send."""
        return {**self.means.states(), "within": self.within, "degrees": self.degrees}

    @torch.no_grad()
    def update(self, views: Tensor) -> None:
        """Add samples.

        Args:
            views: Shape ``(Q, N, D)`` with ``Q >= 2``, any floating dtype: every view of ``N`` samples, in one order.

        Raises:
            ValueError: If the shape does not fit.
        """
        dim = len(self.within)
        if views.ndim != 3 or len(views) < 2 or views.shape[2] != dim:
            raise ValueError(
                f"`views` must have shape (Q, N, {dim}) with at least two views, got {tuple(views.shape)}."
                " Stack the views of the same samples."
            )
        self._update(views)

    @full_precision
    def _update(self, views: Tensor) -> None:
        views = views.to(self.within.dtype)
        whole = views.sum(dim=(0, 2)).isfinite()  # a sum is finite if and only if its terms are
        views = torch.where(whole.unsqueeze(-1), views, 0.0)
        means = views.mean(dim=0)
        apart = (views - means).flatten(0, 1)
        self.means.update(means, whole)
        self.within = torch.addmm(self.within, apart.T, apart)
        self.degrees = self.degrees + (len(views) - 1) * whole.sum()

    def merge(self, other: ViewMoments) -> ViewMoments:
        """Statistics of both streams together."""
        states = self.means.merge(other.means).states()
        sums = {"within": self.within + other.within, "degrees": self.degrees + other.degrees}
        return self.from_states({**states, **sums})

    def reduce(self, group: dist.ProcessGroup | None = None) -> ViewMoments:
        """Statistics of all processes together; collective, see :func:`reduce_view_moments`."""
        [reduced] = reduce_view_moments([self], group)
        return reduced

    @full_precision
    def covariances(self) -> tuple[Tensor, Tensor]:
        r""":math:`\Sigma_b` over ``n - 1`` and :math:`\Sigma_w` over its degrees of freedom, ``(D, D)`` each."""
        gram, _ = self.means.gram()
        return gram / (self.means.count - 1).clamp_min(1), self.within / self.degrees.clamp_min(1)


def reduce_view_moments(moments: Sequence[ViewMoments], group: dist.ProcessGroup | None = None) -> list[ViewMoments]:
    """Statistics of all processes together, of several streams at once.

    Collective: every process must call it, with the same widths in the same order; three all-reduces in all, of
    ``2 D ** 2 + 2 D + 4`` numbers a stream.

    Example:
        >>> moments = ViewMoments(1)
        >>> moments.update(torch.tensor([[[1.0], [5.0]], [[3.0], [5.0]]]))
        >>> reduce_view_moments([moments])[0].within
        tensor([[2.]], dtype=torch.float64)
    """
    means = reduce_moments([m.means for m in moments], group)
    parts = [torch.cat([m.within.flatten(), m.degrees[None]]) for m in moments]
    sums = torch.split(all_reduce_sum(torch.cat(parts), group), [len(part) for part in parts])
    return [
        ViewMoments.from_states({**mean.states(), "within": of[:-1].view_as(m.within), "degrees": of[-1]})
        for m, mean, of in zip(moments, means, sums, strict=True)
    ]
