"""Norms of gradients where they lie: on shards, in any precision, without asking the device."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.parameters import as_real
from lightning_collapse.utilities.private_torch import base_of, foreach
from lightning_collapse.utilities.sharding import local


class Gradients(NamedTuple):
    """The gradients there are.

    Attributes:
        indices: Of the parameters that have one.
        tensors: This process's part of each.
        shares: What a squared norm of the part must be multiplied by so that the sum over processes is that of the
            whole gradient: 1 for a shard, one over the number of processes that hold the same numbers otherwise.
    """

    indices: list[int]
    tensors: list[Tensor]
    shares: list[float]


def gradients_of(parameters: Sequence[Tensor], sparse: bool = True) -> Gradients:
    """Gradients of parameters, as they are now, without graph; sparse ones by their values, or not at all."""
    found, processes = Gradients([], [], []), world_size()
    whole, strided = 1 / processes, torch.strided
    for i, parameter in enumerate(parameters):
        gradient = parameter.grad  # asked once: of a model with thousands of parameters the asking shows
        if gradient is None:
            continue
        # nothing is to be taken off nearly all of them, and what is asked of each shows too
        plain = type(gradient) is Tensor and gradient.layout is strided
        if plain and not (gradient.requires_grad or gradient.is_complex()):
            found.indices.append(i)
            found.shares.append(whole)
            found.tensors.append(gradient)
        elif sparse or not gradient.is_sparse:
            found.indices.append(i)
            found.shares.append(shards_of(gradient) / processes)
            found.tensors.append(local_part(gradient.detach()))
    return found


def places_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[int]:
    """Which of the parameters an optimizer updates."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [i for i, parameter in enumerate(parameters) if id(parameter) in own]


def follow_gradient(tensor: Tensor, take: Callable[[Tensor], None]) -> None:
    """Hand over the gradient that comes back to what a layer has returned, also if it is then overwritten in place.

    A linear layer returns three-dimensional features as a view. An operation in place gives a view another place in the
    graph, and a hook on it is never called; the gradient is then that of the tensor under the view.

    Args:
        tensor: It requires a gradient.
        take: Called with the gradient, once in every backward pass that comes by.

    Example:
        >>> layer, found = torch.nn.Linear(2, 2), []
        >>> features = layer(torch.ones(1, 3, 2))
        >>> follow_gradient(features, found.append)
        >>> features.mul_(2).sum().backward()
        >>> found[0].unique()
        tensor([2.])
    """
    taken = False

    def of_view(gradient: Tensor) -> None:
        nonlocal taken
        taken = True
        take(gradient)

    def of_base(gradient: Tensor) -> None:
        nonlocal taken
        known, taken = taken, False
        if not known:
            whole = torch.empty_strided(extent, steps, dtype=gradient.dtype, device=gradient.device)
            take(whole.copy_(gradient).as_strided(shape, strides, offset))

    base = base_of(tensor)
    if base is None or base.grad_fn is None or base.numel() != tensor.numel() or base.storage_offset():
        _hook(tensor, take)
        return
    shape, strides, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    extent, steps = base.shape, base.stride()
    _hook(tensor, of_view)
    _hook(base, of_base)


def _hook(tensor: Any, take: Callable[[Tensor], None]) -> None:
    uncompiled: Any = torch.compiler.disable(take)  # type: ignore[no-untyped-call]
    tensor.register_hook(uncompiled)  # the backward pass may be run by a compiled step


@torch.no_grad()
def norms_of(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Euclidean norms, shape ``(len(tensors),)``, ``float64`` where one of the tensors is and ``float32`` otherwise."""
    if not tensors:
        return torch.zeros(0, device=device)
    single = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    norms = foreach.norm(tensors if isinstance(tensors, list) else list(tensors), 2, dtype=single)
    if any(norm.device != device for norm in norms):
        norms = [norm.to(device) for norm in norms]
    return torch.stack(list(norms))


def squared_norms(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Squared Euclidean norms, shape ``(len(tensors),)``, ``float64`` where ``device`` has it."""
    return norms_of(tensors, device).to(torch.float32 if device.type == "mps" else torch.float64).square()


def local_part(gradient: Any) -> Tensor:
    """This process's part of a tensor: of a sparse one its values, of a complex one its real and imaginary parts."""
    part = local(gradient)
    return as_real(part.coalesce().values() if part.is_sparse else part)


def shards_of(tensor: Any) -> int:
    """Into how many parts a tensor is cut."""
    if not hasattr(tensor, "to_local"):
        return 1
    mesh = tensor.device_mesh
    return prod(mesh.size(i) for i, placement in enumerate(tensor.placements) if placement.is_shard())
