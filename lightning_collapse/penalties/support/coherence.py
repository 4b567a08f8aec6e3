"""Gradient coherence: how near to rank one a Fisher information is, from what a Fisher pass has at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_collapse.functional.sample_gradients import rank_one_share
from lightning_collapse.utilities.modules import clean_name

SAMPLES = 128
"""Up to so many of each process, whole batches, tell: of more every sum of gradients would cost a backward pass."""


class Coherence:
    """Sums over the first samples of a pass, by name of the parameter.

    Attributes:
        sums: Of gradients.
        squares: Of their squared norms, 0-dimensional.
        count: How many samples.
    """

    def __init__(self, zeros: Mapping[str, Tensor]) -> None:
        self.sums = dict(zeros)
        self.squares = {name: zero.new_zeros(()) for name, zero in zeros.items()}
        self.count = 0

    @property
    def complete(self) -> bool:
        """Whether there are enough."""
        return self.count >= SAMPLES

    def shares(
        self, reduced: Callable[..., tuple[list[Tensor], list[int]]], names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Of every module with parameters of its own, and of all as ``"all"``. Collective.

        Args:
            reduced: Sums tensors and a number over processes.
            names: Parameters whose norms are known; a module with another one is left out.

        Returns:
            0-dimensional, by clean name of the module; parameters of the model itself are those of ``"self"``.
        """
        totals, [count] = reduced([*self.sums.values(), torch.stack(list(self.squares.values()))], self.count)
        means = torch.stack([(value / count).square().sum() for value in totals[:-1]])
        squares = totals[-1].to(means) / count
        modules: dict[str, list[int]] = {"all": list(range(len(means)))}
        unknown: set[str] = set()
        for i, name in enumerate(self.sums):
            module = clean_name(name).rpartition(".")[0] or "self"
            modules.setdefault(module, []).append(i)
            unknown |= set() if names is None or name in names else {module, "all"}
        return {
            module: rank_one_share(means[own].sum(), squares[own].sum(), count)
            for module, own in modules.items()
            if module not in unknown
        }
