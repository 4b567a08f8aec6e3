"""Vector quantization as a step does it: a search along all codes, and a look-up of what it found in a table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.functional.codebooks import quantization_sums
from lightning_collapse.functional.vector_quantization import nearest_codes
from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.monitoring.codebooks import FEWEST, SEARCHES, is_index, lookup
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.private_torch import tree_leaves

ROWS, PROBE = 4096, 512
"""Rows of a step that errors are read from, and that are kept to see which change their code."""
_LAST = {"sort", "argsort", "topk"}
"""Searches along the last dimension, if none is named."""


@dataclass(eq=False)
class Choice:
    """A choice among codes.

    Attributes:
        module: In whose method it was made, the innermost one.
        method: The name of that.
        codes: How many there were.
        indices: Of those chosen.
        candidates: What may be the rows that chose, out of the variables of the method.
        table: Codes ``(K, D)`` that were looked up, if any were.
        sums: Of :func:`~lightning_collapse.functional.codebooks.quantization_sums`.
        probe: Some of the rows.
    """

    module: nn.Module
    method: str
    codes: int
    indices: Tensor
    candidates: list[Tensor] = field(default_factory=list)
    table: Tensor | None = None
    sums: Tensor | None = None
    probe: Tensor | None = None


class CodeChoices:
    """Listens to the functions of torch, see :class:`~lightning_collapse.monitoring.function_calls.FunctionCalls`.

    A search is ``argmin``, ``max`` and the like along one dimension of real numbers that are not the batch's. It is a
    choice of codes once a table with as many rows is looked up by it, or multiplied with one-hot rows made of it.

    Args:
        modules: Those of the model.
        on_failure: Called with what :meth:`note` has raised.

    Attributes:
        deep: Whether to read rows, too.
        found: All choices since :meth:`begin`.
        others: Storages of tables that were looked up by other indices, such as tokens.

    Example:
        >>> choices = CodeChoices([], print)
        >>> choices.begin()
        >>> choices.pop()
        []
    """

    def __init__(self, modules: Iterable[nn.Module], on_failure: Callable[[Exception], None]) -> None:
        self.deep = False
        self.others: set[int] = set()
        self._modules, self.fail = {id(module) for module in modules}, on_failure
        self.begin()

    def begin(self, tables: Iterable[int] = (), given: Iterable[int] = ()) -> None:
        """Forget the last step; ``tables`` and ``given`` are storages of the model's and of the batch's tensors."""
        self.found: list[Choice] = []
        self._made: dict[int, tuple[Choice, Tensor]] = {}  # kept, since addresses are used again
        self._tables, self._given = set(tables), set(given)

    def pop(self) -> list[Choice]:
        """Hand over the choices, and forget them."""
        found = self.found
        for choice in found:
            choice.candidates = []
        self.begin()
        return found

    def choice_of(self, tensor: Tensor) -> Choice | None:
        """What a tensor was made from."""
        made = self._made.get(storage_of(tensor))
        return None if made is None else made[0]

    def note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Take note of a function that was called."""
        name = getattr(func, "__name__", "")
        if name in SEARCHES:
            self._search(name, args, kwargs, output)
        looked_up = None if name == "__getitem__" else lookup(name, args, kwargs)
        if looked_up is not None and self.choice_of(looked_up[1]) is None:
            self.others |= {storage_of(looked_up[0])} & self._tables  # addresses of others are used again
        elif self._made and isinstance(output, Tensor):
            self._follow(name, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)], output)

    def _search(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        searched = args[0] if args else kwargs.get("input")
        place = 2 if name == "topk" else 1
        dim = kwargs.get("dim", args[place] if len(args) > place else -1 if name in _LAST else None)
        indices = output[1] if isinstance(output, tuple) else output
        if not isinstance(searched, Tensor) or not searched.is_floating_point() or not isinstance(dim, int):
            return
        if storage_of(searched) in self._given or searched.shape[dim] < FEWEST or not is_index(indices):
            return
        if (choice := self._at(searched.shape[dim], indices.detach())) is not None:
            self.found.append(choice)
            self._made[storage_of(indices)] = choice, indices

    def _at(self, codes: int, indices: Tensor) -> Choice | None:
        """The method that runs, and what in it may be the rows."""
        frame = inspect.currentframe()
        while frame is not None:
            code = frame.f_code
            module = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            is_one = isinstance(module, nn.Module) and id(module) in self._modules
            if module is not None and is_one and callable(getattr(type(module), code.co_name, None)):
                near = [x.detach() for x in frame.f_locals.values() if self.deep and _may_be_rows(x)]
                return Choice(module, code.co_name, codes, indices, near)
            frame = frame.f_back
        return None

    def _join(self, choice: Choice, given: list[Tensor], output: Tensor) -> None:
        """Take for one choice what was searched a tile of rows at a time."""
        tiles = [self.choice_of(tile) for tile in given]
        if all(tile is not None and tile.codes == choice.codes for tile in tiles):
            choice.indices = output.detach()
            self.found = [one for one in self.found if one is choice or one not in tiles]

    def _follow(self, name: str, given: list[Tensor], output: Tensor) -> None:
        choice = next((found for x in given if (found := self.choice_of(x)) is not None), None)
        if choice is None:
            return
        if name == "cat" and choice.table is None and is_index(output):
            self._join(choice, given, output)
        n = choice.indices.numel()
        # one-hot rows are filled in, and as many as there are codes would look like these
        for table in given if output.is_floating_point() and not name.startswith("scatter") else ():
            known = storage_of(table) in self._tables
            if (
                _fits(table, output, choice.codes, n)
                and self.choice_of(table) is None
                and (choice.table is None or known)
            ):
                choice.table = table.detach() if table.ndim > 1 else table.detach().view(choice.codes, -1)
                if self.deep and choice.sums is None:
                    _measure(choice)
                return
        # or means of the rows that chose, put into the table, would make that one of the indices
        one_hot = output.numel() == n * choice.codes and not output.requires_grad
        if (is_index(output) or one_hot) and storage_of(output) not in self._tables:
            self._made[storage_of(output)] = choice, output


def _fits(table: Tensor, output: Tensor, codes: int, n: int) -> bool:
    """Whether an output is ``n`` rows of a table, which some libraries flatten first."""
    if not table.is_floating_point() or table.ndim not in (1, 2, 3):
        return False
    if table.ndim == 1:
        return table.numel() >= 2 * codes and not table.numel() % codes and output.numel() * codes == n * table.numel()
    width = table.shape[-1]
    return table.shape[-2] == codes and output.numel() == n * width and output.shape[-1:] == (width,)


def _may_be_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided and value.ndim > 1


@torch.no_grad()
def _measure(choice: Choice) -> None:
    """Rows beside their codes, before anything moves these; of several candidates those whose choice it would be."""
    table = choice.table
    if table is None or table.numel() != choice.codes * table.shape[-1]:
        return
    table, indices = table.view(choice.codes, -1), choice.indices.flatten()
    width, n = table.shape[1], len(indices)
    rows = [x for x in choice.candidates if x.numel() == n * width and storage_of(x) != storage_of(table)]
    rows = [x if x.shape[-1] == width else x.movedim(1, -1) for x in rows if width in (x.shape[-1], x.shape[1])]
    if not rows or not n:
        return
    near = torch.stack([evenly(x.reshape(n, width), ROWS) for x in rows])
    chosen = evenly(indices, ROWS).long()
    sums = torch.stack([quantization_sums(x, table.index_select(0, chosen)) for x in near])
    agree = torch.stack([(nearest_codes(x[:PROBE], table) == chosen[:PROBE]).to(sums).mean() for x in near])
    best = (agree - 1e-3 * sums[:, 1] / (1 + sums[:, 1])).argmax()
    # codes that are compared after a matrix or a normalization are not the ones in the table
    is_theirs = agree.index_select(0, best.view(1)) > 0.9
    choice.sums = torch.where(is_theirs, sums.index_select(0, best.view(1))[0], torch.nan)
    choice.probe = near.index_select(0, best.view(1))[0, :PROBE].clone()
