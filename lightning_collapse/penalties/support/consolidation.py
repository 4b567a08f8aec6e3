"""Consolidation: what penalties share that learn from a model's output on data when a task ends."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, islice
from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_collapse.penalties.base import Parameters, Penalty
from lightning_collapse.penalties.support.fisher_pass import Outputs
from lightning_collapse.penalties.support.output_gradients import Estimator
from lightning_collapse.penalties.support.shards import Layout
from lightning_collapse.utilities.distributed import max_over_processes
from lightning_collapse.utilities.loaders import Loader, batches_of, rewound
from lightning_collapse.utilities.modules import clean_name
from lightning_collapse.utilities.preserved_state import preserved_state
from lightning_collapse.utilities.sharding import unsharded
from lightning_collapse.utilities.targets import call_on

FEW_CLASSES = 20
"""Up to so many classes the exact Fisher information, which takes one backward pass for each, is the default."""


def check_loader(penalty: Penalty, loader: Loader | None) -> Loader:
    """Refuse to learn from nothing.

    Raises:
        ValueError: If there are no data.
    """
    if loader is None:
        raise ValueError(f"`{type(penalty).__name__}` reads data when a task ends. Pass it a loader.")
    return loader


def check_unsharded(penalty: Penalty, parameters: Parameters) -> None:
    """Refuse sharded parameters, at the start and not only when a task has been trained.

    Raises:
        ValueError: If a parameter is sharded.
    """
    for name, parameter in parameters.items():
        if hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"`{type(penalty).__name__}` multiplies whole weights with one another, and `{name}` is sharded. Use"
                " `EWC`, whose pull on a weight depends on no other one, or `strategy='ddp'`."
            )


def check_optimizers(penalty: Penalty, optimizers: Iterable[Any]) -> None:
    """Refuse optimizers whose steps do not lead to the weights that are used in the end.

    Raises:
        ValueError: If the penalty follows steps, and an optimizer has ``train()`` and ``eval()``.
    """
    for optimizer in optimizers if penalty.follows_steps else ():
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise ValueError(
                f"`{type(penalty).__name__}` follows weights from step to step, and {type(optimizer).__name__} replaces"
                " them by others when training ends. Use `EWC` or `MAS`, which read data then."
            )


def check_gathers(model: nn.Module) -> None:
    """Refuse shards that cannot be gathered, at the start and not only when a task has been trained. Collective.

    Raises:
        ValueError: If a parameter is sharded otherwise than by ``fully_shard``.
    """
    with unsharded(model):
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "full_tensor"):
                raise ValueError(
                    f"it needs gradients of single samples, and `{clean_name(name)}` is a DTensor that `fully_shard`"
                    " has not made. Use `SynapticIntelligence` or `RWalk`, which read none, or `strategy='ddp'`."
                )


def names_of(model: nn.Module, known: Collection[Any]) -> dict[str, str]:
    """Names in a model of parameters that can be trained, and what they are called without marks of compilation."""
    named = {name: clean_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: clean for name, clean in named.items() if clean in known}


def parts_of(values: Mapping[str, Tensor], parameters: Parameters) -> dict[str, Tensor]:
    """Of whole tensors what belongs to this process's parts of parameters. Collective if these are sharded."""
    return {name: Layout.of(parameters[name]).cut(value) for name, value in values.items()}


def is_finite(penalty: Penalty, parts: Iterable[Tensor]) -> bool:
    """Whether what was found for a task can be remembered, on every process; else there is a warning. Collective."""
    parts = list(parts)
    device = parts[0].device if parts else torch.device("cpu")
    if max_over_processes([not all(part.isfinite().all() for part in parts)], device) != [True]:
        return True
    warnings.warn(
        f"`{type(penalty).__name__}`: the importance of weights for the task that ends is not finite; the task is not"
        " remembered, those before it are.",
        stacklevel=3,
    )
    return False


def choose_estimator(model: nn.Module, loader: Loader, outputs: Outputs | None) -> tuple[Estimator, Loader]:
    """The estimator for the number of outputs, and the batches, of which one was looked at. Collective."""
    batches = batches_of(loader)
    with unsharded(model), preserved_state(model), torch.no_grad(), rewound(batches):
        device = next(model.parameters()).device
        iterator = iter(batches)
        first = list(islice(iterator, 1))
        if not first:
            return "exact", batches  # the estimator will say so
        batch = apply_to_collection(first[0], Tensor, lambda tensor: tensor.to(device))
        found = (outputs or call_on)(model, batch)
    if iterator is batches:  # a generator gives each batch once
        batches = chain(first, iterator)
    few = found.ndim <= 2 and found.shape[-1] <= FEW_CLASSES
    return "exact" if few else "sample", batches
