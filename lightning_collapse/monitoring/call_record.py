"""Call record: what every module of a model receives and returns in one training step, and its places in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from lightning_collapse.monitoring.to_host import copies_on_host
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.modules import clean_name, is_compiled, is_to_be_ignored, weighted_layers, width_of
from lightning_collapse.utilities.private_torch import packs_saved_tensors, tree_leaves

SAMPLE = 4096
"""Numbers of a tensor that are kept to compare values."""
_NUMBERS = (int, float, str, torch.dtype, torch.device, type(None))


@dataclass
class Seen:
    """A tensor as it was when a module received or returned it.

    Attributes:
        node: Its place in the autograd graph, ``None`` without gradient.
        pointer: The address of its storage, which others may have later.
        shape: Its shape.
        values: A copy of its first rows, at most :data:`SAMPLE` numbers; ``None`` where a single row holds more.
    """

    node: Any
    pointer: int
    shape: tuple[int, ...]
    values: Tensor | None

    @property
    def numel(self) -> int:
        """How many numbers it held."""
        return torch.Size(self.shape).numel()


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: The clean name of the module.
        inputs: All tensors among its arguments.
        outputs: All tensors that it returned.
        graph: Whether gradients were recorded.
        numbers_only: Whether it was given no object at all, but numbers, such as sizes.
    """

    name: str
    inputs: list[Seen] = field(default_factory=list)
    outputs: list[Seen] = field(default_factory=list)
    graph: bool = True
    numbers_only: bool = False


class CallRecord(HookOwner):
    """Listens to one training step, and is then removed; it changes nothing and draws no random number.

    Nodes of the graph are kept until :meth:`clear`, which is to be called before the first backward pass. Compiled
    models are not listened to, since hooks that come and go would cost compilations: the record is empty.

    Args:
        root: The model, before its first batch.
        owner: In whose name hooks run, for warnings.

    Attributes:
        armed: Whether calls count.
        calls: All calls in the order in which they ended.
        layers: Names of the innermost modules with a weight, and how many numbers each returns per row, 0 if unknown.
        tables: Names of embedding tables, and how many rows each has.
        packed: Whether hooks packed what autograd saved, as activation checkpointing does.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> record = CallRecord(net)
        >>> record.armed = True
        >>> _ = net(torch.zeros(2, 4))
        >>> [(call.name, call.outputs[0].shape) for call in record.calls]
        [('0', (2, 3)), ('1', (2, 3))]
        >>> record.clear()
    """

    def __init__(self, root: nn.Module, owner: str = "CallRecord") -> None:
        self.armed = self.packed = False
        self.calls: list[Call] = []
        self._open: list[Call] = []
        self._contained = Containment(owner)
        layers = [(clean_name(name), module) for name, module in weighted_layers(root)]
        self.layers = {name: width_of(module) for name, module in layers}
        self.tables = {
            clean_name(name): module.num_embeddings
            for name, module in root.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        self._hooks: list[ModuleHook] = []
        for name, module in () if is_compiled(root) else root.named_modules():
            makes_weights = "parametrizations" in name.split(".")
            if name and not makes_weights and not isinstance(module, ScriptModule):  # which refuses hooks
                with self._contained(f"a hook on `{name}`"):
                    self._hooks += [_Begin(self, clean_name(name), module), _End(self, clean_name(name), module)]

    def clear(self) -> None:
        """Forget the graph and take the hooks off; may be called twice."""
        self.armed = False
        self.calls, self._open = [], []
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def forget(self) -> None:
        """Forget the calls so far, and go on listening."""
        self.calls, self._open = [], []

    def to_host(self) -> None:
        """Bring all values to the host, which waits for the device."""
        seen = [one for call in self.calls for one in (*call.inputs, *call.outputs) if one.values is not None]
        for one, values in zip(
            seen, copies_on_host([one.values for one in seen if one.values is not None]), strict=True
        ):
            one.values = values

    def begin(self, name: str, inputs: Any) -> None:
        """Take note of what a module receives."""
        if self._counts():
            with self._contained("the record of calls", "what the loss compares stays unknown", self.clear):
                self.packed = self.packed or packs_saved_tensors()
                numbers_only = all(isinstance(leaf, _NUMBERS) for leaf in tree_leaves(inputs))
                self._open.append(Call(name, _seen(inputs), [], torch.is_grad_enabled(), numbers_only))

    def end(self, name: str, outputs: Any) -> None:
        """Take note of what a module returns; calls that an exception ended are dropped."""
        if self._counts() and any(call.name == name for call in self._open):
            with self._contained("the record of calls", "what the loss compares stays unknown", self.clear):
                while self._open[-1].name != name:
                    self._open.pop()
                call = self._open.pop()
                call.outputs = _seen(outputs)
                self.calls.append(call)

    def _counts(self) -> bool:
        return self.armed and not is_to_be_ignored()


class _Begin(ModuleHook):
    def __init__(self, record: CallRecord, name: str, module: nn.Module) -> None:
        super().__init__(module, before=True)
        self._record, self._name = record, name

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if not torch.compiler.is_compiling():  # a function that calls it, and not the module
            self._record.begin(self._name, (args, dict(value)))


class _End(ModuleHook):
    def __init__(self, record: CallRecord, name: str, module: nn.Module) -> None:
        super().__init__(module)
        self._record, self._name = record, name

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if not torch.compiler.is_compiling():
            self._record.end(self._name, value)


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage, 0 where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, nested, fake, or not made yet (lazy layers)
        return 0


def leading_rows(tensor: Tensor, limit: int = SAMPLE) -> Tensor | None:
    """A copy of the first rows, at most ``limit`` numbers; ``None`` where there are no such rows."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or not tensor.numel():
        return None
    if tensor.ndim == 0:
        return tensor.detach().clone()
    rows = limit // max(tensor.numel() // len(tensor), 1)
    return tensor.detach()[:rows].clone() if rows else None


def _seen(values: Any) -> list[Seen]:
    leaves: Sequence[Any] = tree_leaves(values)
    return [
        Seen(leaf.grad_fn, storage_of(leaf), () if leaf.is_nested else tuple(leaf.shape), leading_rows(leaf))
        for leaf in leaves
        if isinstance(leaf, Tensor)
    ]
