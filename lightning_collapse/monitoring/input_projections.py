"""Inputs of weight matrices, seen along one direction each: what is left of a batch is one number per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_collapse.utilities.modules import is_to_be_ignored
from lightning_collapse.utilities.weight_matrices import Input, WeightMatrix


class Projected(NamedTuple):
    """What one matrix received in one batch.

    Attributes:
        projections: Inner products with the matrix's direction, shape ``(n,)``.
        norms: Euclidean norms of the rows, shape ``(n,)``; NaN or infinity for rows that hold any, -1 for padding.
        total: Sum of the rows that are not padding, shape ``(I,)``; not finite if one of them is not.
    """

    projections: Tensor
    norms: Tensor
    total: Tensor


class InputProjections:
    """Forward pre-hooks that project the inputs of matrices while :attr:`armed`, and cost one ``if`` while not.

    Every call of a module counts, except activation checkpointing's recomputation in the backward pass. Of more than
    ``limit`` rows in a call every ``k``-th is taken, with a ``k`` that steps through the positions of the sequences. No
    activation and no graph is kept, nothing waits for the device, and projections are ``float32`` at least.

    Args:
        matrices: Whose inputs to hear; those with none are passed over.
        limit: Rows per call and matrix.

    Attributes:
        armed: Whether to project now.
        mask: Padding mask ``(N, L)`` of the running batch; tokens that are padding do not count.
    """

    def __init__(self, matrices: Sequence[WeightMatrix], limit: int) -> None:
        self.armed = False
        self.mask: Tensor | None = None
        self.limit = limit
        names: dict[Input, list[str]] = {}
        for matrix in matrices:
            if matrix.input is not None:
                names.setdefault(matrix.input, []).append(matrix.name)
        self._names = list(names.values())
        self._directions: list[Tensor] = []
        self._joint: dict[nn.Module, Tensor] = {}
        self._heard: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in names]
        modules: dict[nn.Module, list[tuple[int, Input]]] = {}
        for i, place in enumerate(names):
            modules.setdefault(place.module, []).append((i, place))
        self._shared = {module: [i for i, _ in places] for module, places in modules.items() if len(places) > 1}
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._ear(places), with_kwargs=True) for module, places in modules.items()
        ]

    def arm(self, directions: Mapping[str, Tensor], mask: Tensor | None) -> None:
        """Project the inputs of the coming batch on these unit vectors ``(I,)``, by name of the matrix."""
        self.pop()  # what was heard before a batch that was then left out
        self._directions = [torch.stack([directions[name] for name in names], dim=1) for names in self._names]
        self._joint = {
            module: torch.cat([self._directions[i] for i in places], dim=1)
            for module, places in self._shared.items()
            if len({len(self._directions[i]) for i in places}) == 1
        }
        self.armed, self.mask = True, mask

    def pop(self) -> dict[str, Projected]:
        """Stop projecting and hand over what was heard, by name; matrices that did not run are missing."""
        self.armed, self.mask = False, None
        heard = {}
        for names, calls in zip(self._names, self._heard, strict=True):
            if calls:
                projections, norms, total = calls[0]
                if len(calls) > 1:
                    projections, norms = (torch.cat([call[j] for call in calls]) for j in (0, 1))
                    total = torch.stack([call[2] for call in calls]).sum(dim=0)
                for i, name in enumerate(names):
                    heard[name] = Projected(projections[:, i], norms, total)
            calls.clear()
        return heard

    def remove(self) -> None:
        """Stop listening and forget; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.pop()
        self._directions.clear()
        self._joint.clear()

    def _ear(self, places: Sequence[tuple[int, Input]]) -> Callable[..., None]:
        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.armed or is_to_be_ignored():
                return
            values = [_argument(place, args, kwargs) for _, place in places]
            joint = self._joint.get(module)
            if joint is not None and all(value is values[0] for value in values):  # self-attention: one product for all
                if (found := self._project(values[0], joint)) is not None:
                    widths = [self._directions[i].shape[1] for i, _ in places]
                    for (i, _), part in zip(places, torch.split(found[0], widths, dim=1), strict=True):
                        self._heard[i].append((part, *found[1:]))
                return
            for (i, _), value in zip(places, values, strict=True):
                if (found := self._project(value, self._directions[i])) is not None:
                    self._heard[i].append(found)

        return hear

    def _project(self, value: Any, directions: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Projections ``(n, k)`` on directions ``(I, k)``, norms ``(n,)`` and the sum ``(I,)`` of some of the rows."""
        if not _is_rows(value, len(directions)):
            return None
        device = value.device.type
        # to enter a context takes longer than a product; and detached tensors need no `no_grad`
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            value, mask = value.detach(), None
            rows = value.reshape(-1, value.shape[-1])
            if self.mask is not None and value.ndim == 3 and self.mask.shape == value.shape[:2]:
                mask = self.mask.flatten().bool()
            if rows.shape[0] > self.limit:
                stride = _stride(-(-rows.shape[0] // self.limit), value.shape[-2] if value.ndim > 2 else None)
                rows = rows[::stride]  # a view: to copy costs more than all that follows
                mask = None if mask is None else mask[::stride]
            rows = rows.to(torch.promote_types(directions.dtype, torch.float32))
            norms = torch.linalg.vector_norm(rows, dim=1)
            if mask is None:
                return rows @ directions, norms, rows.sum(dim=0)
            return rows @ directions, torch.where(mask, norms, -1.0), mask.to(rows.dtype) @ rows


def _stride(least: int, length: int | None) -> int:
    """A step of ``least`` or a little more that does not always land on the same position of sequences."""
    if length is None:
        return least
    if least < length:
        return least + 1 - least % 2  # lengths are often powers of two, with which an odd number shares no factor
    return -(-least // length) * length + 1


def _argument(place: Input, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if place.position < len(args):
        return args[place.position]
    if place.keyword is not None:
        return kwargs.get(place.keyword)
    return next(iter(kwargs.values()), None)


def _is_rows(value: Any, width: int) -> bool:
    plain = isinstance(value, Tensor) and not value.is_nested and not hasattr(value, "full_tensor")
    return plain and value.is_floating_point() and value.ndim > 0 and value.shape[-1] == width
