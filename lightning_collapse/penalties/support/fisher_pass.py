"""Fisher pass: one over a loader that sums something over the gradients of its samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning_utilities import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_collapse.penalties.support.coherence import Coherence
from lightning_collapse.penalties.support.output_gradients import Columns
from lightning_collapse.penalties.support.per_sample import METHODS, PerSampleGradients, check_outputs
from lightning_collapse.penalties.support.real_parameters import real_ones
from lightning_collapse.penalties.support.sample_gradients import Power, dense
from lightning_collapse.utilities.distributed import all_reduce_sum, max_over_processes, world_size
from lightning_collapse.utilities.loaders import Loader, batches_of, rewound
from lightning_collapse.utilities.preserved_state import preserved_state
from lightning_collapse.utilities.targets import call_on

Outputs = Callable[[Any, Any], Tensor]
PATIENCE = 10.0
"""Seconds between two messages of a pass that takes long."""


class Sums(NamedTuple):
    """What a pass brought, of all processes.

    Attributes:
        values: Sums by name of the parameter.
        samples: How many.
        batches: How many.
        methods: How the gradients of each parameter were found.
    """

    values: dict[str, Tensor]
    samples: int
    batches: int
    methods: dict[str, str]


class FisherPass:
    """A pass over a loader in eval mode that the model, the loader and the random states do not notice.

    Args:
        model: Whose gradients; on the device that batches are moved to.
        loader: Batches, or a function that returns them; of each process its own.
        outputs: How the model is called on a batch, by default
            :func:`~lightning_collapse.utilities.targets.call_on`.
        parameters: Glob patterns of parameter names; all that require a gradient by default.
        n_samples: How many samples, of all processes together; the first ones of each loader.
        chunk_size: Samples at a time where gradients of samples are computed one by one.

    Raises:
        ValueError: If a number is not positive, a pattern matches nothing, nothing requires a gradient, or parameters
            are sharded otherwise than by ``fully_shard``.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        outputs: Outputs | None = None,
        parameters: Sequence[str] | None = None,
        n_samples: int | None = None,
        chunk_size: int = 32,
    ) -> None:
        for name, number in (("n_samples", n_samples), ("chunk_size", chunk_size)):
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        self.model, self.loader, self.outputs = model, loader, outputs or call_on
        self.parameters = trainable(model, parameters)
        sharded = [name for name, parameter in self.parameters.items() if hasattr(parameter, "full_tensor")]
        if sharded:
            raise ValueError(
                f"`model`: {sharded[0]!r} is a DTensor that `fully_shard` has not made, and a sample's gradient needs"
                " whole weights. Load them into a model that is not sharded and pass that one."
            )
        self.n_samples, self.chunk_size = n_samples, chunk_size
        self.device = next(iter(self.parameters.values())).device
        self._started = self._told = time.monotonic()

    @contextmanager
    def engine(self) -> Iterator[PerSampleGradients]:
        """The model, ready for :meth:`each`."""
        with (
            preserved_state(self.model),
            PerSampleGradients(self.model, self.outputs, self.parameters, self.chunk_size) as engine,
        ):
            yield engine

    def zeros(self) -> dict[str, Tensor]:
        """A zero for every parameter, at least ``float32``."""
        return {
            name: torch.zeros_like(
                parameter,
                dtype=torch.promote_types(parameter.dtype, torch.float32),
                memory_format=torch.contiguous_format,
                requires_grad=False,
            )
            for name, parameter in self.parameters.items()
        }

    def each(self, forward: Callable[[Any], Tensor]) -> Iterator[tuple[Any, Tensor, int]]:
        """Every batch, what the model returns on it, and how many of its rows count."""
        left = _share(self.n_samples)
        loader = batches_of(self.loader)
        done = 0
        with rewound(loader):
            for batch in () if left == 0 else loader:
                batch = apply_to_collection(batch, Tensor, lambda tensor: tensor.to(self.device, non_blocking=True))
                outputs = forward(batch)
                rows = len(outputs) if left is None else min(len(outputs), left)
                yield batch, outputs, rows
                done += rows
                self._tell(done)
                if left is not None and (left := left - rows) == 0:
                    break

    def batch_gradients(self, column_of: Callable[[Any, Tensor], Tensor]) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Of every batch the gradients that autograd sums over its samples, at least ``float32``, and their number.

        Args:
            column_of: What is sent back, of a batch and what the model returns on it.
        """

        def forward(batch: Any) -> Tensor:
            outputs = self.outputs(self.model, batch)
            check_outputs(outputs)
            return outputs

        with preserved_state(self.model):
            for batch, outputs, rows in self.each(forward):
                yield self.gradients(outputs, column_of(batch, outputs), rows), rows

    def gradients(self, outputs: Tensor, column: Tensor, rows: int) -> dict[str, Tensor]:
        """What autograd sums over the first rows of a batch, at least ``float32``; the graph is gone then."""
        column[rows:] = 0
        leaves = list(self.parameters.values())
        found = torch.autograd.grad(outputs, leaves, column.to(outputs.dtype), allow_unused=True)
        pairs = zip(self.parameters, found, strict=True)
        return {name: dense(gradient) for name, gradient in pairs if gradient is not None}

    def _tell(self, done: int) -> None:
        now = time.monotonic()
        if now - self._told > PATIENCE:
            self._told = now
            of = "" if self.n_samples is None else f" of {_share(self.n_samples)}"
            rank_zero_info(f"Importances of weights: {done}{of} samples after {now - self._started:.0f} s.")

    def summed(self, values: Mapping[str, Tensor], count: int, batches: int, methods: Mapping[str, str]) -> Sums:
        """Sums of all processes. Collective."""
        names = list(values)
        totals, (samples, total_batches) = self.reduced([values[name] for name in names], count, batches)
        return Sums(dict(zip(names, totals, strict=True)), samples, total_batches, self.agreed(methods))

    def agreed(self, methods: Mapping[str, str]) -> dict[str, str]:
        """Of each parameter the slowest method of any process: one without a sample knows of none. Collective."""
        found = max_over_processes([METHODS.index(method) for method in methods.values()], self.device)
        return {name: METHODS[int(i)] for name, i in zip(methods, found, strict=True)}

    def reduced(self, values: Sequence[Tensor], *counts: int) -> tuple[list[Tensor], list[int]]:
        """Tensors and whole numbers summed over processes. Collective.

        Raises:
            ValueError: If the first number, of samples, is 0.
        """
        totals = [all_reduce_sum(value) for value in values]
        numbers: list[int] = all_reduce_sum(torch.tensor(counts, device=self.device)).tolist()
        if not numbers[0]:
            raise ValueError("`loader` brought no samples. Is it a generator that was used up before?")
        return totals, numbers

    def sums(
        self,
        columns_of: Callable[[Any, Tensor], Columns],
        power: Power,
        coherence: Coherence | None = None,
    ) -> Sums:
        """Sums over samples and columns; ``coherence``, for squares of one column, gets the first ones. Collective."""
        count, batches = 0, 0
        with self.engine() as engine:
            totals = self.zeros()
            for batch, outputs, rows in self.each(engine.forward):
                engine.sums = {} if coherence is None or coherence.complete else coherence.sums
                engine.add_to(totals, outputs, columns_of(batch, outputs), rows, power)
                count, batches = count + rows, batches + 1
                if coherence is not None and engine.sums:
                    coherence.squares, coherence.count = {name: t.sum() for name, t in totals.items()}, count
        return self.summed(totals, count, batches, engine.methods)


def trainable(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Real parameters that require a gradient, tied ones once, by name.

    Raises:
        ValueError: If a pattern matches no parameter, or nothing is left.
    """
    names: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"`parameters`: {pattern!r} matches no parameter of {type(model).__name__} that requires a gradient."
                f" It has: {', '.join(names)}."
            )
    if patterns is not None:
        names = {name: value for name, value in names.items() if any(fnmatchcase(name, p) for p in patterns)}
    names = real_ones(names)
    if not names:
        raise ValueError(f"`model`: {type(model).__name__} has no parameter that requires a gradient.")
    return names


def _share(n_samples: int | None) -> int | None:
    if n_samples is None:
        return None
    ranks = world_size()
    rank = dist.get_rank() if ranks > 1 else 0
    return n_samples // ranks + (rank < n_samples % ranks)
