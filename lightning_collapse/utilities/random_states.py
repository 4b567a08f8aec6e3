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


def own_random_states() -> dict[str, Any]:
    """States of the global generators of Python, NumPy and torch on all devices, of this process.

    Tensors, numbers, strings and lists only, so that ``torch.load(weights_only=True)`` reads them.
    """
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "xpu": torch.xpu.get_rng_state_all() if torch.xpu.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
    }


def restore_own_random_states(states: dict[str, Any]) -> None:
    """Put :func:`own_random_states` back; of devices whose number has changed nothing is."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    if len(others := states.get("xpu", [])) == torch.xpu.device_count():
        torch.xpu.set_rng_state_all(others)
    if states.get("mps") and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"][0])


def random_states() -> list[dict[str, Any]]:
    """:func:`own_random_states` of every process. Collective."""
    own = own_random_states()
    states: list[Any] = [own]
    if world_size() > 1:
        states = [None] * world_size()
        dist.all_gather_object(states, own)
    return states


def restore_random_states(states: Sequence[dict[str, Any]]) -> None:
    """Put :func:`random_states` back; nothing happens in a process that had none."""
    rank = getattr(rank_zero_only, "rank", 0)
    if rank < len(states):
        restore_own_random_states(states[rank])
