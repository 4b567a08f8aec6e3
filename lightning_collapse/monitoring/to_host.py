"""Device-to-host transfer, the one of a point: named tensors in, named numbers out."""

from collections.abc import Hashable, Mapping
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
    return {name: [next(rest) for _ in x] if x.ndim else next(single) for name, x in readings.items()}
