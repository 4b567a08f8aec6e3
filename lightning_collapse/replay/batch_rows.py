"""Rows of a batch: any nest of tensors whose first dimension is the sample."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def as_nest(batch: Any, path: str = "batch") -> Any:
    """A batch as dictionaries, lists and tuples of tensors, none of them copied.

    Raises:
        ValueError: If it holds anything but tensors, or tensors without rows.

    Example:
        >>> as_nest({"x": [torch.zeros(2)]})
        {'x': [tensor([0., 0.])]}
    """
    if isinstance(batch, Tensor):
        if batch.ndim == 0 or batch.layout != torch.strided or batch.is_nested:
            raise ValueError(f"`{path}` is {_kind(batch)}, which has no rows. Pass what holds a row for each sample.")
        return batch.detach()
    if isinstance(batch, Mapping):
        return {key: as_nest(value, f"{path}[{key!r}]") for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        parts = [as_nest(value, f"{path}[{i}]") for i, value in enumerate(batch)]
        return parts if isinstance(batch, list) else tuple(parts)
    raise ValueError(f"`{path}` is a {type(batch).__name__}. A memory holds tensors with a row for each sample.")


def leaves(nest: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nest and where they are, in the order in which :func:`map_rows` meets them."""
    if isinstance(nest, Tensor):
        yield path, nest
    else:
        for key, part in nest.items() if isinstance(nest, dict) else enumerate(nest):
            yield from leaves(part, f"{path}[{key!r}]")


def row_forms(nest: Any) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of a row of each tensor, by where it is."""
    return {path: (tensor.shape[1:], tensor.dtype) for path, tensor in leaves(nest)}


def map_rows(function: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """A nest of what a function returns for each tensor."""
    return apply_to_collection(nest, Tensor, function)


def count_rows(nest: Any) -> int:
    """How many rows all tensors of a nest have.

    Raises:
        ValueError: If there is no tensor, or if they have different numbers.
    """
    lengths = {path: len(tensor) for path, tensor in leaves(nest)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"The tensors of a batch must have as many rows as each other, got {lengths}.")
    return next(iter(lengths.values()))


def concatenate(batch: Any, rehearsal: Any, path: str = "batch") -> Any:
    """Rows of one batch behind those of another of the same form, on its devices and in its types.

    Raises:
        ValueError: If they are not of one form.

    Example:
        >>> concatenate((torch.ones(1, 2), torch.tensor([3])), (torch.zeros(1, 2), torch.tensor([4])))
        (tensor([[1., 1.],
                [0., 0.]]), tensor([3, 4]))
    """
    if isinstance(batch, Tensor) and isinstance(rehearsal, Tensor):
        return torch.cat([batch, rehearsal.to(device=batch.device, dtype=batch.dtype)])
    if isinstance(batch, Mapping) and isinstance(rehearsal, Mapping) and batch.keys() == rehearsal.keys():
        parts = {key: concatenate(part, rehearsal[key], f"{path}[{key!r}]") for key, part in batch.items()}
        if not isinstance(batch, MutableMapping):
            return type(batch)(parts)  # type: ignore[call-arg]
        joined = copy(batch)  # with what else it knows, such as how it makes what is missing
        joined.update(parts)
        return joined
    sequences = all(isinstance(of, Sequence) and not isinstance(of, str) for of in (batch, rehearsal))
    if sequences and len(batch) == len(rehearsal):
        pairs = enumerate(zip(batch, rehearsal, strict=True))
        longer = [concatenate(*pair, f"{path}[{index}]") for index, pair in pairs]
        return type(batch)(*longer) if hasattr(batch, "_fields") else type(batch)(longer)
    raise ValueError(
        f"`{path}` is {_form(batch)} and what is rehearsed for it {_form(rehearsal)}. Say with `combine=` how both"
        " become one batch."
    )


def _form(part: Any) -> str:
    if isinstance(part, Mapping):
        return f"a mapping of {', '.join(map(repr, part)) or 'nothing'}"
    sized = isinstance(part, Sequence) and not isinstance(part, str)
    return f"a {type(part).__name__}" + (f" of {len(part)}" if sized else "")


def _kind(tensor: Tensor) -> str:
    return "a number" if tensor.ndim == 0 else "nested" if tensor.is_nested else f"of layout {tensor.layout}"
