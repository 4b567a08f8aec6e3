"""Input projections: inputs of weight matrices along one direction each, one number per row of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_collapse.monitoring.graph_call import GraphCall
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.features import as_rows
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
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


class InputProjections(HookOwner):
    """Forward pre-hooks that project the inputs of matrices while :attr:`armed`, and cost one ``if`` while not.

    Every call of a module counts, except activation checkpointing's recomputation in the backward pass. Of more than
    ``limit`` rows in a call every ``k``-th is taken, with a ``k`` that steps through the positions of the sequences. No
    activation and no graph is kept, nothing waits for the device, and projections are ``float32`` at least. A compiled
    model stays one graph. What fails inside a hook is one warning that names the matrices.

    Args:
        matrices: Whose inputs to capture; those with none are passed over.
        limit: Rows per call and matrix.
        containment: Where failures are told, in the name of its owner.

    Attributes:
        armed: Whether to project now.
        mask: Padding mask ``(N, L)`` of the running batch; tokens that are padding do not count.
        left_out: Names of the matrices whose hooks have failed, which was told.
    """

    def __init__(self, matrices: Sequence[WeightMatrix], limit: int, containment: Containment | None = None) -> None:
        self.armed = False
        self.containment = containment or Containment(type(self).__name__)
        self.mask: Tensor | None = None
        self.limit = limit
        self.left_out: set[str] = set()
        names: dict[Input, list[str]] = {}
        for matrix in matrices:
            if matrix.input is not None:
                names.setdefault(matrix.input, []).append(matrix.name)
        self._names = list(names.values())
        self._directions: list[Tensor] = []
        self._joint: dict[int, Tensor] = {}
        self._captured: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in names]
        modules: dict[nn.Module, list[tuple[int, Input]]] = {}
        for i, place in enumerate(names):
            modules.setdefault(place.module, []).append((i, place))
        self._shared = [[i for i, _ in places] for places in modules.values() if len(places) > 1]
        self._hooks = [hook for module, places in modules.items() if (hook := self._hook(module, places)) is not None]

    def aim(self, directions: Mapping[str, Tensor], mask: Tensor | None) -> None:
        """Project the inputs of the coming batch on these unit vectors ``(I,)``, by name of the matrix, once armed."""
        self.pop()  # what was captured before a batch that was then left out
        self._directions = [torch.stack([directions[name] for name in names], dim=1) for names in self._names]
        self._joint = {
            places[0]: torch.cat([self._directions[i] for i in places], dim=1)
            for places in self._shared
            if len({len(self._directions[i]) for i in places}) == 1
        }
        self.mask = mask

    def pop(self) -> dict[str, Projected]:
        """Stop projecting and hand over what was captured, by name; matrices that did not run are missing."""
        self.armed, self.mask = False, None
        captured = {}
        for names, calls in zip(self._names, self._captured, strict=True):
            if calls:
                projections, norms, total = calls[0]
                if len(calls) > 1:
                    projections, norms = (torch.cat([call[j] for call in calls]) for j in (0, 1))
                    total = torch.stack([call[2] for call in calls]).sum(dim=0)
                for i, name in enumerate(names):
                    captured[name] = Projected(projections[:, i], norms, total)
            calls.clear()
        return captured

    def remove(self) -> None:
        """Stop listening and forget; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.pop()
        self._directions.clear()
        self._joint.clear()

    def project(self, hook: _Hook, values: Sequence[Any]) -> None:
        """Project what the places of a module have received; for hooks."""
        if not self.armed or hook.failed or is_to_be_ignored():
            return
        try:
            self._project_all(hook.places, values, self._joint.get(hook.places[0][0]))
        except Exception as error:
            hook.failed = True
            self._leave_out(hook.places, error)

    def _hook(self, module: nn.Module, places: list[tuple[int, Input]]) -> _Hook | None:
        try:
            return _Hook(self, module, places)
        except Exception as error:  # a ScriptModule refuses hooks
            self._leave_out(places, error)
            return None

    def _leave_out(self, places: Sequence[tuple[int, Input]], error: Exception) -> None:
        names = [name for i, _ in places for name in self._names[i]]
        self.left_out |= set(names)
        listed = ", ".join(f"`{name}`" for name in names)
        self.containment.catch(f"reading what {listed} receives", "it is left out from now on", error)

    def _project_all(self, places: Sequence[tuple[int, Input]], values: Sequence[Any], joint: Tensor | None) -> None:
        if joint is not None and all(value is values[0] for value in values):  # self-attention: one product for all
            if (found := self._project(values[0], joint)) is not None:
                widths = [self._directions[i].shape[1] for i, _ in places]
                for (i, _), part in zip(places, torch.split(found[0], widths, dim=1), strict=True):
                    self._captured[i].append((part, *found[1:]))
            return
        for (i, _), value in zip(places, values, strict=True):
            if (found := self._project(value, self._directions[i])) is not None:
                self._captured[i].append(found)

    def _project(self, value: Any, directions: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Projections ``(n, k)`` on directions ``(I, k)``, norms ``(n,)`` and the sum ``(I,)`` of some of the rows."""
        if isinstance(value, Tensor) and value.is_nested:
            value = as_rows(value)
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


class _Hook(ModuleHook):
    def __init__(self, owner: InputProjections, module: nn.Module, places: list[tuple[int, Input]]) -> None:
        self.owner, self.places, self.failed = owner, places, False
        self.call = GraphCall(self._receive)
        super().__init__(module, before=True)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if torch.compiler.is_compiling():
            self.call([_in_graph(_argument(place, args, value)) for _, place in self.places])
        elif self.owner.armed:
            self.owner.project(self, [_argument(place, args, value) for _, place in self.places])

    def _receive(self, tensors: Sequence[Tensor | None], note: str) -> None:
        self.owner.project(self, tensors)


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


def _in_graph(value: Any) -> Tensor | None:
    return value.detach() if type(value) in (Tensor, nn.Parameter) else None


def _is_rows(value: Any, width: int) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not hasattr(value, "full_tensor")
    return plain and value.is_floating_point() and value.ndim > 0 and value.shape[-1] == width
