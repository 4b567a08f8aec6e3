"""Memory consolidation (LifeAlign): when a task ends, its change of each matrix without noise and past directions."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.functional.task_weights.consolidated_update import consolidated_update
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.modules import clean_name
from lightning_collapse.utilities.parameters import real_parameters
from lightning_collapse.utilities.trainer import refuse_sharded


class ConsolidateUpdate(TaskAware):
    r"""Keeps of the change of each matrix in a task the large singular values, and little along past changes.

    .. math:: W \leftarrow W_{\text{before}} + \Delta'

    with :func:`~lightning_collapse.functional.task_weights.consolidated_update`. Published for low-rank adapters, where
    ``lora_A`` and ``lora_B`` are matrices of their own; convolutions are ``(O, I k k)``. ``energy=1, gamma=1`` changes
    no bit. Put it before callbacks that measure or remember a task when that ends. Kept, and in the state, are one copy
    of the chosen matrices and another for every task that has ended, in ``float32`` on the host.

    Args:
        energy: Share of the squared singular values of a change to keep.
        gamma: What stays along past changes: 0 none of it, 1 all.
        parameters: Names, or glob patterns of them, of trainable parameters of two or more dimensions; all of these by
            default.

    Raises:
        ValueError: If ``energy`` is not above 0 and up to 1, ``gamma`` not from 0 to 1, or ``parameters`` no list.
        MisconfigurationException: When the fit starts, if a pattern matches none, parameters are sharded, or an
            optimizer is schedule-free.

    References:
        *LifeAlign*, AAAI 2026; both defaults of the code at https://github.com/real-ljs/LifeAlign.

    Example::

        consolidate = ConsolidateUpdate()  # or of adapters alone: parameters=["*lora_A*", "*lora_B*"]
        fit_tasks(lambda: Trainer(max_epochs=1, callbacks=[consolidate, metrics]), model, tasks)
    """

    changes_weights = True

    def __init__(self, energy: float = 0.9, gamma: float = 0.1, parameters: Sequence[str] | None = None) -> None:
        super().__init__()
        if not 0 < energy <= 1:
            raise ValueError(f"`energy` must be above 0 and at most 1, got {energy}.")
        if not 0 <= gamma <= 1:
            raise ValueError(f"`gamma` must be from 0 to 1, got {gamma}.")
        check_layers(parameters, "every trainable matrix", name="parameters")
        self.energy, self.gamma, self.parameters = energy, gamma, parameters
        self._matrices: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._past: dict[str, Tensor] = {}

    @override
    def _without_fit(self) -> dict[str, Any]:
        return super()._without_fit() | {"_matrices": {}}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(parameters=self.parameters)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        refuse_sharded(trainer, pl_module, "ConsolidateUpdate", "decomposes whole matrices")
        self._matrices = self._choose(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        kept = self._before if self._trained else {}  # of a task that is taken up again
        self._before = {name: kept.get(name, _copy(matrix)) for name, matrix in self._matrices.items()}

    @override
    @torch.no_grad()
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, matrix in self._matrices.items():
            with self.containment(f"consolidating `{name}`", "it stays as it was trained"):
                self._consolidate(name, matrix)
            self._before[name] = _copy(matrix)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._matrices = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": dict(self._before), "past": dict(self._past)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._before, self._past = dict(state_dict["before"]), dict(state_dict["past"])

    def _consolidate(self, name: str, matrix: Tensor) -> None:
        past = self._past.get(name)
        if past is not None and past.shape[1] != matrix.numel():
            rank_zero_warn(
                f"`ConsolidateUpdate`: `{name}` has {matrix.numel()} entries and had {past.shape[1]} in tasks before,"
                " whose changes are forgotten."
            )
            past = None
        change = (matrix.to(torch.float32) - self._before[name].to(matrix.device)).flatten(1)
        if not change.any():
            return
        new = consolidated_update(change, past, self.energy, self.gamma)
        if not new.isfinite().all():  # waits for the device, once per task and matrix
            raise ValueError("its change is not finite")
        # what is taken away, so that what is not stays bit by bit
        matrix.add_((new - change).view_as(matrix))
        row = new.reshape(1, -1).cpu()  # waits too, once per task and matrix
        self._past[name] = row if past is None else torch.cat([past, row])

    def _choose(self, pl_module: LightningModule) -> dict[str, Tensor]:
        real = {clean_name(n): p for n, p in real_parameters(pl_module).kept.items() if not p.is_complex()}
        found = {name: p.detach() for name, p in real.items() if p.requires_grad and p.ndim > 1}
        patterns = ["*"] if self.parameters is None else self.parameters
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in found):
                raise MisconfigurationException(
                    f"`ConsolidateUpdate(parameters=[{pattern!r}])` matches no trainable parameter of two or more"
                    f" dimensions in {type(pl_module).__name__}. It has: {', '.join(found) or 'none'}."
                )
        return {
            name: matrix for name, matrix in found.items() if any(fnmatchcase(name, pattern) for pattern in patterns)
        }


def _copy(matrix: Tensor) -> Tensor:
    return matrix.detach().to("cpu", torch.float32, copy=True)
