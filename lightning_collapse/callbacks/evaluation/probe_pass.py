"""Probe pass: one batch that stays the same, seen by the model in the middle of a fit that must not notice."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from inspect import signature
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_collapse.callbacks.evaluation.evaluation_pass import Inputs, has_forward
from lightning_collapse.callbacks.evaluation.preserved_fit import preserved_fit
from lightning_collapse.callbacks.evaluation.step_replay import preserved_attributes
from lightning_collapse.utilities.modules import hooks_ignored
from lightning_collapse.utilities.targets import call_on
from lightning_collapse.utilities.trainer import is_sharded
from lightning_collapse.utilities.training_step import silent, unwrapped


def caller_of(pl_module: LightningModule, inputs: Inputs | None) -> Inputs | None:
    """How a module is called on a batch: as the user says, by its training step, or by ``forward``.

    The training step of manual optimization steps itself, and is not called; ``None`` if nothing is left.
    """
    if inputs is not None:
        return inputs
    if pl_module.automatic_optimization:
        return _step
    return call_on if has_forward(pl_module) else None


def run_probe(
    trainer: Trainer, pl_module: LightningModule, call: Inputs, probe: Any, then: Callable[[], None] = lambda: None
) -> None:
    """Call the model on a probe in eval mode, with equal random numbers every time, and then a function.

    Modes, buffers, gradients, attributes, metrics and random states are put back, nothing is logged, and no hook of
    ours takes notice. A graph is built, unless parameters are sharded.
    """
    gradients = not is_sharded(trainer, pl_module)
    with (
        preserved_fit(trainer, pl_module, gradients=gradients),
        hooks_ignored(),
        preserved_attributes(pl_module),
        silent(pl_module),
    ):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        with trainer.precision_plugin.forward_context():
            call(pl_module, deepcopy(probe))
        then()


def first_samples(batch: Any, most: int) -> Any:
    """A copy of the first samples of a batch: all of it, where its tensors differ in their first dimension."""
    sizes = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim}
    cut = most if len(sizes) == 1 else None
    return apply_to_collection(batch, Tensor, lambda x: (x[:cut] if x.ndim else x).detach().clone())


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in a batch."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def plain(value: Any) -> Any:
    """What a checkpoint can hold of a batch, on the host: tensors, numbers, strings, lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return move_data_to_device(value, "cpu")
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value if isinstance(value, str | int | float) else None


def _step(pl_module: LightningModule, batch: Any) -> Any:
    step = unwrapped(pl_module, "training_step")
    return step(batch, *([0] if len(signature(step).parameters) > 1 else []))
