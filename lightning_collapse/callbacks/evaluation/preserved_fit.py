"""The model on data of its own, in the middle of a fit that must not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_collapse.utilities.distributed import max_over_processes, world_size
from lightning_collapse.utilities.loaders import Loader, batches_of, rewound
from lightning_collapse.utilities.trainer import to_device

_END = object()


@contextmanager
def unnoticed(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Put random states, the trainer's stage, training flags and gradients back as they were."""
    flags = [(module, module.training) for module in pl_module.modules()]
    gradients = [(parameter, parameter.grad) for parameter in pl_module.parameters()]
    stage = trainer.state.stage
    try:
        with isolate_rng():
            trainer.state.stage = RunningStage.VALIDATING  # hooks that augment a batch ask `trainer.training`
            for parameter, _ in gradients:
                parameter.grad = None  # a backward pass would add to what is there
            yield
    finally:
        trainer.state.stage = stage
        for module, flag in flags:
            module.training = flag
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def undisturbed(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Eval mode without gradients, and all as it was afterwards."""
    with unnoticed(trainer, pl_module), torch.no_grad():
        for module in pl_module.modules():
            module.training = False  # not by `eval()`: a `train` that changes weights could not be taken back
        yield


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
