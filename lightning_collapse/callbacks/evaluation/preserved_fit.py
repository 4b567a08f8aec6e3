"""Preserved fit: the model on data of its own, in the middle of a fit that must not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

from lightning_collapse.utilities.distributed import max_over_processes, world_size
from lightning_collapse.utilities.loaders import Loader, batches_of, rewound
from lightning_collapse.utilities.optimizers import evaluation_weights
from lightning_collapse.utilities.preserved_state import preserved_state
from lightning_collapse.utilities.trainer import to_device

_END = object()


@contextmanager
def preserved_fit(trainer: Trainer, pl_module: nn.Module, gradients: bool = False) -> Iterator[None]:
    """A pass over data in the middle of a fit: :func:`preserved_state`, while the trainer says that it validates.

    Optimizers that keep other weights for training than for use (those with ``train()`` and ``eval()``, such as
    schedule-free ones) put the latter in place meanwhile, and the training goes on from exactly those it had.

    Args:
        trainer: Whose stage is put back.
        pl_module: Whose state is put back.
        gradients: Whether a graph is built.
    """
    stage = trainer.state.stage
    try:
        with (
            preserved_state(pl_module, gradients=gradients, autocast=True),
            evaluation_weights(trainer.optimizers),
        ):
            trainer.state.stage = RunningStage.VALIDATING  # hooks that augment a batch ask `trainer.training`
            yield
    finally:
        trainer.state.stage = stage


def batches_on_device(loader: Loader, trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[Any, bool]]:
    """Batches on the device, and whether each counts; generators of a ``DataLoader`` are put back afterwards.

    Where parameters are sharded a forward is collective: processes with fewer batches get their last one again, which
    does not count then. A forward that raises on some processes only cannot be mended there.
    """
    loader = batches_of(loader)
    with rewound(loader):
        batches = (to_device(trainer, batch) for batch in islice(loader, int(trainer.fast_dev_run) or None))
        sharded = world_size() > 1 and any(hasattr(weight, "full_tensor") for weight in pl_module.parameters())
        yield from _together(batches, pl_module.device) if sharded else ((batch, True) for batch in batches)


def _together(batches: Iterator[Any], device: torch.device) -> Iterator[tuple[Any, bool]]:
    """As many batches on every process; the last one again, and not to be counted, where there are fewer."""
    batch, problem = _END, None
    while True:
        try:
            fresh = next(batches, _END)
        except Exception as error:
            fresh, problem = _END, error
        counts = fresh is not _END
        batch = fresh if counts else batch
        more, failed = max_over_processes([counts, problem is not None or batch is _END], device)
        if problem is not None:
            raise problem
        if not more:
            return
        if failed:
            raise RuntimeError("a process has no batches")
        yield batch, counts
