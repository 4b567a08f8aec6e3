"""Herding: exemplars of each class, those whose mean features are nearest to the mean of the class (iCaRL)."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.continual.replay import Replay
from lightning_collapse.callbacks.evaluation.preserved_fit import preserved_fit
from lightning_collapse.callbacks.evaluation.task_batches import TaskBatches, check_training_data
from lightning_collapse.replay.batch_rows import leaves, map_rows
from lightning_collapse.replay.replay_buffer import ReplayBuffer
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.trainer import to_device


class Herding(Replay):
    """:class:`Replay` of exemplars that herding chooses when a task ends [1], in place of random rows.

    One more pass over the data of the task, in eval mode and without gradients, finds the features of all rows, and
    holds all of them meanwhile. The shares of the classes get smaller with every task, and the first of
    the order stay. Rows are kept as they come from the loader. Of several processes each orders its own rows, and the
    first of all stay: near to the order of one process where the parts are alike, and not equal to it.

    Args:
        buffer: With ``policy="herding"``.
        features: Returns the features of a batch, shape ``(N, D)``, from the module and the batch on its device.
        batch_size: As in :class:`Replay`.
        loader: Data of the task, without augmentation; those of the training by default.
        labels: As in :class:`Replay`.
        combine: As in :class:`Replay`.

    Raises:
        ValueError: If ``features`` is no function.
        MisconfigurationException: As :class:`Replay` does, and if the training data can be read once only.

    References:
        [1] Rebuffi et al., *iCaRL*, CVPR 2017. https://arxiv.org/abs/1611.07725

    Example::

        buffer = ReplayBuffer(size=2000, policy="herding")
        herding = Herding(buffer, features=lambda module, batch: module.encoder(batch[0]))
    """

    streams = False

    def __init__(
        self,
        buffer: ReplayBuffer,
        features: Callable[[Any, Any], Tensor],
        batch_size: int | None = None,
        loader: Loader | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(buffer, batch_size, labels=labels, **kwargs)
        if not callable(features):
            raise ValueError(f"`features` must be a function of the module and a batch, got {features!r:.80}.")
        self.features, self.loader = features, loader

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.loader is None:
            check_training_data(trainer, "`Herding`")

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self.containment(f"choosing exemplars of task {self.task_index}", "it is not rehearsed"):
            parts: list[tuple[Any, Tensor, Tensor]] = []
            device = pl_module.device if self.buffer.storage == "device" else torch.device("cpu")
            with preserved_fit(trainer, pl_module):
                for batch in TaskBatches(trainer, self.loader, raw=True):
                    rows, labels = self.buffer.check(*self._kept_of(batch))
                    # copies: what follows may change a batch in place
                    rows, labels = map_rows(lambda t: t.to(device, copy=True), rows), labels.to(device, copy=True)
                    with trainer.precision_plugin.forward_context():
                        features = self.features(pl_module, to_device(trainer, batch))
                    parts.append((rows, labels, features.detach().float()))
            if parts:
                columns = zip(*([tensor for _, tensor in leaves(rows)] for rows, *_ in parts), strict=True)
                together = iter([torch.cat(column) for column in columns])
                rows = map_rows(lambda _: next(together), parts[0][0])
                _, every_label, every_feature = zip(*parts, strict=True)
                self.buffer.add(rows, torch.cat(every_label), torch.cat(every_feature))
        super().end_task(trainer, pl_module)
