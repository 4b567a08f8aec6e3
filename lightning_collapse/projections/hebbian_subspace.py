"""Hebbian subspace (HLOP): principal input directions by Oja's rule, for layers too wide to decompose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_collapse.functional.projection import deflated, oja_directions
from lightning_collapse.projections.input_subspace import InputSubspace, Subspace
from lightning_collapse.spectral.eigenvalues import eigenvectors
from lightning_collapse.utilities.arguments import require_whole


class HebbianSubspace(InputSubspace):
    """Protects a number of principal input directions per task, found by Oja's rule [1].

    The authors learn lateral weights batch by batch beside the network, and project what the gradient is made of, which
    leaks with momentum. Here the same rule runs on the second moment of all that :meth:`learn` reads, and the update is
    projected.

    Args:
        number: How many directions every task adds to each layer, as far as there are any, or a function of the task
            index; published for three layers on CIFAR-100 are 6, 100 and 200, then 2, 20 and 40.
        steps: How many steps of the rule at most.
        n_samples: How many samples of a task are read.

    Raises:
        ValueError: If an argument is no positive integer.

    References:
        [1] Xiao et al., *Hebbian Learning based Orthogonal Projection for Continual Learning of Spiking Neural
        Networks*, ICLR 2024. https://arxiv.org/abs/2402.11984

    Example::

        trainer = Trainer(callbacks=[Projection(HebbianSubspace(lambda task: 20 if task else 100))])
    """

    def __init__(self, number: int | Callable[[int], int] = 20, steps: int = 2000, n_samples: int = 300) -> None:
        super().__init__(n_samples)
        require_whole(1, steps=steps)
        if not callable(number):
            require_whole(1, number=number)
        self.number = number
        self.steps = steps

    @override
    def grow(self, second_moment: Tensor, known: Subspace) -> Subspace:
        number = self.number(self.learned) if callable(self.number) else self.number
        width, rank = known.directions.shape
        rest = deflated(second_moment, known.directions)
        new = oja_directions(rest, min(number, width - rank), steps=self.steps)
        energies, turns = eigenvectors(new.T @ rest @ new)  # as small as the number of directions
        there = energies > width * torch.finfo(energies.dtype).eps * second_moment.trace()
        directions = torch.cat([known.directions, (new @ turns)[:, there]], dim=1)
        return Subspace(directions, torch.ones_like(directions[0]))
