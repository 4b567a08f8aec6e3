"""Copies of a module that stand alone: without hooks, trainer or compiled steps."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.private_torch import is_hook_table
from lightning_collapse.utilities.sharding import local
from lightning_collapse.utilities.trainer import forget_compilation, is_compiled_whole

Module = TypeVar("Module", bound=nn.Module)
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def bare_copy(module: Module, shared: Iterable[Tensor] = ()) -> Module:
    """A deep copy without hooks and, of a ``LightningModule``, without trainer, wrapped steps and compiled code.

    An attribute that says ``left_out_of_copies`` is an empty tuple there.

    Args:
        module: What is copied.
        shared: Parameters that both have, and that are not copied.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> handle = layer.register_forward_hook(lambda *_: 1 / 0)
        >>> layer.extra_repr() == bare_copy(layer).extra_repr(), len(bare_copy(layer)._forward_hooks)
        (True, 0)
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for part in module.modules():
        for name, value in vars(part).items():
            if is_hook_table(name):
                memo[id(value)] = OrderedDict()  # what a hook belongs to would be copied too
            elif isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()  # kept from the last step; it cannot be copied
            elif getattr(value, "left_out_of_copies", False):
                memo[id(value)] = ()
    compiled = is_compiled_whole(module)
    forget_compilation(None, memo, module)
    copy = deepcopy(module, memo)
    # functions are not copied: these would still run the original
    for name in (*_STEPS, *(("forward",) if compiled else ())):
        vars(copy).pop(name, None)
    if compiled:
        forget_compilation(copy, memo, module)
    return copy


def frozen_copy(module: Module, shared: Iterable[Tensor] = ()) -> Module:
    """A :func:`bare_copy` in eval mode whose parameters take no gradient; shared ones must take none already."""
    copy = bare_copy(module, shared).requires_grad_(False)
    for part in copy.modules():
        part.training = False  # not by `eval()`: a `train` that changes weights must not
    return copy


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, persistent or not, tied ones under each of their names."""
    named = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`tensors_of` returned, whatever shape it has there; parameters are frozen then.

    Args:
        module: Changed in place; what ``tensors`` does not name stays. Devices and types stay too.
        tensors: By name.

    Raises:
        ValueError: If the module has no tensor of a name.
    """
    if missing := tensors.keys() - tensors_of(module).keys():
        raise ValueError(f"{type(module).__name__} has no {', '.join(sorted(missing))}.")
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        old = getattr(part, leaf)
        new = tensor.to(device=old.device, dtype=old.dtype, copy=True)
        if leaf in part._parameters:
            part._parameters[leaf] = nn.Parameter(new, requires_grad=False)
        else:
            part._buffers[leaf] = new


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those that take no gradient, tied ones under each of their names."""
    return {name: p for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


@torch.no_grad()
def checksum(tensors: nn.Module | Mapping[str, Tensor]) -> dict[str, int]:
    """A number for each, of a module each parameter and buffer, by name: the same while no bit of it changes."""
    named = tensors_of(tensors) if isinstance(tensors, nn.Module) else tensors
    parts = {name: local(tensor.detach()).reshape(-1).view(torch.uint8) for name, tensor in named.items()}
    return {name: int(part.sum(dtype=torch.int64)) for name, part in parts.items()}
