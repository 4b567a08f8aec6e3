"""Router hooks: scores of routers, and the experts that a training step chooses by them, seen as it chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_collapse.functional.routing import Scores, routing_sums
from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.monitoring.function_calls import FUNCTION_CALLS
from lightning_collapse.monitoring.graph_call import GraphCall, pack, unpack
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.module_tree import own_weight
from lightning_collapse.utilities.modules import hooks_ignored, is_to_be_ignored
from lightning_collapse.utilities.private_torch import FUSED_IN_EVAL, tree_leaves
from lightning_collapse.utilities.routers import Router

Reader = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""From a module, the arguments of its call and what it returned to logits ``(..., E)``, or to these and the indices of
the experts chosen ``(..., k)``."""
_SEARCHES = {"topk": 2, "max": 1, "argmax": 1}
"""Functions that choose, and the place of the dimension among their arguments."""
_INTEGERS = (torch.int64, torch.int32)


class RouterHooks(HookOwner):
    """Adds up what routers do while ``armed``, see :func:`~lightning_collapse.functional.routing.routing_sums`.

    Logits are what the scorer of a router returns, or its weight times its input where it returns something else. The
    experts of a token are those that the step itself looks for, by ``topk``, ``argmax`` or ``max``, in numbers that it
    has made of the router's weight, one per token and expert; the last such search counts, so that groups, noise and
    balancing biases are in it. Where none is seen, as in compiled code, they are the whole numbers that the router
    returns, or the ``k`` largest logits; and where no module says a ``k`` either, every expert gets every token by the
    weight of its gate. Gates are sigmoids where the step takes these and no softmax.

    Args:
        root: The model.
        routers: Where to listen.
        containment: Where failures are told.
        read: Instead of all that, a function that says what the logits are, and which experts were chosen.

    Attributes:
        armed: Whether to add up now.
        mask: Padding mask ``(N, L)`` of the running batch; tokens get their part of it.

    Example:
        >>> router = nn.Linear(4, 3)
        >>> hooks = RouterHooks(router, [Router("router", router, router, 3)], Containment("example"))
        >>> hooks.armed = True
        >>> _ = router(torch.randn(8, 4)).softmax(dim=-1).topk(2, dim=-1)
        >>> hooks.armed = False
        >>> [sums[:2].tolist() for sums in hooks.pop().values()]  # tokens and choices
        [[8.0, 16.0]]
        >>> hooks.remove()
    """

    def __init__(
        self, root: nn.Module, routers: Sequence[Router], containment: Containment, read: Reader | None = None
    ) -> None:
        self.mask: Tensor | None = None
        self._root, self._contained, self._reader = root, containment, read
        self._armed = False
        self._calls: dict[str, _Call] = {}
        self._made: dict[int, tuple[str, Tensor]] = {}
        self._sums: dict[str, Tensor] = {}
        self._hooks: list[ModuleHook] = []
        for router in routers:
            with containment(f"a hook on `{router.name}`"):
                scorer = router.module if read is not None or router.scorer is None else router.scorer
                begins = ModuleHook(router.module, before=True, function=lambda *_, router=router: self.begin(router))
                self._hooks += [begins, CallHook(self, router, scorer)]

    @property
    def armed(self) -> bool:
        """Whether to add up now."""
        return self._armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        for name in list(self._calls):
            self._close(name)
        self._armed = armed
        self._made = {}  # addresses are used again
        FUNCTION_CALLS.remove(self)
        fused = any(isinstance(module, FUSED_IN_EVAL) and not module.training for module in self._root.modules())
        if armed and self._reader is None and not fused:  # those compute in another order while somebody listens
            FUNCTION_CALLS.add(self)

    def pop(self) -> dict[str, Tensor]:
        """Hand over the sums since the last time, by name; routers that did not run are missing."""
        self.mask = None
        sums, self._sums = self._sums, {}
        return sums

    def remove(self) -> None:
        """Stop listening; may be called twice."""
        self.armed = False
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._sums = [], {}

    def begin(self, router: Router) -> None:
        """A router is called; for hooks."""
        if not self._armed or torch.compiler.is_compiling() or is_to_be_ignored():
            return
        self._close(router.name)
        self._calls[router.name] = _Call(router)
        weight = None if router.scorer is None else own_weight(router.scorer)
        if isinstance(weight, Tensor) and (address := storage_of(weight)):
            self._made[address] = router.name, weight

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take note of a function of torch that was called; for the mode."""
        if not self._made:
            return
        name = getattr(func, "__name__", "")
        given = next((found for x in _tensors(args, kwargs) if (found := self._made.get(storage_of(x)))), None)
        call = self._calls.get(given[0]) if given is not None else None
        if call is None:
            return
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim:
            if call.router.experts in (output.shape[-1], output.shape[0]) and (address := storage_of(output)):
                self._made[address] = call.router.name, output
            if name in ("softmax", "sigmoid") and call.scores != "softmax":
                call.scores = "softmax" if name == "softmax" else "sigmoid"
        if name in _SEARCHES:
            call.search(name, args, kwargs, output)

    def capture(self, router: Router, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """Take what a scorer has returned; for hooks."""
        if not self._armed or is_to_be_ignored():
            return
        with self._contained(f"reading router `{router.name}`", "what fails is left out"), torch.no_grad():
            call = self._calls.get(router.name)
            if call is None or call.logits is not None:
                self.begin(router)
                call = self._calls.setdefault(router.name, _Call(router))  # compiled code does not say that it begins
            if self._reader is not None:
                with hooks_ignored():
                    found = self._reader(module, args, value)
                logits, chosen = found if isinstance(found, tuple) else (found, None)
                call.logits = logits.detach().flatten(0, -2)
                call.returned = None if chosen is None else chosen.detach().reshape(len(call.logits), -1)
                return
            # cloned: the step may go on in place
            call.logits = _logits(module, args, value).detach().flatten(0, -2).clone()
            call.returned = _indices(value, len(call.logits), call.logits.shape[1])

    def fail(self, error: Exception) -> None:
        """Leave the searches alone after an exception."""
        self._made = {}
        self._contained.catch("watching how experts are chosen", "the largest logits count", error)

    def _close(self, name: str) -> None:
        """Add up the call of a router that was open."""
        call = self._calls.pop(name, None)
        if call is None or call.logits is None:
            return
        with self._contained(f"reading router `{name}`", "what fails is left out"), torch.no_grad():
            mask = self.mask
            fits = mask is not None and mask.numel() == len(call.logits)
            counted = mask.flatten().bool().to(call.logits.device) if fits and mask is not None else None
            sums = routing_sums(call.logits, call.experts(), call.scores or "softmax", counted)
            before = self._sums.get(name)
            self._sums[name] = sums if before is None or before.shape != sums.shape else before + sums


class _Call:
    """One call of a router, from its beginning until it is called again or the step ends."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.logits: Tensor | None = None
        self.found: Tensor | None = None
        self.returned: Tensor | None = None
        self.scores: Scores | None = None

    def search(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep what was found along the experts."""
        given = args[0] if args else kwargs["input"]
        place = _SEARCHES[name]
        dim = kwargs.get("dim", args[place] if len(args) > place else -1 if name == "topk" else None)
        found = output if isinstance(output, Tensor) else output[1] if isinstance(output, tuple) else None
        along = given.shape[-1] == self.router.experts and dim in (-1, given.ndim - 1)
        if along and isinstance(found, Tensor) and not found.is_floating_point():
            self.found = found.detach().reshape(given.numel() // given.shape[-1], -1)

    def experts(self) -> Tensor | None:
        """Indices of the experts of every token, ``(T, k)``; ``None`` if each gets all."""
        assert self.logits is not None
        seen = [found for found in (self.found, self.returned) if found is not None and len(found) == len(self.logits)]
        seen.sort(key=lambda found: bool(self.router.k) and found.shape[1] != self.router.k)  # some choose one by one
        if seen:
            return seen[0]
        k = min(self.router.k, self.logits.shape[1])
        return self.logits.topk(k, dim=1).indices if k else None


class CallOwner(Protocol):
    """What the hooks of some modules belong to."""

    armed: bool

    def capture(self, key: Any, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """Take what a module was given and has returned."""
        ...


class CallHook(ModuleHook):
    """Hands arguments and output of a call, known by a key, to its owner while armed; also out of a compiled graph."""

    def __init__(self, owner: CallOwner, router: Any, module: nn.Module) -> None:
        self.owner, self.router, self.call = owner, router, GraphCall(self._receive)
        super().__init__(module)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """Hand them on."""
        if torch.compiler.is_compiling():
            tensors: list[Tensor | None] = []
            note = pack((args, value), tensors)
            self.call(tensors, note)
        elif self.owner.armed:
            self.owner.capture(self.router, module, args, value)

    def _receive(self, tensors: Sequence[Tensor | None], note: str) -> None:
        if (module := self._module()) is not None and self.owner.armed:
            args, value = unpack(note, tensors)
            self.owner.capture(self.router, module, args, value)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value


def _logits(module: Any, args: tuple[Any, ...], value: Any) -> Tensor:
    """What a scorer has returned, or its weight times what it received."""
    weight = module.weight
    if isinstance(value, Tensor) and value.shape[-1] == weight.shape[0]:
        return value
    inputs = [x for x in args if isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1] == weight.shape[1]]
    if not inputs:
        raise TypeError(f"it received no tensor (..., {weight.shape[1]}) and returned no logits")
    bias = getattr(module, "bias", None)
    # a buffer of that name balances the choice
    bias = bias if isinstance(bias, nn.Parameter) and bias.shape == weight.shape[:1] else None
    with torch.autocast(weight.device.type, enabled=False):
        return F.linear(inputs[0].float(), weight.float(), None if bias is None else bias.float())


def _indices(value: Any, tokens: int, experts: int) -> Tensor | None:
    """The whole numbers ``(T, k)`` among what a router has returned; a mask over experts is none."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dtype in _INTEGERS]
    fits = (leaf for leaf in leaves if leaf.numel() in range(tokens, tokens * experts, max(tokens, 1)))
    found = next(fits, None)
    return None if found is None else found.detach().reshape(tokens, -1)
