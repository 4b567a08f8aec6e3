"""State of a penalty: what it keeps of parameters, through growth, new machines and checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.penalties.support.real_parameters import real_ones
from lightning_collapse.penalties.support.shards import Layout, wide
from lightning_collapse.utilities.sharding import local


class ParameterState:
    """Tables of tensors by kind and name of a parameter, each as large as the parameter and where it lies.

    Attributes:
        tables: By kind, then by name; of sharded parameters this process's parts.
        layouts: How each parameter lies that :meth:`place` was told of, by name.
    """

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, Tensor]] = {}
        self.layouts: dict[str, Layout] = {}

    def __getitem__(self, kind: str) -> dict[str, Tensor]:
        return self.tables.setdefault(kind, {})

    @torch.no_grad()
    def place(self, parameters: Mapping[str, Tensor], follow: Collection[str] = ()) -> dict[str, Tensor]:
        """Move everything to the parameters; what they have grown by is zero. Collective if any is sharded.

        Args:
            parameters: All there are, by name; what is remembered of others is dropped, with a warning.
            follow: Kinds that take the values of a parameter where it has grown.

        Returns:
            The parameters that can be remembered; those that are no real numbers are left out, with a warning.

        Raises:
            ValueError: If a parameter has shrunk or has another number of dimensions.
        """
        parameters = real_ones(parameters)
        for name, parameter in parameters.items():
            if any(name in table for table in self.tables.values()):
                _check_growth(name, self.layouts[name].shape, tuple(parameter.shape))
        gone = sorted({name for table in self.tables.values() for name in table} - parameters.keys())
        if gone:
            warnings.warn(
                f"What was remembered of parameters that are gone is dropped: {', '.join(gone)}.", stacklevel=3
            )
        for kind, table in self.tables.items():
            for name in gone:
                table.pop(name, None)
            for name, parameter in parameters.items():
                if name in table:
                    table[name] = self._placed(name, table[name], parameter, kind in follow)
        self.layouts = {name: Layout.of(parameter) for name, parameter in parameters.items()}
        return parameters

    def whole(self) -> dict[str, dict[str, Tensor]]:
        """A copy in which nothing is sharded. Collective if anything is."""
        return {
            kind: {name: self.layouts[name].gather(part).detach().clone() for name, part in table.items()}
            for kind, table in self.tables.items()
        }

    def load(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Take back what :meth:`whole` returned; :meth:`place` brings it where it belongs."""
        self.tables = {kind: {name: part.clone() for name, part in table.items()} for kind, table in tables.items()}
        self.layouts = {name: Layout(tuple(part.shape)) for table in tables.values() for name, part in table.items()}

    def _placed(self, name: str, part: Tensor, parameter: Tensor, follow: bool) -> Tensor:
        here = local(parameter)
        part = part.to(here.device, wide(here))
        old, new = self.layouts[name], Layout.of(parameter)
        if old == new:
            return part
        whole = old.gather(part)
        if whole.shape != new.shape:
            grown = Layout.of(parameter).gather(here).to(whole, copy=True) if follow else whole.new_zeros(new.shape)
            grown[tuple(slice(size) for size in whole.shape)] = whole
            whole = grown
        return new.cut(whole)


def _check_growth(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    if len(old) != len(new) or any(before > after for before, after in zip(old, new, strict=True)):
        raise ValueError(
            f"`{name}` has shape {new}, and what is remembered of it {old}: a parameter may grow from task to task, not"
            " shrink. Give the new one another name, or leave it out with `parameters=[...]`."
        )
