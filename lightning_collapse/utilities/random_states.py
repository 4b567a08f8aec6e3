"""Random states of all processes, as a checkpoint can hold them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_collapse.utilities.distributed import world_size


def random_states() -> list[dict[str, Any]]:
    """States of the global generators of Python, NumPy and torch, one entry per process. Collective.

    Tensors, numbers, strings and lists only, so that ``torch.load(weights_only=True)`` reads them.
    """
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    own = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    states: list[Any] = [own]
    if world_size() > 1:
        states = [None] * world_size()
        dist.all_gather_object(states, own)
    return states


def restore_random_states(states: Sequence[dict[str, Any]]) -> None:
    """Put :func:`random_states` back; nothing happens in a process that had none."""
    rank = getattr(rank_zero_only, "rank", 0)
    if rank >= len(states):
        return
    own = states[rank]
    version, numbers, gauss = own["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = own["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(own["torch"])
    if len(own["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(own["cuda"])
