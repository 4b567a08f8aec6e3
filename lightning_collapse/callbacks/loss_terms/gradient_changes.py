"""Norms of gradients: how far a penalty has moved them, over all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.gradients import shards_of, squared_norms
from lightning_collapse.utilities.sharding import local


def dense_gradients(parameters: dict[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
    """This process's parts of the gradients there are, and what to multiply their squares by for the sum over all."""
    return {
        name: (_dense(local(p.grad.detach())), shards_of(p.grad) / world_size())
        for name, p in parameters.items()
        if p.grad is not None
    }


def _dense(part: Tensor) -> Tensor:
    return part.to_dense() if part.is_sparse else part


def squared_change(
    now: dict[str, tuple[Tensor, float]], past: dict[str, tuple[Tensor, float]], device: torch.device
) -> Tensor:
    """This process's share of the squared norm of what gradients have changed by, from zero or from ``past``."""
    changes = [part - past[name][0] if name in past else part for name, (part, _) in now.items()]
    squares = squared_norms(changes, device)
    return (squares * squares.new_tensor([share for _, share in now.values()])).sum()
