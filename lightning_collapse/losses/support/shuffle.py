"""Permutations that draw from no random number generator, and losses that draw such or directions."""

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss

_BITS = 0xFFFFFFFF


class ShufflingLoss(AntiCollapseLoss):
    """A loss that draws anew, a permutation or directions, each time it is evaluated in training mode.

    It counts these evaluations, and the count decides what is drawn: the same on all processes, without a draw from
    the random numbers of the training. The count is no part of the ``state_dict``; callback and mixin
    bring it back on a resume.

    Attributes:
        step: How often it was evaluated in training mode, a 0-dimensional integer tensor.
    """

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        # a tensor, since a number that changes would have a compiled loss traced again and again
        self.register_buffer("step", torch.zeros((), dtype=torch.long), persistent=False)

    def next_step(self) -> Tensor:
        """The count as it is now, a copy; goes up by one in training mode."""
        step = self.step.clone()
        if self.training:
            self.step += 1
        return step


def permutation(length: int, step: Tensor, stream: int, device: torch.device) -> Tensor:
    """A permutation of ``range(length)`` that is decided by its arguments alone, on every device and process alike.

    Args:
        length: How many indices.
        step: 0-dimensional integer tensor; the next one gives another permutation.
        stream: So do other streams, for several permutations in one step.
        device: Where the indices are wanted.

    Returns:
        Integers, shape ``(length,)``.

    Example:
        >>> permutation(5, torch.tensor(0), 0, torch.device("cpu")).sort().values
        tensor([0, 1, 2, 3, 4])
    """
    seed = _scrambled(_scrambled(step + 1) + stream)
    # a bijection of 32-bit integers: no two keys are equal
    keys = _scrambled((torch.arange(length, device=device) + seed) & _BITS)
    return keys.argsort()


def _scrambled(values: Tensor) -> Tensor:
    """Mix the lower 32 bits; the factors are odd and so small that no product overflows 63 bits."""
    values = values & _BITS
    for factor in (0x45D9F3B, 0x119DE1F3):
        values = ((values ^ (values >> 16)) * factor) & _BITS
    return values ^ (values >> 16)
