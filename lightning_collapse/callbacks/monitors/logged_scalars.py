"""Logged scalars: which of ``trainer.callback_metrics`` were logged since they were last read."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_collapse.utilities.distributed import all_reduce_sum

VALUE, COUNT = "value", "count"


class LoggedScalars:
    """Reads named scalars of ``trainer.callback_metrics``, each only if it was logged since: the mean over processes.

    Args:
        names: Keys of ``trainer.callback_metrics``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(dict.fromkeys(names))
        self.forget()

    def forget(self) -> None:
        """A new fit begins."""
        # the tensors that were there when a metric was last read: one that was logged since is another
        self._seen: dict[str, Any] = {}

    def present(self, trainer: Trainer) -> dict[str, Any]:
        """Those that there are now."""
        metrics = trainer.callback_metrics
        return {name: metrics[name] for name in self.names if name in metrics}

    def note(self, trainer: Trainer) -> None:
        """Take what there is now for read."""
        self._seen = self.present(trainer)

    def is_fresh(self, name: str, now: dict[str, Any]) -> bool:
        """Whether it was logged since it was last read."""
        return name in now and now[name] is not self._seen.get(name)

    def readings(
        self, pl_module: LightningModule, now: dict[str, Any], names: Collection[str]
    ) -> dict[tuple[str, str], Tensor]:
        """Sums over processes of what was logged since the last reading, and how many have logged it. Collective."""
        fresh = {name for name in names if self.is_fresh(name, now)}
        self._seen |= now
        zero = torch.zeros((), device=pl_module.device)
        pairs = [
            (torch.as_tensor(now[name]).detach().to(zero).mean(), zero + 1) if name in fresh else (zero, zero)
            for name in self.names
        ]
        sums = all_reduce_sum(torch.stack([torch.stack(pair) for pair in pairs]))
        return {(name, of): sums[i, j] for i, name in enumerate(self.names) for j, of in enumerate((VALUE, COUNT))}
