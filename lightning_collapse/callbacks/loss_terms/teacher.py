"""Distillation teacher: a frozen copy of the student, and what its layer returns."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_collapse.utilities.modules import find_modules


class Call(NamedTuple):
    """One outermost call of the student and what the layer returned within it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: list[Tensor | None]


class Teacher:
    """A frozen module that is no submodule of anything, what its layer returns, and what it has of the student."""

    def __init__(self, module: nn.Module, shared: Iterable[str]) -> None:
        self.module = module
        self.shared = {name: module.get_parameter(name) for name in shared}
        self.parts: dict[str, nn.Module] = named_parts(module)
        self._rows: list[Tensor | None] | None = None
        self._rows_of: Callable[[Any], Tensor | None] = _nothing
        self._remove: Callable[[], object] = partial(_nothing, None)

    def hook(self, device: torch.device, name: str, rows_of: Callable[[Any], Tensor | None]) -> None:
        """Move to a device and hook the layer of a name, in place of any other."""
        self.module.to(device)
        self._remove()
        if name not in self.parts:
            raise MisconfigurationException(
                f"The teacher of `Distillation`, of an earlier task, has no layer {name!r}."
            )
        self._rows_of = rows_of
        self._remove = self.parts[name].register_forward_hook(self._capture).remove

    @contextmanager
    def captured(self) -> Iterator[list[Tensor | None]]:
        """What the layer returns meanwhile."""
        rows: list[Tensor | None] = []
        self._rows = rows
        try:
            yield rows
        finally:
            self._rows = None

    def _capture(self, module: nn.Module, args: Any, output: Any) -> None:
        # a method, and no function in a function: between two fits a teacher can be pickled
        if self._rows is not None:
            self._rows.append(self._rows_of(output))


def _nothing(output: Any) -> None:
    return None


def named_parts(module: nn.Module) -> dict[str, nn.Module]:
    """A module and all submodules by clean name."""
    return {"": module, **(find_modules(module, ["*"]) if any(True for _ in module.children()) else {})}
