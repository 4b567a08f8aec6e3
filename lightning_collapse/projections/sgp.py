"""Scaled gradient projection (SGP): the more an input direction means to old tasks, the less weights move along it."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lightning_collapse.functional.projection import accumulated_importance
from lightning_collapse.projections.gpm import GPM, Threshold
from lightning_collapse.projections.input_subspace import Subspace
from lightning_collapse.utilities.arguments import require_not_negative


class SGP(GPM):
    r"""Takes a share of an update out along each direction of :class:`GPM`, by how important it is [1].

    Directions of old tasks can still move by what :math:`1 - \lambda` leaves; importance adds up over tasks, see
    :func:`~lightning_collapse.functional.projection.accumulated_importance`.

    Args:
        threshold: As in :class:`GPM`.
        scale: :math:`a`; 10 in [1] on split CIFAR-100. The larger, the nearer to :class:`GPM`.
        n_samples: As in :class:`GPM`.
        released: As in :class:`GPM`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        [1] Saha & Roy, *Continual Learning with Scaled Gradient Projection*, AAAI 2023.
        https://arxiv.org/abs/2302.01386

    Example::

        trainer = Trainer(callbacks=[Projection(SGP(scale=10.0))])
    """

    def __init__(
        self,
        threshold: Threshold | None = None,
        scale: float = 10.0,
        n_samples: int = 300,
        released: bool = False,
    ) -> None:
        super().__init__(threshold, n_samples, released)
        require_not_negative(scale=scale)
        self.scale = scale

    @override
    def grow(self, second_moment: Tensor, known: Subspace) -> Subspace:
        directions = self._grown(second_moment, known)
        return Subspace(directions, accumulated_importance(second_moment, directions, known.importance, self.scale))
