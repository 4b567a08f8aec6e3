"""Sharded state: tensors that lie beside parameters, cut as they are cut, at least in single precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_collapse.utilities.distributed import all_reduce_max, all_reduce_sum, world_size
from lightning_collapse.utilities.gradients import shards_of
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.sharding import local


class Layout(NamedTuple):
    """How a parameter lies over processes.

    Attributes:
        shape: Of the whole.
        mesh: The processes, or ``None`` where each has the whole.
        placements: How it is cut over each dimension of ``mesh``.
    """

    shape: tuple[int, ...]
    mesh: Any = None
    placements: tuple[Any, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """That of a parameter."""
        mesh = getattr(tensor, "device_mesh", None)
        return cls(tuple(tensor.shape), mesh, () if mesh is None else tuple(tensor.placements))

    def gather(self, part: Tensor) -> Tensor:
        """The whole of what this process has a part of. Collective if it is cut."""
        if self.mesh is None:
            return part
        from torch.distributed.tensor import DTensor  # not in every build of torch

        whole = torch.empty(self.shape, device="meta")
        shape, stride = whole.shape, whole.stride()
        gathered = DTensor.from_local(part, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)
        return gathered.full_tensor()

    def cut(self, whole: Tensor) -> Tensor:
        """This process's part of a whole. Collective if it is to be cut."""
        if self.mesh is None:
            return whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, self.mesh, self.placements).to_local()

    def own(self, whole: Tensor) -> Tensor:
        """This process's part of a whole that all processes have; nothing is sent."""
        if self.mesh is None:
            return whole
        from torch.distributed.tensor import DTensor, Replicate

        everywhere = DTensor.from_local(whole, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return everywhere.redistribute(placements=self.placements).to_local()


def wide(tensor: Tensor) -> torch.dtype:
    """What is remembered beside a parameter is kept in its precision, and at least in ``float32``."""
    return torch.promote_types(tensor.dtype, torch.float32)


def copy_of(parameter: Tensor) -> Tensor:
    """This process's part of a parameter as it is now."""
    part = local(parameter.detach())
    return part.to(wide(part), copy=True)


def add_to_gradients(parameters: Sequence[Tensor], pulls: list[Tensor], strength: float, scale: Tensor | None) -> None:
    """Add ``strength * scale * pulls`` to gradients, which are made where there are none; changes ``pulls``."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
    if scale is not None:
        foreach.mul_(pulls, scale.to(pulls[0]))
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    foreach.add_(gradients, pulls, alpha=strength)


def total(numbers: Sequence[Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """Sum over parameters of what processes have of their parts, scalars or vectors, the same on every process.

    Collective if any parameter is cut; without gradient then.
    """
    shares = [shards_of(parameter) for parameter in parameters]
    if world_size() == 1 or max(shares, default=1) == 1:
        return torch.stack(list(numbers)).sum(dim=0)
    weights = torch.tensor(shares, dtype=numbers[0].dtype, device=numbers[0].device) / world_size()
    return all_reduce_sum((torch.stack(list(numbers)).movedim(0, -1) * weights).sum(dim=-1))


def largest(numbers: Sequence[Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """The largest of scalars that processes have of their parts. Collective if any parameter is cut."""
    highest = torch.stack(list(numbers)).max()
    return all_reduce_max(highest) if any(shards_of(parameter) > 1 for parameter in parameters) else highest
