"""What penalties share that read a model's output on data."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_collapse.penalties.base import Parameters, Penalty
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.modules import clean_name


def check_loader(penalty: Penalty, loader: Loader | None) -> Loader:
    """Refuse to learn from nothing.

    Raises:
        ValueError: If there are no data.
    """
    if loader is None:
        raise ValueError(f"`{type(penalty).__name__}` reads data when a task ends. Pass it a loader.")
    return loader


def check_whole(penalty: Penalty, parameters: Parameters) -> None:
    """Refuse sharded parameters, at the start and not only when a task has been trained.

    Raises:
        ValueError: If a parameter is sharded.
    """
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"`{type(penalty).__name__}` needs gradients of single samples, and `{name}` is sharded. Use"
                " `SynapticIntelligence` or `RWalk`, which read none, or `strategy='ddp'`."
            )


def names_of(model: nn.Module, known: Collection[Any]) -> dict[str, str]:
    """Names in a model of parameters that can be trained, and what they are called without marks of compilation."""
    named = {name: clean_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: clean for name, clean in named.items() if clean in known}
