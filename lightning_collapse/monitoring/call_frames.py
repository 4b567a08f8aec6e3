"""Call frames: extremes of all that the modules of a model pass on in one step, in order of time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.monitoring.function_calls import FUNCTION_CALLS
from lightning_collapse.monitoring.graph_call import GraphCall
from lightning_collapse.monitoring.step_frame import (
    BUFFER,
    GRADIENT,
    INPUT,
    INSIDE,
    OUTPUT,
    STEP,
    WEIGHT,
    WEIGHT_GRADIENT,
    Call,
    Entry,
    Frame,
)
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.module_tree import is_list
from lightning_collapse.utilities.modules import (
    clean_name,
    in_backward,
    is_compiled,
    is_to_be_ignored,
    let_hooks_be_seen,
)
from lightning_collapse.utilities.parameters import as_real
from lightning_collapse.utilities.private_torch import (
    FUSED_IN_EVAL,
    is_compiled_in_place,
    is_compiled_itself,
    is_fake,
    is_inside_transform,
    tree_leaves,
    version_of,
)
from lightning_collapse.utilities.sharding import local
from lightning_collapse.utilities.trainer import is_compiled_whole

MOST = 16384
"""Entries of a frame; what comes later in a step is left out."""
_NARROW = {torch.float16, torch.float8_e4m3fn, torch.float8_e5m2}
"""Formats that numbers of a ``float32`` module overflow."""


class CallFrames(HookOwner):
    """Measures a step from :meth:`open` to :meth:`close`: inputs and outputs of all modules, gradients, and weights.

    In other steps there is no hook. No tensor is kept, nothing waits for the device, and each tensor is read once,
    whoever passes it on. Gradients are read by hooks on tensors, which leave the graph as it is. Calls inside the
    backward pass (activation checkpointing computes again) do not count, nor do those that are not the step's. What a
    module casts to ``float16``, or narrower, and back is seen by listening to the functions that it calls.

    Of compiled parts only what they return is measured, by hooks that are there from the beginning: none that comes or
    goes has anything compiled anew.

    Args:
        root: The model.
        containment: Where failures are told, in the name of its owner.

    Attributes:
        armed: Whether calls count; set by the scope of the training step.
        frame: The running frame.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> frames = CallFrames(net)
        >>> frames.open(step=7)
        >>> frames.armed = True
        >>> _ = net(torch.tensor([[1.0, torch.nan]]))
        >>> frame = frames.close()
        >>> [call.name for call in frame.calls], [entry.label for entry in frame.entries]
        (['training_step', '', '0', '1'], ['0.weight', '0.bias', '0', '0', '0'])
        >>> frame.to_host()[2:4]
        [(nan, nan), (nan, nan)]
    """

    def __init__(self, root: nn.Module, containment: Containment | None = None) -> None:
        self._armed = False
        self.frame: Frame | None = None
        self.contained = containment or Containment(type(self).__name__)
        self._root, self._number, self._again = root, 0, False
        self._device = getattr(root, "device", None) or next((p.device for p in root.parameters()), torch.device("cpu"))
        self._running: list[int] = []
        self._seen: dict[int, tuple[Any, int, int]] = {}
        self._nth: Counter[str] = Counter()
        self._ended = 0
        self._hooks: list[ModuleHook] = []
        compiled = [(name, m) for name, m in _reachable(root) if is_compiled_in_place(m)]
        if compiled:
            let_hooks_be_seen(root)
        self._borders: list[_Border] = [_Border(self, clean_name(name), module) for name, module in compiled]

    @property
    def armed(self) -> bool:
        """Whether calls count now."""
        return self._armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._armed = armed
        FUNCTION_CALLS.remove(self)
        if armed and self.frame is not None and (self._again or not self._has_another_way()):
            FUNCTION_CALLS.add(self)

    def _has_another_way(self) -> bool:
        """Whether a listener has something compiled anew, or computed in another order as soon as it is evaluated."""
        return is_compiled(self._root) or any(isinstance(module, FUSED_IN_EVAL) for module in self._root.modules())

    def open(self, step: int, everything: bool = False) -> None:
        """Begin a frame: measure the weights and put the hooks on.

        Args:
            step: Of the training.
            everything: Hook compiled parts too, which are not to run compiled then, and count calls whoever makes them.
        """
        self._number += 1
        self.frame, self._again = Frame(step), everything
        self._running, self._seen, self._nth, self._ended = [], {}, Counter(), 0
        for role, named in ((WEIGHT, self._root.named_parameters()), (BUFFER, self._root.named_buffers())):
            for name, tensor in named:
                if (values := readable(tensor)) is not None:
                    self.frame.add(Entry(role, -1, clean_name(name), values.dtype), values, judged=role == WEIGHT)
        self._begin(STEP, STEP)
        for name, module in self._root.named_modules() if everything else _hookable(self._root):
            if not is_list(module) and not isinstance(module, ScriptModule):
                with self.contained(f"a hook on `{name}`"):
                    self._hooks += [_Before(self, name, module), _After(self, name, module)]

    def begin(self, batch: Any) -> None:
        """Measure what the training step is given."""
        if self.frame is not None:
            self._measure(batch, INPUT, 0)

    def end(self, output: Any) -> None:
        """Measure the loss and whatever else the training step returns."""
        if self.frame is not None:
            self._measure(output, OUTPUT, 0)
            self.note_loss(output.get("loss") if isinstance(output, dict) else output)

    def note_loss(self, loss: Any) -> None:
        """Count a loss among what makes a frame bad."""
        if self.frame is not None and isinstance(loss, Tensor):
            found = self._find(loss)
            if found is None:
                self._measure(loss, OUTPUT, 0)
                found = self._find(loss)
            if found is not None:
                self.frame.judge(found)

    def note_gradients(self, gradients: Sequence[Tensor | None] | None = None, judged: bool = True) -> None:
        """Measure the gradients of weights: those that parameters have, or these.

        Args:
            gradients: One for each parameter.
            judged: Whether they make the frame bad; not where a loss scale is tried out.
        """
        if self.frame is None:
            return
        for i, (name, parameter) in enumerate(self._root.named_parameters()):
            gradient = parameter.grad if gradients is None else gradients[i]
            values = None if gradient is None else readable(gradient)
            if values is not None and len(self.frame.entries) < MOST:
                self.frame.add(Entry(WEIGHT_GRADIENT, -1, clean_name(name), values.dtype), values, judged)

    def close(self) -> Frame | None:
        """End the frame and take the hooks off; may be called at any time."""
        frame, self.frame, self.armed, self._seen = self.frame, None, False, {}
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if frame is not None:
            frame.close(self._device)
        return frame

    def remove(self) -> None:
        """Take all hooks off and forget everything; may be called twice."""
        self.close()
        for border in self._borders:
            border.remove()
        self._borders, self._root = [], nn.Identity()

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        """A module is called."""
        if self._counts():
            try:
                self._begin(name, type(module).__name__)
                self._measure(inputs, INPUT, self._running[-1])
            except Exception as error:
                self.contained.catch("measuring what modules receive", "the first NaN may go unnamed", error)

    def leave(self, name: str, output: Any) -> None:
        """A module returns; calls inside it that an exception ended are closed too."""
        if self._counts() and self.frame is not None:
            try:
                if any(self.frame.calls[i].name == name for i in self._running[1:]):
                    while self.frame.calls[self._running[-1]].name != name:
                        self._running.pop()
                    self._measure(output, OUTPUT, self._running[-1])
                    self._done(self._running.pop())
            except Exception as error:
                self.contained.catch("measuring what modules return", "the first NaN may go unnamed", error)

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Measure what a function makes in a narrow format, and what from: no module may pass it on."""
        if not isinstance(output, Tensor) or output.dtype not in _NARROW or not self._counts():
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
        if self._find(output) is None and not any(_is_view(output, tensor) for tensor in tensors):
            self._measure((own, output), INSIDE, self._running[-1], f"by `{getattr(func, '__name__', func)}`")
            made = self._find(output)
            if made is not None and self.frame is not None:
                self.frame.entries[made].operands = [i for i in map(self._find, own) if i is not None and i < made]

    def fail(self, error: Exception) -> None:
        """Tell what :meth:`note` has raised."""
        self.contained.catch("measuring what modules compute inside", "the first NaN may go unnamed", error)

    def _counts(self) -> bool:
        if not self.armed or self.frame is None or len(self.frame.entries) >= MOST:
            return False
        return not (in_backward() or is_inside_transform()) if self._again else not is_to_be_ignored()

    def _begin(self, name: str, kind: str) -> None:
        if self.frame is not None:
            parent = self._running[-1] if self._running else -1
            self.frame.calls.append(Call(name, kind, self._nth[name], parent))
            self._nth[name] += 1
            self._running.append(len(self.frame.calls) - 1)

    def _done(self, call: int) -> None:
        if self.frame is not None:
            self.frame.calls[call].done = self._ended
            self._ended += 1

    def _find(self, tensor: Tensor) -> int | None:
        found = self._seen.get(id(tensor))
        fits = found is not None and found[0]() is tensor and found[1] == version_of(tensor)
        return found[2] if fits and found is not None else None

    @torch.no_grad()
    def _measure(self, values: Any, role: str, call: int, label: str = "") -> None:
        frame = self.frame
        if frame is None:
            return
        for i, tensor in enumerate(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)):
            index = self._find(tensor)
            if index is None:
                numbers = readable(tensor)
                if numbers is None:
                    continue
                terms = tensor.shape[-1] if tensor.ndim else 1
                index = frame.add(Entry(role, call, label or str(i), numbers.dtype, terms), numbers)
                self._seen[id(tensor)] = ref(tensor), version_of(tensor), index
            entry = frame.entries[index]
            if role == INSIDE:
                continue
            if entry.role == INSIDE:  # it is passed on after all
                entry.role, entry.call, entry.label = role, call, str(i)
            passed_on = bool(entry.consumers or entry.producers)
            (entry.consumers if role == INPUT else entry.producers).append(call)
            if not passed_on and tensor.requires_grad and tensor.grad_fn is not None:
                add: Any = tensor.register_hook
                add(partial(self._gradient, self._number, index))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step may run its backward pass
    @torch.no_grad()
    def _gradient(self, number: int, index: int, gradient: Tensor) -> None:
        frame = self.frame
        if frame is None or number != self._number or len(frame.entries) >= MOST:
            return
        try:
            values = readable(gradient)
            if values is not None:
                of = frame.entries[index]
                frame.add(Entry(GRADIENT, of.call, f"{of.role} {of.label}", values.dtype, of=index), values)
        except Exception as error:
            self.contained.catch("measuring gradients", "a NaN that the backward pass makes may go unnamed", error)


class _Before(ModuleHook):
    def __init__(self, frames: CallFrames, name: str, module: nn.Module) -> None:
        super().__init__(module, before=True)
        self._frames, self._name = frames, clean_name(name)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if not torch.compiler.is_compiling():
            self._frames.enter(self._name, module, (args, dict(value)))


class _After(ModuleHook):
    def __init__(self, frames: CallFrames, name: str, module: nn.Module) -> None:
        super().__init__(module)
        self._frames, self._name = frames, clean_name(name)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if not torch.compiler.is_compiling():
            self._frames.leave(self._name, value)


class _Border(ModuleHook):
    """On a module that was compiled in place, and whose hooks may be with it: reads the first tensor it returns."""

    def __init__(self, frames: CallFrames, name: str, module: nn.Module) -> None:
        self._frames, self._name, self._kind = frames, name, type(module).__name__
        self._call = GraphCall(self._receive)
        super().__init__(module)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        compiled = torch.compiler.is_compiling()
        if compiled or self._frames.armed:
            tensors: list[Tensor | None] = [leaf.detach() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            (self._call if compiled else self._receive)(tensors[:1], "")

    def _receive(self, tensors: Sequence[Tensor | None], note: str) -> None:
        frames = self._frames
        if frames.armed and tensors and not frames._again:
            module = self._module()
            if module is not None:
                frames.enter(self._name, module, ())
                frames.leave(self._name, tensors[0])


def _reachable(root: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and those inside it, but for what is inside of compiled ones."""
    yield name, root
    if is_compiled_itself(root) or is_compiled_whole(root):
        return
    for key, child in root.named_children():
        yield from _reachable(child, f"{name}.{key}" if name else key)


def _hookable(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that see eager calls; what runs another way without hooks in evaluation mode keeps that way."""
    fused = {
        inner
        for module in root.modules()
        if isinstance(module, FUSED_IN_EVAL) and not module.training
        for inner in module.modules()
    }
    seen: set[nn.Module] = set()
    for name, module in _reachable(root):
        if module not in fused and module not in seen and not is_compiled_in_place(module):
            seen.add(module)
            yield name, module


def _is_view(output: Tensor, tensor: Tensor) -> bool:
    """Whether a function has moved no number, but only looks at a tensor in another way."""
    return output is not tensor and storage_of(output) == storage_of(tensor)


def readable(tensor: Any) -> Tensor | None:
    """This process's numbers of a tensor; ``None`` of one that has none to read."""
    part = local(tensor)
    if is_fake(part) or part.is_meta or part.is_nested or part.layout is not torch.strided or part.is_quantized:
        return None
    if nn.parameter.is_lazy(part) or not (part.is_floating_point() or part.is_complex()) or not part.numel():
        return None
    return as_real(part)
