"""Codebook usage: which rows of a table a training step chooses by a search of its own, as vector quantization does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.functional.assignment import assignment_null, perplexity
from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.monitoring.function_calls import FUNCTION_CALLS
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import all_reduce_sum, max_over_processes, world_size
from lightning_collapse.utilities.modules import clean_name, curve_name, is_compiled, is_to_be_ignored
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.private_torch import FUSED_IN_EVAL, tree_leaves

TRIES = 3
"""Points after which tables that were not chosen from are left alone."""
FEWEST = 5
"""Rows of a table that may be a codebook."""
_LOOKUPS = {"embedding": ("input", "weight"), "index_select": ("input", "dim", "index")}
SEARCHES = {"argmin", "argmax", "argsort", "max", "min", "sort", "topk"}


class Codebooks:
    """Counts codes: indices into a table of the model that come out of a search, and not out of the batch.

    A table is a parameter or buffer ``(K, D)``. A search is ``argmin``, ``argmax``, ``min``, ``max``, ``topk`` or
    ``sort`` over real numbers that are not a tensor of the batch; its indices stay such through whatever makes integers
    of them and of them alone. Seen are ``nn.Embedding``, ``F.embedding``, ``table[indices]`` and
    ``table.index_select(0, indices)``, in a training step, with or without gradient. A table that is also looked up by
    other indices, such as token ids or positions, is no codebook.

    Not seen are codes that a product with one-hot rows reads (straight-through Gumbel softmax: a softmax head), tables
    of more than two dimensions, rounding without a table (FSQ, LFQ), sharded tables, compiled models, and models that
    hold one of torch's transformer layers in evaluation mode, which would compute in another order while somebody
    listens. A bank of features in which neighbours are looked up is taken for a codebook too.

    Args:
        root: The model.
        inside: Names of modules whose tables count; ``None`` for all.
        containment: Where failures are told, in the name of its owner.

    Attributes:
        sizes: Rows of the tables that may be codebooks, by name: that of an ``nn.Embedding``, or of the tensor.
        names: Tables that are.
        open: Whether there may be others.
        given: Addresses of the tensors of the running batch.

    Example:
        >>> net = nn.ParameterDict({"codes": torch.eye(8)})
        >>> books = Codebooks(net)
        >>> books.armed = True
        >>> _ = net["codes"][torch.cdist(torch.eye(8)[:2], net["codes"]).argmin(dim=1)]
        >>> books.armed = False
        >>> books.collect(0)
        >>> books.read(0, torch.device("cpu"))["codes"].tolist()  # perplexity, rows, share of codes without any
        [2.0, 2.0, 0.75]
    """

    def __init__(
        self, root: nn.Module, inside: Sequence[str] | None = None, containment: Containment | None = None
    ) -> None:
        self._root, self._inside = root, inside
        self._containment = containment or Containment(type(self).__name__)
        self.names: set[str] = set()
        self.open = not is_compiled(root)
        self.sizes = {name: len(table) for name, table in self._tables()} if self.open else {}
        self.given: set[int] = set()
        self._tries = 0
        self._armed = False
        self._known: dict[int, tuple[str, torch.Size]] = {}
        self._chosen: dict[int, Tensor] = {}
        self._counted: set[tuple[str, int]] = set()
        self._others: set[str] = set()
        self._step: dict[str, Tensor] = {}
        self._batches: dict[str, list[tuple[int, Tensor]]] = {}

    @property
    def armed(self) -> bool:
        """Whether to count now."""
        return self._armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        if self._armed:
            FUNCTION_CALLS.remove(self)
        # addresses are used again
        self._chosen, self._counted, self._known = {}, set(), {}
        self._armed = armed and bool(self.open or self.names) and not self._is_fused()
        if self._armed:
            tables = ((storage_of(table), name, table.shape) for name, table in self._tables())
            self._known = {address: (name, shape) for address, name, shape in tables if address}
            FUNCTION_CALLS.add(self)

    def note(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Take note of a function that was called; for the mode."""
        if not self.open and not self.names:
            return
        name = getattr(func, "__name__", "")
        if name in SEARCHES:
            self._search(args, kwargs, output)
        elif (found := lookup(name, args, kwargs)) is not None and self._is_table(found[0]):
            self._look_up(*found)
        elif self._chosen and isinstance(output, Tensor) and is_index(output):
            self._pass_on((args, kwargs), output)

    def fail(self, error: Exception) -> None:
        """Count no more after an exception."""
        self.open, self.names = False, set()
        self._containment.catch("counting the codes of codebooks", "their curves end here", error)

    def collect(self, time: int) -> None:
        """Keep what a batch has chosen."""
        for name, counts in self._step.items():
            if name not in self._others:
                self._batches.setdefault(name, []).append((time, counts))
        self._step = {}

    def read(self, since: int, device: torch.device) -> dict[str, Tensor]:
        """Perplexity, number of rows, and share of codes that none chose, over all processes; by the table's name.

        Collective.

        Args:
            since: Time of the oldest batch to count.
            device: Where to put what nothing is known of.
        """
        kept = {name: [(time, of) for time, of in batches if time >= since] for name, batches in self._batches.items()}
        self._batches = {name: batches for name, batches in kept.items() if batches}
        if self.open:
            self._agree(device)
        names = [name for name in self.sizes if name in self.names]
        if not names:
            return {}
        nothing = torch.zeros((), dtype=accumulation_dtype(device), device=device)
        own = [
            sum((of for _, of in self._batches.get(name, ())), start=nothing.expand(self.sizes[name])) for name in names
        ]
        total = torch.split(all_reduce_sum(torch.cat(own)), [len(of) for of in own])
        unused = [(of == 0).to(of).mean() for of in total]
        read = [torch.stack([perplexity(of), of.sum(), share]) for of, share in zip(total, unused, strict=True)]
        return dict(zip(names, read, strict=True))

    def clear(self) -> None:
        """Forget the counts."""
        self._batches, self._step = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know: lists, numbers and tensors."""
        batches = self._batches if world_size() == 1 else {}
        return {
            "names": sorted(self.names),
            "others": sorted(self._others),
            "open": self.open,
            "tries": self._tries,
            "batches": {name: [list(batch) for batch in kept] for name, kept in batches.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on where :meth:`state_dict` was called."""
        self.names, self._others = set(state["names"]) & set(self.sizes), set(state["others"])
        self.open, self._tries = state["open"] and bool(self.sizes), state["tries"]
        batches = {name: state["batches"][name] for name in state["batches"] if name in self.names}
        self._batches = {name: [(time, of.to(device)) for time, of in kept] for name, kept in batches.items()}

    def _tables(self) -> list[tuple[str, Tensor]]:
        tensors = [*self._root.named_parameters(), *self._root.named_buffers()]
        return [
            (name, tensor)
            for name, tensor in ((clean_name(name).removesuffix(".weight"), tensor) for name, tensor in tensors)
            if tensor.ndim == 2 and len(tensor) >= FEWEST and tensor.is_floating_point() and self._is_inside(name)
        ]

    def _is_fused(self) -> bool:
        return any(isinstance(module, FUSED_IN_EVAL) and not module.training for module in self._root.modules())

    def _is_inside(self, name: str) -> bool:
        return self._inside is None or any(name == of or name.startswith(f"{of}.") for of in self._inside)

    def _is_table(self, tensor: Any) -> bool:
        if not isinstance(tensor, Tensor):
            return False
        return self._known.get(storage_of(tensor), ("", None))[1] == tensor.shape

    def _search(self, args: Any, kwargs: Any, output: Any) -> None:
        searched = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if searched is None or not searched.is_floating_point() or storage_of(searched) in self.given:
            return
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, Tensor) and is_index(part):
                self._chosen[storage_of(part)] = part

    def _look_up(self, table: Tensor, indices: Tensor) -> None:
        if is_to_be_ignored():
            return
        name, _ = self._known[storage_of(table)]
        address = storage_of(indices)
        if address not in self._chosen:
            self._others.add(name)
            self._step.pop(name, None)
        elif (name, address) not in self._counted:
            self._counted.add((name, address))
            with torch.no_grad():
                rows = indices.detach().flatten().long().remainder(len(table))  # negative ones count from the end
                counts = torch.zeros(len(table), dtype=accumulation_dtype(rows.device), device=rows.device)
                counts.index_add_(0, rows, torch.ones_like(rows, dtype=counts.dtype))
                self._step[name] = self._step[name] + counts if name in self._step else counts

    def _pass_on(self, given: Any, output: Tensor) -> None:
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and is_index(leaf)]
        if tensors and all(storage_of(tensor) in self._chosen for tensor in tensors):
            self._chosen[storage_of(output)] = output

    def _agree(self, device: torch.device) -> None:
        """What any process has found, or found to be none, holds for all."""
        own = [float(name in of) for of in (self._batches, self._others) for name in self.sizes]
        every = max_over_processes(own, device)
        found, others = every[: len(self.sizes)], every[len(self.sizes) :]
        self._others = {name for name, is_other in zip(self.sizes, others, strict=True) if is_other}
        self.names |= {name for name, is_found in zip(self.sizes, found, strict=True) if is_found}
        self.names -= self._others
        self._tries += 1
        self.open = self._tries < TRIES


def lookup(name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Tensor] | None:
    """Table and indices of a look-up, if a function of this name is one."""
    if name == "__getitem__":
        table, indices = args
        indices = indices[0] if isinstance(indices, tuple) and indices else indices
    elif (names := _LOOKUPS.get(name)) is not None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        table, indices = given.get("weight", given.get("input")), given.get("index", given.get("input"))
        if given.get("dim", 0) != 0:
            return None
    else:
        return None
    return (table, indices) if isinstance(indices, Tensor) and is_index(indices) else None


def is_index(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers that may be indices."""
    return tensor.dtype in (torch.int64, torch.int32)


def code_points(step: int, found: Mapping[str, list[float]], sizes: Mapping[str, int]) -> list[Point]:
    """Points of codebooks: the perplexity of codes and the unused ones, with what equally likely codes read of each.

    Args:
        step: Of the points.
        found: What :meth:`Codebooks.read` returned, on the host.
        sizes: How many codes there are.
    """
    points = []
    for name, (used, rows, unused) in found.items():
        n, layer, codes = int(rows), curve_name(name), sizes[name]
        if n:
            points.append(Point("collapse", layer, "assignment_perplexity", step, used, n, assignment_null(n, codes)))
            points.append(Point("collapse", layer, "unused_codes", step, unused, n, (1 - 1 / codes) ** n))
    return points
