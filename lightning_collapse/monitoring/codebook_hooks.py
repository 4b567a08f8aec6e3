"""Codebook hooks: a histogram of the codes that every training step chooses, in whichever method of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.functional.codebooks import code_counts, quantization_sums
from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.monitoring.code_choices import PROBE, ROWS, Choice, CodeChoices
from lightning_collapse.monitoring.codebooks import FEWEST, is_index
from lightning_collapse.monitoring.function_calls import FUNCTION_CALLS, has_fused_layers
from lightning_collapse.monitoring.router_hooks import CallHook
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.modules import (
    Tap,
    clean_name,
    curve_name,
    hooks_ignored,
    is_compiled,
    is_to_be_ignored,
)
from lightning_collapse.utilities.private_torch import tree_leaves
from lightning_collapse.utilities.training_step import wrap_method
from lightning_collapse.utilities.weight_matrices import whole

Reader = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""From a module, the arguments of its call and what it returned to indices, or to these, codes ``(K, D)`` or their
number, and rows ``(N, D)``."""
AT_ONCE = 16
"""Calls whose indices are kept to be counted together: a few kernels for each take longer than a copy."""
_NUMBERS = ("codebook_size", "num_embeddings", "n_embed", "n_e", "num_codes", "vocab_size")


@dataclass(eq=False)
class Book:
    """A codebook.

    Attributes:
        codes: How many there are.
        counts: Choices since the last point and, last, indices that were no code, without those still to be counted.
        waiting: Indices of the last calls.
        table: The codes, where they are no tensor of the model: of its last step that ends in a point.
        sums: See :func:`~lightning_collapse.functional.codebooks.quantization_sums`, likewise.
        probe: Rows of that step.
    """

    codes: int
    counts: Tensor | None = None
    waiting: list[Tensor] = field(default_factory=list)
    table: Tensor | None = None
    sums: Tensor | None = None
    probe: Tensor | None = None

    def count(self, indices: Tensor) -> None:
        """Add choices."""
        if not is_index(indices):
            self._add(code_counts(indices, self.codes))
            return
        self.waiting.append(indices.detach().flatten().clone())  # others may go on in place
        if len(self.waiting) >= AT_ONCE:
            self.total()

    def total(self) -> Tensor | None:
        """All choices since the last point; ``None`` without any."""
        if self.waiting:
            self._add(code_counts(torch.cat(self.waiting), self.codes))
            self.waiting = []
        return self.counts

    def _add(self, counts: Tensor) -> None:
        self.counts = counts if self.counts is None else self.counts + counts

    def measure(self, choice: Choice) -> None:
        """Take what a choice was read of."""
        self.table = choice.table
        self.probe = choice.probe if self.probe is None else self.probe
        if choice.sums is not None:
            self.sums = choice.sums if self.sums is None else self.sums + choice.sums


@dataclass(eq=False)
class _Site:
    """A method that chooses codes, and where among what it returns their indices are."""

    books: set[str] = field(default_factory=set)
    place: int | None = None


class CodebookHooks(HookOwner):
    """Counts codes while ``armed``: of what a model does itself, or of what ``read`` says.

    In a ``deep`` step all functions of torch are listened to: there codebooks are found, and rows are compared with
    their codes. In others only the methods in which a choice was made are, and these no more once they are known to
    return the indices. Compiled models are read by ``read`` only.

    Args:
        root: The model.
        containment: Where failures are told.
        taps: Modules to call ``read`` for.
        read: Says which codes were chosen.

    Attributes:
        deep: Whether the next step is.
        measures: Whether rows are read in it.
        inline: Whether the training step itself chooses codes: then every step must be deep for all to be counted.
        given: Storages of the tensors of the batch, in a deep step.
        books: Codebooks by name.

    Example:
        >>> class Quantizer(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.codes = nn.Parameter(torch.eye(8))
        ...     def forward(self, rows):
        ...         return self.codes[torch.cdist(rows, self.codes).argmin(dim=1)]
        >>> net = Quantizer()
        >>> hooks = CodebookHooks(net, Containment("example"))
        >>> hooks.deep = hooks.armed = True
        >>> _ = net(torch.eye(8)[:2])
        >>> hooks.armed = False
        >>> hooks.books["codes"].total().tolist()
        [1, 1, 0, 0, 0, 0, 0, 0, 0]
        >>> hooks.remove()
    """

    def __init__(
        self, root: nn.Module, containment: Containment, taps: Sequence[Tap] = (), read: Reader | None = None
    ) -> None:
        self.deep = self.measures = self.inline = self._armed = self._inside = self._whole = False
        self.given: set[int] = set()
        self.books: dict[str, Book] = {}
        self._root, self._contained, self._reader = root, containment, read
        self._listens = read is None and not is_compiled(root)
        self.choices = CodeChoices(root.modules() if self._listens else (), self._fail)
        self._names: dict[int, str] = {}
        self._rows: set[int] = set()
        self._sites: dict[tuple[int, str], _Site] = {}
        self._unwrap: list[Callable[[], None]] = []
        self._hooks: list[ModuleHook] = []
        for tap in taps:
            with containment(f"a hook on `{tap.name}`"):
                self._hooks.append(CallHook(self, curve_name(tap.name), tap.module))

    @property
    def armed(self) -> bool:
        """Whether to count now."""
        return self._armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._armed = armed
        FUNCTION_CALLS.remove(self.choices)
        if armed and self.deep and self._listens and not has_fused_layers(self._root):
            self._whole, self.choices.deep = True, self.measures
            known = self._tables()
            self._names = {storage_of(table): name for name, table in known.items()}
            self._rows = {table.shape[-2] for table in known.values()}
            self.choices.begin(self._names, self.given)
            FUNCTION_CALLS.add(self.choices)
        elif self._whole:
            self._whole, self.choices.deep, self.given = False, False, set()
            with self._contained("counting codes"):
                self._settle()

    def tables(self) -> dict[str, tuple[Tensor, bool]]:
        """Codes ``(K, D)`` as they are now, and whether they are a tensor of the model and not made from others.

        Of sharded ones it is collective. Codebooks that are not known, or stacked ones, are left out.
        """
        stored, found = self._tables(), {}
        for name, book in self.books.items():
            table = whole(stored[name]) if name in stored else book.table
            if table is not None and table.ndim in (2, 3) and table.numel() == book.codes * table.shape[-1]:
                found[name] = table.detach().reshape(book.codes, -1), name in stored
        return found

    def remove(self) -> None:
        """Stop listening; may be called twice."""
        self.deep = self.armed = False
        for hook in self._hooks:
            hook.remove()
        for unwrap in self._unwrap:
            unwrap()
        self._hooks, self._unwrap, self._sites, self.books = [], [], {}, {}

    def capture(self, key: str, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """Ask the reader about a call; for hooks."""
        if not self._armed or self._reader is None or is_to_be_ignored():
            return
        with self._contained(f"`read=` on `{key}`", "what fails is left out"), torch.no_grad(), hooks_ignored():
            found = self._reader(module, args, value)
            indices, table, rows = (*found, None, None)[:3] if isinstance(found, tuple) else (found, None, None)
            if not isinstance(indices, Tensor):
                raise TypeError(f"it must return indices, a tensor of whole numbers, got {type(indices).__name__}.")
            codes = table.shape[-2] if isinstance(table, Tensor) else table or _number(module)
            if not codes:
                raise ValueError("it must return `(indices, codebook)` or `(indices, number of codes)`: none is known")
            book = self.books.setdefault(key, Book(codes))
            book.count(indices)
            if self.measures and isinstance(table, Tensor):
                choice = Choice(module, "", codes, indices.detach(), table=table.detach())
                if isinstance(rows, Tensor) and rows.numel() == indices.numel() * table.shape[-1] > 0:
                    rows = evenly(rows.detach().reshape(indices.numel(), -1), ROWS)
                    chosen = evenly(indices.flatten().long().clamp(0, codes - 1), ROWS)
                    choice.sums = quantization_sums(rows, table.detach().view(codes, -1).index_select(0, chosen))
                    choice.probe = rows[:PROBE].clone()
                book.measure(choice)

    def _around(self, site: _Site, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method that chooses codes, and count them."""
        if not self._armed or self._whole or self._inside or is_to_be_ignored():
            return method(*args, **kwargs)
        if site.place is not None:
            output = method(*args, **kwargs)
            self._count_returned(site, output)
            return output
        self._inside = True
        self.choices.begin()
        FUNCTION_CALLS.add(self.choices)
        try:
            output = method(*args, **kwargs)
        finally:
            FUNCTION_CALLS.remove(self.choices)
            self._inside = False
        with self._contained("counting codes"):
            site.place = self._place(site, output)
            self._settle(site)
        return output

    def _count_returned(self, site: _Site, output: Any) -> None:
        try:
            self.books[next(iter(site.books))].count(tree_leaves(output)[site.place or 0])
        except Exception as error:
            site.place = None
            self._contained.catch("counting the codes that a method returns", "it is listened to instead", error)

    def _place(self, site: _Site, output: Any) -> int | None:
        """Where among its output a method returns the indices of its only codebook."""
        if len(site.books) != 1 or len(self.choices.found) != 1:
            return None
        n = self.choices.found[0].indices.numel()
        for i, leaf in enumerate(tree_leaves(output)):
            if isinstance(leaf, Tensor) and is_index(leaf) and leaf.numel() == n and self.choices.choice_of(leaf):
                return i
        return None

    def _settle(self, site: _Site | None = None) -> None:
        """Count what was chosen, in a deep step also in codebooks that were not known."""
        for choice in self.choices.pop():
            name, address = None, 0 if choice.table is None else storage_of(choice.table)
            known = self._sites.get((id(choice.module), choice.method), _Site()).books
            if address in self._names:
                name = self._names[address]
            elif len(known) == 1:  # what made its table, or puts another tensor into its place
                name = next(iter(known))
            elif (table := choice.table) is not None and choice.codes in self._rows:
                name = self._name_of(choice.module) if table.numel() == choice.codes * table.shape[-1] else None
            if name is None or address in self.choices.others or choice.codes != self._size(name, choice, site):
                continue
            book = self.books.setdefault(name, Book(choice.codes))
            book.count(choice.indices)
            if site is None:
                if self.measures:
                    book.measure(choice)
                self._find(choice, name)

    def _size(self, name: str, choice: Choice, site: _Site | None) -> int:
        return self.books[name].codes if name in self.books else choice.codes if site is None else 0

    def _find(self, choice: Choice, name: str) -> None:
        key = id(choice.module), choice.method
        if choice.module is self._root and choice.method == "training_step":
            self.inline = True  # a wrapper around it would not know yet whether the step counts
            return
        if key not in self._sites:
            self._sites[key] = site = _Site()
            self._unwrap.append(wrap_method(choice.module, choice.method, partial(self._around, site)))
        if name not in self._sites[key].books:
            self._sites[key].books.add(name)
            self._sites[key].place = None

    def _tables(self) -> dict[str, Tensor]:
        named = [*self._root.named_parameters(), *self._root.named_buffers()]
        return {
            curve_name(clean_name(name).removesuffix(".weight")): tensor
            for name, tensor in named
            if tensor.ndim in (2, 3) and tensor.shape[-2] >= FEWEST and tensor.is_floating_point()
        }

    def _name_of(self, module: nn.Module) -> str:
        return curve_name(next(clean_name(name) for name, each in self._root.named_modules() if each is module))

    def _fail(self, error: Exception) -> None:
        self.choices.begin()
        self._contained.catch("listening for codebooks", "what fails is left out", error)


def _number(module: nn.Module) -> int:
    numbers = (getattr(module, name, None) for name in _NUMBERS)
    return next((n for n in numbers if isinstance(n, int) and n > 0), 0)
