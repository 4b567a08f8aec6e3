"""Regenerative regularization (L2 Init): a pull toward the initial weights, which keeps a network able to learn."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.penalties.base import Parameters
from lightning_collapse.penalties.support.quadratic import QuadraticPenalty
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.registry import register_penalty


@register_penalty
class L2Init(QuadraticPenalty):
    r"""Regenerative regularization: against the loss of plasticity over many tasks [1].

    .. math:: w \|\theta - \theta_0\|^2

    with :math:`\theta_0` the weights at the very first start, through all tasks and resumed runs; what a parameter
    grows by is pulled to where it was first seen, and a frozen one is not copied before it is trained. No factor 1/2,
    as in the paper. It acts from the first step.

    Args:
        weight: ``w``. The paper chooses from 1e-2, 1e-3, 1e-4 and 1e-5.

    References:
        [1] Kumar, Marklund & Van Roy, *Maintaining plasticity in continual learning via regenerative regularization*,
        2023. https://arxiv.org/abs/2308.11958

    Example:
        >>> import torch
        >>> weights, penalty = {"w": torch.zeros(3, requires_grad=True)}, L2Init(weight=0.5)
        >>> penalty.start(weights)
        >>> with torch.no_grad():
        ...     _ = weights["w"].fill_(2.0)
        >>> penalty.value(weights).item()
        6.0
        >>> penalty.add_gradients(weights)
        >>> weights["w"].grad
        tensor([2., 2., 2.])
    """

    remembers = "the weights before the first step"
    source = "Kumar et al., 2023, arXiv 2308.11958"
    known_by = "anchor"

    def __init__(self, weight: float = 1e-2) -> None:
        super().__init__(weight)

    @override
    def start(self, parameters: Parameters) -> None:
        super().start(parameters)
        self._take_anchors(parameters)

    @override
    def add_gradients(self, parameters: Parameters, scale: Tensor | None = None) -> None:
        self._take_anchors(parameters)  # of those that were frozen until now
        super().add_gradients(parameters, scale)

    @override
    def consolidate(self, model: nn.Module, loader: Loader | None = None) -> None:
        """Nothing: one task is like another."""

    @override
    def _importances(self, parameters: Parameters) -> list[Tensor] | None:
        return None
