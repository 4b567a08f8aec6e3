"""Attention hooks: torch's own functions while they run, or any module that is told how to read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_collapse.monitoring.function_calls import FUNCTION_CALLS
from lightning_collapse.monitoring.graph_call import GraphCall, pack, unpack
from lightning_collapse.utilities.attention_calls import (
    AttentionCall,
    call_of_multi_head,
    call_of_sdpa,
    logits_of_softmax,
    sample,
)
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.modules import Tap, find_modules, find_taps, hooks_ignored, is_to_be_ignored
from lightning_collapse.utilities.private_torch import FUSED_IN_EVAL, is_fake

Reader = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""From a module and the arguments of its call to ``(query, key)`` or an :class:`AttentionCall`."""
Captured = AttentionCall | Tensor
"""Some rows of one call of attention: queries and keys, or the logits ``(B, H, L, S)`` that a softmax received."""

_SOFTMAX = {F.softmax, torch.softmax, torch.special.softmax, torch.Tensor.softmax}
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


class AttentionHooks:
    """Hands every call of attention while :attr:`armed`, by layer, to ``capture``; costs nothing while not.

    Captured are ``F.scaled_dot_product_attention``, ``nn.MultiheadAttention`` (``F.multi_head_attention_forward``), and
    softmax over the last of four dimensions (attention written out, before dropout; learned sinks are no keys). A call
    belongs to the innermost running layer. Results are not touched. Activation checkpointing's recomputation in the
    backward pass is not captured; neither are torch's transformer layers in evaluation mode, which run as one fused
    operation as long as nobody listens, nor compiled code.

    Args:
        layers: Where calls may belong to; other modules count as part of the one they run in.
        capture: Called as ``capture(name, call)`` with some rows of a call, detached.
        failed: Called with an exception that reading a call raised: the model's own call has gone well.
        rows: Queries to read of each sequence.
        max_rows: Queries to read of all sequences of a call together.
        outermost: The layer that calls belong to while no other runs; ``None`` not to capture those.

    Attributes:
        mask: Padding mask ``(B, L)`` of the running batch, boolean, true for real tokens, if there is one.
        samples: Whether ``capture`` is called.
        whole: Called as ``whole(name, call)`` before it, with all of a call whose queries and keys are there as they
            are: those of ``F.scaled_dot_product_attention``; ``None`` by default.

    Example:
        >>> attention, seen = nn.MultiheadAttention(8, num_heads=2), []
        >>> hooks = AttentionHooks([Tap("attention", attention)], lambda name, call: seen.append(name), print, 4, 64)
        >>> rows = torch.randn(5, 1, 8)
        >>> hooks.armed = True
        >>> _ = attention(rows, rows, rows)
        >>> hooks.armed = False
        >>> seen
        ['attention']
    """

    def __init__(
        self,
        layers: Sequence[Tap],
        capture: Callable[[str, Captured], None],
        failed: Callable[[str, Exception], None],
        rows: int,
        max_rows: int,
        outermost: str | None = None,
    ) -> None:
        self.mask: Tensor | None = None
        self.samples = True
        self.whole: Callable[[str, AttentionCall], None] | None = None
        self._names = {id(tap.module): tap.name for tap in layers}
        self._capture, self._failed, self._rows, self._max_rows = capture, failed, rows, max_rows
        self._outermost = self._layer = outermost
        self._listening: AbstractContextManager[None] | None = None

    @property
    def armed(self) -> bool:
        """Whether to capture calls of attention now."""
        return self._listening is not None

    @armed.setter
    def armed(self, armed: bool) -> None:
        before, self._listening = self._listening, None
        if before is not None:
            before.__exit__(None, None, None)
        if armed:
            listening = self._listen()
            listening.__enter__()
            self._listening = listening

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Capture a function of torch that was called, if it is attention; for the mode."""
        known = func is F.scaled_dot_product_attention or func is F.multi_head_attention_forward or func in _SOFTMAX
        # torch 2.5 does not call it compiling when it traces a function through with tensors that hold nothing
        if not known or self._layer is None or is_to_be_ignored() or any(map(is_fake, args)):
            return
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not all(x.numel() for x in tensors[:2]):  # of no sequences, as where no token was routed here
            return
        with torch.no_grad():
            captured = self._read(self._layer, func, args, kwargs)
            if captured is not None:
                self._capture(self._layer, captured)

    def fail(self, error: Exception) -> None:
        """Tell of an exception."""
        self._failed(str(self._layer), error)

    @contextmanager
    def _listen(self) -> Iterator[None]:
        running: list[str | None] = []
        aside: list[nn.Module] = []
        self._layer = self._outermost

        def enter(module: nn.Module, args: Any) -> None:
            running.append(self._names.get(id(module)) or self._layer)
            self._layer = running[-1]
            fused = isinstance(module, FUSED_IN_EVAL) and not module.training
            if fused and torch.backends.mha.get_fastpath_enabled() and FUNCTION_CALLS.stand_aside():
                aside.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if aside and aside[-1] is module:
                aside.pop()
                FUNCTION_CALLS.come_back()
            if running:
                running.pop()
            self._layer = running[-1] if running else self._outermost

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        FUNCTION_CALLS.add(self)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            FUNCTION_CALLS.remove(self)
            if aside:  # an interrupt may come while we stand aside
                FUNCTION_CALLS.come_back()

    def _read(self, layer: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured | None:
        if func is F.scaled_dot_product_attention:
            call = call_of_sdpa(*args, **kwargs)
            if call is not None and self.whole is not None:
                self.whole(layer, call)
            return few_rows(call, self.mask, self._rows, self._max_rows) if call is not None and self.samples else None
        if not self.samples:
            return None
        if func is F.multi_head_attention_forward:
            bound = _MULTI_HEAD.bind(*args, **kwargs)
            bound.apply_defaults()
            return call_of_multi_head(bound.arguments, self._rows, self._max_rows)
        logits = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(logits, Tensor) or logits.ndim != 4 or dim not in (-1, 3):
            return None
        return logits_of_softmax(logits, self.mask, self._rows, self._max_rows)


class ReaderHooks(HookOwner):
    """Forward hooks on modules whose attention torch's functions do not show, each with a function that reads it.

    They cost one ``if`` while not :attr:`armed`. In a compiled model they leave one graph without a break: the reader
    is given the module's arguments outside of it, tensors and containers of them only, and ``None`` for what is neither
    that nor a string or flag. What a reader calls is not captured by other hooks.

    Args:
        root: The model.
        readers: A reader for each name or glob pattern of modules.
        capture: As in :class:`AttentionHooks`.
        failed: As in :class:`AttentionHooks`.
        rows: Queries to read of each sequence.
        max_rows: Queries to read of all sequences of a call together.

    Attributes:
        armed: Whether to read now.
        mask: Padding mask ``(B, L)`` of the running batch, boolean, true for real tokens, if there is one.

    Raises:
        ValueError: If a pattern matches nothing; the message lists what there is.
    """

    def __init__(
        self,
        root: nn.Module,
        readers: Mapping[str, Reader],
        capture: Callable[[str, Captured], None],
        failed: Callable[[str, Exception], None],
        rows: int,
        max_rows: int,
    ) -> None:
        self.armed = False
        self.mask: Tensor | None = None
        self._capture, self._failed, self._rows, self._max_rows = capture, failed, rows, max_rows
        by_module = {
            id(module): reader
            for pattern, reader in readers.items()
            for module in find_modules(root, [pattern]).values()
        }
        self.taps = find_taps(root, list(readers))
        self._hooks = [hook for tap in self.taps if (hook := self._hook(tap, by_module[id(tap.module)])) is not None]

    def remove(self) -> None:
        """Stop listening; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def read(self, hook: _ReadHook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read one call; for hooks."""
        if not self.armed or is_to_be_ignored():
            return
        try:
            with torch.no_grad(), hooks_ignored():
                call = AttentionCall(*hook.reader(module, args, kwargs))
                self._capture(hook.name, few_rows(call, self.mask, self._rows, self._max_rows))
        except Exception as error:  # the reader is the user's
            self._failed(hook.name, error)

    def _hook(self, tap: Tap, reader: Reader) -> _ReadHook | None:
        try:
            return _ReadHook(self, tap, reader)
        except Exception as error:  # a ScriptModule refuses hooks
            self._failed(tap.name, error)
            return None


class _ReadHook(ModuleHook):
    def __init__(self, owner: ReaderHooks, tap: Tap, reader: Reader) -> None:
        self.owner, self.name, self.reader = owner, tap.name, reader
        self.module = ref(tap.module)
        self.call = GraphCall(self._receive)
        super().__init__(tap.module, before=True)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if torch.compiler.is_compiling():
            tensors: list[Tensor | None] = []
            note = pack((args, value), tensors)
            self.call(tensors, note)
        elif self.owner.armed:
            self.owner.read(self, module, args, value)

    def _receive(self, tensors: Sequence[Tensor | None], note: str) -> None:
        module = self.module()
        if module is not None and self.owner.armed:
            args, kwargs = unpack(note, tensors)
            self.owner.read(self, module, args, kwargs)


def names_attention(root: nn.Module) -> bool:
    """Whether a module is called attention, by its class or by the attribute that holds it.

    Example:
        >>> names_attention(nn.Sequential(nn.Linear(2, 2))), names_attention(nn.TransformerEncoderLayer(8, 2))
        (False, True)
    """
    names = (f"{name.rpartition('.')[2]} {type(module).__name__}".lower() for name, module in root.named_modules())
    return any("attn" in name or "attention" in name for name in names)


def few_rows(call: AttentionCall, mask: Tensor | None, rows: int, max_rows: int) -> AttentionCall:
    """A sample of a call, without the queries that a padding mask ``(B, L)`` of the batch hides, if it fits."""
    if call.query_mask is None and mask is not None and mask.shape == (call.query.shape[0], call.query.shape[2]):
        call = call._replace(query_mask=mask)
    return sample(call, rows, max_rows)
