"""Task data: the batches of the task that ends, once more, in the middle of a fit that must not notice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_collapse.replay.replay_buffer import ReplayLoader
from lightning_collapse.utilities.loaders import Loader, batches_of, rewound
from lightning_collapse.utilities.trainer import batches_of_epoch, to_device


class TaskBatches:
    """Batches as a training step would get them, as often as they are iterated over.

    Without a loader those of the training, as many as an epoch has. Rows that a replay buffer holds as they were behind
    the hooks before the transfer do not go through these again. What a ``DistributedSampler`` repeats, so that all
    processes get equally many samples, is left out; samplers of other kinds are taken as they are.

    Args:
        trainer: Whose data.
        loader: Batches, or a function that returns them; ``None`` for the training data.
        limit: How many batches at most.
    """

    def __init__(self, trainer: Trainer, loader: Loader | None = None, limit: int | None = None) -> None:
        self.trainer = trainer
        self.loader = loader
        self.limit = limit

    def __iter__(self) -> Iterator[Any]:
        limit = self.limit or int(self.trainer.fast_dev_run) or None
        if self.loader is None:
            loader: Iterable[Any] = batches_of(_unrepeated(self.trainer.train_dataloader))
            limit = batches_of_epoch(self.trainer)
        else:
            loader = batches_of(self.loader)
        prepared = isinstance(loader, ReplayLoader) and loader.buffer.storage == "device"
        with rewound(loader):
            for batch in islice(loader, limit):
                yield to_device(self.trainer, batch, prepared)


def check_training_data(trainer: Trainer, who: str) -> None:
    """Refuse training data that no one can pass over alone.

    Raises:
        MisconfigurationException: If there are several loaders, or an iterator, used up by the time the task ends.
    """
    if isinstance(trainer.train_dataloader, Iterator):
        raise MisconfigurationException(
            f"{who} reads the data of a task when it ends, and the training data are an iterator, which can be read"
            " once only. Say what to read: `loader=...`, an iterable of batches or a function that returns one."
        )
    if isinstance(trainer.train_dataloader, Mapping | Sequence):
        raise MisconfigurationException(
            f"{who} reads the data of a task when it ends, and the training has several loaders. Say which:"
            " `loader=...`, an iterable of batches or a function that returns one."
        )


def _unrepeated(loader: Any) -> Any:
    sampler = getattr(loader, "sampler", None)
    plain = type(loader) is DataLoader and type(loader.batch_sampler) is BatchSampler
    if not plain or type(sampler) is not DistributedSampler or len(sampler.dataset) < sampler.num_replicas:  # type: ignore[arg-type]
        return loader
    once = UnrepeatedDistributedSampler(
        sampler.dataset, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
    )
    once.set_epoch(sampler.epoch)
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        sampler=once,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )
