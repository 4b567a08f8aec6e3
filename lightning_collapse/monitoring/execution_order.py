"""Execution order: which modules a training step runs, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import from_first_process
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.modules import (
    Execution,
    clean_name,
    in_backward,
    is_compiled,
    is_to_be_ignored,
    weighted_layers,
)
from lightning_collapse.utilities.private_torch import tree_leaves

_PLAIN = (Tensor, int, float, str, type(None), torch.dtype, torch.device)
"""What holds no tensor that is not seen; an object of another class may."""


class ExecutionOrder(HookOwner):
    """Listens to one training step for :func:`~lightning_collapse.utilities.default_taps`, and is then removed.

    Forward pre-hooks note the name of every module that is called, whether gradients pass through it, and the shapes of
    its inputs; no tensor is read. A module that only receives vectors straight from the batch, while later ones receive
    maps or sequences, embeds a condition (a time step, a class) and is left out; so is what receives at most parameters
    or buffers of the model while others receive data: it makes a table of positions, the same for every sample.
    Compiled models are not listened to: hooks that come and go would cost compilations.

    Args:
        root: The model, before its first batch.
        owner: In whose name hooks run, for warnings.

    Attributes:
        armed: Whether calls count; those of the backward pass, where activation checkpointing computes again what ran
            without gradients, do of modules that are known.
        not_called: After :meth:`pop`, clean names of the layers with weights that were not called; empty where nothing
            was noted.

    Example:
        >>> net = nn.ModuleDict({"second": nn.Linear(4, 2), "first": nn.Linear(8, 4)})
        >>> order = ExecutionOrder(net)
        >>> order.armed = True
        >>> _ = net["second"](net["first"](torch.zeros(3, 8)))
        >>> order.pop().order
        ('first', 'second')
    """

    def __init__(self, root: nn.Module, owner: str = "ExecutionOrder") -> None:
        self.armed = False
        self._contained = Containment(owner)
        self._carries: dict[str, bool] = {}
        self._vectors: list[str] = []
        self._maps: list[str] = []
        self._raw_maps: list[str] = []
        self._root, self._own, self._tables = root, set[int](), list[str]()
        self._fed = False  # whether data has come to what is no table
        self.not_called: set[str] = set()
        self._layers = {clean_name(name) for name, _ in weighted_layers(root)}
        self._hooks: list[_NameHook] = []
        for name, module in () if is_compiled(root) else root.named_modules():
            if isinstance(module, ScriptModule):  # refuses hooks
                continue
            with self._contained(f"a hook on `{name}`"):
                self._hooks += [_NameHook(self, clean_name(name), module)] if name else []

    def pop(self) -> Execution | None:
        """What ran, on every process what the first one ran; ``None`` where nothing was noted. Removes the hooks.

        Collective.
        """
        self.remove()
        self.not_called = self._layers - self._carries.keys() if self._carries else set()
        tables = tuple(f"{table}." for table in self._tables) if self._fed else ()
        order = tuple(n for n in self._carries if not f"{n}.".startswith(tables) and not self._is_condition(n))
        self._own.clear()
        found = from_first_process(Execution(order, tuple(name for name in order if not self._carries[name])))
        return found if found.order else None

    def remove(self) -> None:
        """Stop listening; may be called twice."""
        self.armed = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def note(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Take note of a call."""
        again = in_backward()
        if name in self._carries if again else self.armed and not is_to_be_ignored():
            with self._contained("the order of modules", "default layers follow that of registration", self.remove):
                if name not in self._carries:
                    self._note_table(name, module, tree_leaves(inputs))
                self._note(name, module, [value for value in inputs if isinstance(value, Tensor)])

    def _note(self, name: str, module: nn.Module, inputs: list[Tensor]) -> None:
        first = name not in self._carries
        graph = any(tensor.requires_grad for tensor in inputs)
        trained = graph or any(parameter.requires_grad for parameter in module.parameters())
        # activation checkpointing may run without gradients first, and again in the backward pass
        self._carries[name] = self._carries.get(name, False) or (trained and torch.is_grad_enabled())
        if not first or not inputs:
            return
        maps = [tensor for tensor in inputs if tensor.ndim > (2 if tensor.is_floating_point() else 1)]
        if maps:
            self._maps.append(name)
            if name in self._layers and not all(tensor.requires_grad for tensor in maps):
                self._raw_maps.append(name)
        elif not graph:
            self._vectors.append(name)

    def _note_table(self, name: str, module: nn.Module, inputs: Sequence[Any]) -> None:
        """Tell what receives nothing but tensors of the model's own from what data comes to.

        Of what receives no tensor at all only single layers count: a generator may draw its noise inside.
        """
        self._own = self._own or {storage_of(x) for x in (*self._root.parameters(), *self._root.buffers())} - {0}
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        strangers = [tensor for tensor in tensors if storage_of(tensor) not in self._own]
        is_plain = not strangers and all(isinstance(value, _PLAIN) for value in inputs)
        if is_plain and (tensors or next(module.children(), None) is None):
            self._tables.append(name)
        elif not f"{name}.".startswith(tuple(f"{table}." for table in self._tables)):
            self._fed |= any(not tensor.requires_grad for tensor in strangers)

    def _is_condition(self, name: str) -> bool:
        around = next((vector for vector in self._vectors if f"{name}.".startswith(f"{vector}.")), None)
        if around is None:
            return False
        places = {other: i for i, other in enumerate(self._carries)}
        outside = [other for other in self._maps if not f"{other}.".startswith(f"{around}.")]
        source = any(other in self._raw_maps for other in outside)
        return source and any(self._carries[other] and places[other] > places[around] for other in outside)


class _NameHook(ModuleHook):
    def __init__(self, order: ExecutionOrder, name: str, module: nn.Module) -> None:
        super().__init__(module, before=True)
        self._order, self._name = order, name

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        self._order.note(self._name, module, (*args, *value.values()))
