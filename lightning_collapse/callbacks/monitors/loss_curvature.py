"""Loss curvature: the sharpness of what a module trains on, in the middle of a fit that does not notice."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from math import isfinite, nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_collapse.monitoring.graph_call import pack, unpack
from lightning_collapse.monitoring.optimizer_facts import facts_of, second_moment
from lightning_collapse.monitoring.sharpness import Sharpness
from lightning_collapse.utilities.modules import hooks_ignored
from lightning_collapse.utilities.preserved_state import preserved_state
from lightning_collapse.utilities.trainer import is_sharded
from lightning_collapse.utilities.training_step import silent

_LAYER = "all"


class LossCurvature:
    """Keeps the first batch of a fit and reads the sharpness of its loss.

    Args:
        trainer: Of the fit that starts.
        pl_module: Its module.

    Raises:
        MisconfigurationException: Where the loss cannot be computed again: under manual optimization, where weights
            are sharded, and in half precision.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        problem = ""
        if not pl_module.automatic_optimization:
            problem = "the training step of manual optimization steps itself"
        elif is_sharded(trainer, pl_module):
            problem = "no process has whole weights"
        elif any(p.dtype not in (torch.float32, torch.float64) for p in parameters):
            problem = "differences need weights of 32 bits, all of them real"
        if problem:
            raise MisconfigurationException(
                f"`UpdateMonitor(sharpness=True)`: {problem}. Leave `sharpness` out, or train so that it can be read."
            )
        self._module, self._parameters = pl_module, parameters
        self._batch: Any = None
        self._sharpness = Sharpness(self._loss, parameters)

    def keep(self, batch: Any) -> None:
        """Copy a batch, if it is the first."""
        if self._batch is None:
            self._batch = (deepcopy(batch),)

    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[tuple[str, str], Tensor]:
        """Sharpness and edge, by layer and measure. Collective."""
        if self._batch is None:
            return {}
        device = pl_module.device
        scale, edges = self._settings(trainer)
        readings = {}
        with preserved_state(pl_module), hooks_ignored(), silent(pl_module):
            readings["raw"] = self._sharpness.measure("raw").to(device)
            if scale:
                readings["preconditioned"] = self._sharpness.measure("preconditioned", scale).to(device)
        known = [edge for edge in edges if isfinite(edge)]
        readings["edge"] = torch.tensor(min(known) if known else nan, dtype=torch.float64)
        return {(_LAYER, name): value for name, value in readings.items()}

    def state(self) -> dict[str, Any]:
        """Batch and directions, as tensors and a string; waits for the device, when a checkpoint is saved alone."""
        tensors: list[Tensor | None] = []
        note = "" if self._batch is None else pack(self._batch, tensors)
        vectors = {name: [x.cpu() for x in vector] for name, vector in self._sharpness.vectors.items()}
        batch = [None if x is None else x.cpu() for x in tensors]
        return {"note": note, "batch": batch, "vectors": vectors, "shifts": dict(self._sharpness.shifts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was called."""
        device = self._module.device
        if state["note"]:
            self._batch = unpack(state["note"], [None if x is None else x.to(device) for x in state["batch"]])
        self._sharpness.shifts = dict(state["shifts"])
        self._sharpness.vectors = {
            name: [x.to(p) for x, p in zip(vector, self._parameters, strict=True)]
            for name, vector in state["vectors"].items()
        }

    def _settings(self, trainer: Trainer) -> tuple[dict[int, Tensor], list[float]]:
        """Adam's scale of every parameter, and the edges of those that move."""
        index, edges = {id(p): i for i, p in enumerate(self._parameters)}, []
        scale: dict[int, Tensor] = {}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                facts = facts_of(optimizer, group)
                edges.append(facts.edge)
                for parameter in group["params"] if facts.adaptive else ():
                    second = second_moment(optimizer, group, parameter)
                    if second is not None and id(parameter) in index:
                        root = second.to(parameter).sqrt() + float(group["eps"])
                        # what no gradient reaches does not move
                        scale[index[id(parameter)]] = torch.where(second > 0, root.rsqrt(), 0.0)
        return scale, edges

    def _loss(self) -> Tensor:
        # of the class: the instance may have what other callbacks wrap around it
        step = type(self._module).training_step
        [batch] = self._batch
        wants_index = len(inspect.signature(step).parameters) > 2
        found: Any = step(self._module, deepcopy(batch), *([0] if wants_index else []))
        loss: Tensor = found["loss"] if isinstance(found, Mapping) else found
        return loss
