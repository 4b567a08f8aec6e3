"""Jacobian homeostasis: a loss that makes the Jacobian of a vector field symmetric."""

import math

import torch
from torch import Tensor, nn

from lightning_collapse.functional.regularization.jacobian import Field, jacobian_homeostasis
from lightning_collapse.losses.support.directions import random_directions
from lightning_collapse.utilities.arguments import require_whole


class JacobianHomeostasis(nn.Module):
    r"""How far the Jacobian of a recurrent block or an equilibrium network is from symmetric, as a loss.

    .. math::
        \frac{1}{2 d} \|J - J^T\|_F^2 = \frac{1}{d}\, E_\varepsilon[\|J \varepsilon\|^2 - \varepsilon^T J^2 \varepsilon]

    by random probes, see :func:`~lightning_collapse.functional.regularization.jacobian_homeostasis`. A counter draws
    them, another set for each call in training: the random state of the training is left alone, and the counter is in
    the ``state_dict``, so that a resumed run draws what it would have drawn. It takes the field itself, and not the
    output of a layer: add it to the loss in ``training_step``. In data-parallel training every process takes the mean
    over its samples.

    The authors' weights are 1.0 for a multilayer perceptron and 15.0 for convolutions.

    Args:
        probes: How many for each call; the authors' number.
        seed: Another number draws other probes.

    Raises:
        ValueError: If ``probes`` is not a positive integer.

    References:
        Laborieux & Zenke, *Improving equilibrium propagation without weight symmetry through Jacobian homeostasis*,
        ICLR 2024. https://arxiv.org/abs/2309.02214

    Example:
        >>> homeostasis, block = JacobianHomeostasis(), nn.Linear(8, 8)
        >>> homeostasis(block, torch.zeros(4, 8)).item() > 0
        True
        >>> with torch.no_grad():
        ...     _ = block.weight.copy_(block.weight + block.weight.T)
        >>> homeostasis(block, torch.zeros(4, 8)).item() < 1e-12
        True
    """

    draws: Tensor

    def __init__(self, probes: int = 5, seed: int = 0) -> None:
        super().__init__()
        require_whole(1, probes=probes)
        self.probes, self.seed = probes, seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def forward(self, field: Field, state: Tensor) -> Tensor:
        """The loss of a field at a state, a scalar of at least ``float32``; see the function for the shapes."""
        directions = random_directions(state.numel(), self.probes, self.draws.to(state.device), self.seed)
        probes = math.sqrt(state.numel()) * directions.T.reshape(self.probes, *state.shape)
        if self.training:
            self.draws += 1
        return jacobian_homeostasis(field, state, probes.to(state.dtype))

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"probes={self.probes}, seed={self.seed}"
