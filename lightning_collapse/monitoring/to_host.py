"""Device-to-host transfer, the one of a point: named tensors in, named numbers out."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype

Name = TypeVar("Name", bound=Hashable)
Number = float | list[float]


def to_host(readings: Mapping[Name, Tensor]) -> dict[Name, Number]:
    """Move readings to the host in one piece of memory.

    Waits for the device once, whatever the number of readings.

    Args:
        readings: By name; 0- or 1-dimensional, real, on any devices.

    Returns:
        A number for every 0-dimensional tensor, a list of numbers for every vector; in double precision, where the
        device has it.

    Raises:
        ValueError: If a reading has more dimensions.

    Example:
        >>> to_host({"rank": torch.tensor(2.5), "histogram": torch.tensor([1, 0, 3])})
        {'rank': 2.5, 'histogram': [1.0, 0.0, 3.0]}
    """
    if not readings:
        return {}
    if odd := [name for name, x in readings.items() if x.ndim > 1]:
        raise ValueError(f"a reading is a number or a vector, and {odd[0]!r} has {readings[odd[0]].ndim} dimensions.")
    device = next((x.device for x in readings.values() if x.device.type != "cpu"), torch.device("cpu"))
    dtype = accumulation_dtype(device)
    scalars = [x for x in readings.values() if not x.ndim]
    pieces = [torch.stack([x.to(device, dtype) for x in scalars])] if scalars else []
    pieces += [x.to(device, dtype) for x in readings.values() if x.ndim]
    numbers: list[float] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).tolist()
    single, rest = iter(numbers[: len(scalars)]), iter(numbers[len(scalars) :])
    return {name: list(islice(rest, len(x))) if x.ndim else next(single) for name, x in readings.items()}


def copies_on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the host, with their shapes and types; one transfer for all of a device and a type.

    Example:
        >>> copies_on_host([torch.ones(2, 1), torch.tensor([3])])[1]
        tensor([3])
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, x in enumerate(tensors):
        groups[x.device, x.dtype].append(index)
    found = list(tensors)
    for indices in groups.values():
        parts = torch.cat([tensors[i].flatten() for i in indices]).cpu()
        for i, piece in zip(indices, torch.split(parts, [tensors[i].numel() for i in indices]), strict=True):
            found[i] = piece.view(tensors[i].shape)
    return found
