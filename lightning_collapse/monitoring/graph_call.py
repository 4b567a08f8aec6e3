"""Custom operator (``torch.library``) that calls Python from a compiled graph, which it neither breaks nor grows."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import Library, register_fake

Receiver = Callable[[Sequence[Tensor | None], str], None]
"""Called with the tensors and the note of a call."""

_SPACE = "lightning_collapse"
_NUMBERS = count(1)
_CALLS: WeakValueDictionary[int, GraphCall] = WeakValueDictionary()


class GraphCall:
    """Calls a function from a graph of ``torch.compile``, with tensors that the graph has computed.

    The compiler sees an operator that writes to :attr:`token`: it looks no further, may not leave it out, and has
    nothing to guard on. What the function does may therefore change from step to step, and costs no compilation: one
    graph, no break, ``fullgraph=True`` holds. The token is a number on the host, so that modules of one class share
    their compiled code.

    Args:
        receive: What to call; it must not keep the tensors, whose memory the graph uses again, nor raise. Checkpointed
            code that runs again in the backward pass calls it again.

    Attributes:
        token: What the operator is told to write to: the number of this object, which stays as it is.

    Example:
        >>> seen = []
        >>> call = GraphCall(lambda tensors, note: seen.append((tensors[0].sum().item(), note)))
        >>> call([torch.ones(3)], "ones")  # as well from inside a compiled function
        >>> seen
        [(3.0, 'ones')]
    """

    def __init__(self, receive: Receiver) -> None:
        self.receive = receive
        number = next(_NUMBERS)
        self.token = torch.tensor(number, device="cpu")
        _CALLS[number] = self

    def __call__(self, tensors: list[Tensor | None], note: str = "") -> None:
        """Call the function; tensors must be detached."""
        _OPERATOR(tensors, note, self.token)


def pack(value: Any, tensors: list[Tensor | None]) -> str:
    """Write down what a value is made of, for :func:`unpack`, and put its tensors into a list.

    It is traced by compilers, which know no unions of types in torch 2.5.

    Tuples, lists and dicts are kept, and strings and flags in them; all else becomes ``None``.
    """
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return str(len(tensors) - 1)
    if isinstance(value, (tuple, list)):
        items = "".join([pack(item, tensors) + "," for item in value])
        return f"[{items}]" if isinstance(value, list) else f"({items})"
    if isinstance(value, dict):
        return "{" + "".join([f"{key!r}:{pack(item, tensors)}," for key, item in value.items()]) + "}"
    return repr(value) if isinstance(value, (str, bool)) else "None"


def unpack(note: str, tensors: Sequence[Tensor | None]) -> Any:
    """The value that :func:`pack` has written down.

    Example:
        >>> tensors = []
        >>> unpack(pack(({"mask": None, "causal": True}, torch.ones(2), 3.0), tensors), tensors)
        ({'mask': None, 'causal': True}, tensor([1., 1.]), None)
    """

    def fill(value: Any) -> Any:
        if type(value) is int:
            return tensors[value]
        if isinstance(value, tuple | list):
            return type(value)(map(fill, value))
        return {key: fill(item) for key, item in value.items()} if isinstance(value, dict) else value

    return fill(literal_eval(note))


@torch.compiler.disable  # type: ignore[untyped-decorator] # the graph that runs it may be run under the compiler's eyes
def _run(tensors: Sequence[Tensor | None], note: str, token: Tensor) -> None:
    call = _CALLS.get(int(token))
    if call is not None:
        call.receive(tensors, note)


def _define() -> tuple[Library, Callable[[list[Tensor | None], str, Tensor], None]]:
    """Register the operator, under a name that no earlier import of this module has taken."""
    space = getattr(torch.ops, _SPACE)
    name = next(name for i in count() if not hasattr(space, name := f"call_{i}"))
    tags = tuple(getattr(torch.Tag, tag) for tag in ("cudagraph_unsafe",) if hasattr(torch.Tag, tag))
    library: Any = Library(_SPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"{name}(Tensor?[] tensors, str note, Tensor(a!) token) -> ()", tags=tags)
    library.impl(name, _run, "CompositeExplicitAutograd")
    register_fake(f"{_SPACE}::{name}", lambda tensors, note, token: None, lib=library)
    return library, getattr(space, name).default


_LIBRARY, _OPERATOR = _define()  # the operator lives as long as the library
