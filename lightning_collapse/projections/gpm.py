"""Gradient projection memory (GPM): weights do not move where most of the inputs of old tasks lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_collapse.functional.projection import input_directions
from lightning_collapse.projections.input_subspace import InputSubspace, Subspace

Threshold = float | Callable[[int], float]
"""A number, or a function of the index of the task, from 0."""


class GPM(InputSubspace):
    """Protects the fewest directions that hold a share of the energy of every layer's inputs [1].

    Args:
        threshold: The share, above 0 and at most 1, or a function of the task index. Published are 0.95 to 0.99 on
            permuted MNIST, ``lambda t: 0.97 + 0.003 * t`` on split CIFAR-100, the default.
        n_samples: How many samples of a task are read; 125 to 300 in the authors' code.
        released: Whether the first task keeps one direction fewer than the criterion says, as in the authors' code.

    Raises:
        ValueError: If an argument is out of range.

    References:
        [1] Saha, Garg & Roy, *Gradient Projection Memory for Continual Learning*, ICLR 2021.
        https://arxiv.org/abs/2103.09762

    Example:
        >>> layer, inputs = torch.nn.Linear(3, 2), torch.eye(3)[:2]
        >>> gpm = GPM(threshold=1.0)
        >>> gpm.start(layer)
        >>> gpm.learn(layer, [inputs])
        >>> gpm.readings()[""]["rank"]
        2.0
        >>> before, old = {name: p.detach().clone() for name, p in gpm.parameters.items()}, layer(inputs)
        >>> with torch.no_grad():
        ...     _ = layer.weight.add_(torch.ones(2, 3)), layer.bias.add_(1.0)
        >>> gpm.project_(gpm.parameters, before)
        >>> torch.allclose(layer(inputs), old)
        True
    """

    def __init__(self, threshold: Threshold | None = None, n_samples: int = 300, released: bool = False) -> None:
        super().__init__(n_samples)
        if not callable(threshold) and threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"`threshold` is a share of energy, above 0 and at most 1, got {threshold}.")
        self.threshold = threshold
        self.released = released

    @override
    def grow(self, second_moment: Tensor, known: Subspace) -> Subspace:
        directions = self._grown(second_moment, known)
        return Subspace(directions, torch.ones_like(directions[0]))

    def _grown(self, second_moment: Tensor, known: Subspace) -> Tensor:
        threshold = self.threshold
        if threshold is None:
            threshold = min(0.97 + 0.003 * self.learned, 1.0)
        elif callable(threshold):
            threshold = threshold(self.learned)
        released = self.released and not self.learned
        new = input_directions(second_moment, known.directions, threshold, released)
        return torch.cat([known.directions, new], dim=1)
