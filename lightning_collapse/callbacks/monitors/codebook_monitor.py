"""CodebookMonitor: how many codes of a vector quantizer are in use, which are dead, and how codes and encoder move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.hooked_monitor import HookedMonitor
from lightning_collapse.callbacks.monitors.monitor import Detail, Name
from lightning_collapse.functional.assignment import assignment_null
from lightning_collapse.functional.codebooks import (
    code_perplexity,
    codebook_motion,
    dead_codes,
    missed_hits,
    moved_idle_codes,
    quantization_reading,
    unseen_mass,
    usage,
    usage_null,
)
from lightning_collapse.functional.vector_quantization import nearest_codes
from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.monitoring.codebook_hooks import Book, CodebookHooks, Reader
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.distributed import all_reduce_sum, from_all_processes, world_size
from lightning_collapse.utilities.modules import is_compiled, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.private_torch import tree_leaves
from lightning_collapse.utilities.registry import Curve

_OORD, _LANCUCKI = "van den Oord et al. 2017, arXiv 1711.00937", "Lancucki et al. 2020, arXiv 2005.08520"
_POINT_AT = (
    'Name the modules that quantize and say what they chose: `CodebookMonitor(layers=["quantizer"], read=...)`, a'
    " function `read(module, args, output)` that returns indices, or `(indices, codebook)`."
)


class CodebookMonitor(HookedMonitor[CodebookHooks]):
    """Log how many codes of a vector quantizer are in use, which of the others are dead, and how far codes move.

    **Logged metrics**, ``codebook/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    A point rests on all training batches since the last one, counted on the device; the null of ``usage`` and
    ``perplexity`` is what so many rows leave of equally likely codes. A code is dead, and not rare, where it is 20 hits
    overdue by its own share so far. ``churn`` is read from rows of the last point: which are nearest to another code
    now. Errors and scales are those of the batch that ends in the point, and
    are left out where rows are compared with something else than the table, such as its rows after a matrix.

    Codebooks need no argument: a choice of codes is a search (``argmin``, ``max``, ...) along as many numbers as a
    table has rows that is then looked up by it, whatever the method of whichever module; tables may be parameters,
    buffers of moving averages, or computed from them (SimVQ). Levels of a residual quantizer have curves of their own.
    Several codebooks stacked in one tensor are counted as one. What quantizes without a search (FSQ, LFQ), without a
    table, and in compiled models must be told::

        def read(fsq, args, output):
            return output[1], fsq.codebook_size

        Trainer(callbacks=[CodebookMonitor(layers=["quantizer"], read=read)])

    Args:
        layers: Names of modules that ``read`` is called for, or glob patterns of them.
        read: Called with a module of ``layers``, the arguments of its call and what it returned, without gradient, at
            every training step; returns indices of any shape, ``(indices, codebook)`` with codes ``(K, D)`` or their
            number, or ``(indices, codebook, rows)``. It must not draw random numbers.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        detail: ``"low"`` keeps ``n`` and ``flag`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range, or one of ``layers`` and ``read`` without the other; when the fit
            starts, as ``MisconfigurationException``, on a pattern that matches nothing.

    References:
        van den Oord et al., *Neural Discrete Representation Learning*, 2017, https://arxiv.org/abs/1711.00937; Lancucki
        et al., *Robust Training of Vector Quantized Bottleneck Models*, 2020, https://arxiv.org/abs/2005.08520.

    Example::

        trainer = Trainer(callbacks=[CodebookMonitor()])
    """

    family = "codebook"
    declares = (
        Curve("usage", "share of the codes chosen since the last point", "0 to 1", "far below its null", _OORD),
        Curve("perplexity", "exponential of the entropy of the choices", "1 to K", "far below its null", _OORD),
        Curve("perplexity_null", "the same of as many equally likely choices", "1 to K", "does not tell"),
        Curve("unseen_mass", "probability of a code not seen before", "0 to 1", "0 with unused codes: these are dead"),
        Curve("dead", "share of the codes that are 20 hits overdue", "0 to 1", "near 1", _LANCUCKI),
        Curve("churn", "share of rows nearest to another code than at the last point", "0 to 1", "not falling"),
        Curve("motion", "distance that codes moved over their lengths, by hits", "0 to infinity", "0: not trained"),
        Curve("quantization_error", "squared distance of rows from codes, over their variance", "0 to infinity", "1"),
        Curve("encoder_scale", "root mean square of rows over that of codes", "0 to infinity", "leaving 1", _LANCUCKI),
        Curve("resets", "codes hardly used before that were put elsewhere", "0 to K", "does not tell"),
        Curve("n", "rows behind the point, over all processes", "0 to infinity", "few: a rough reading"),
        Curve("flag", "codebook", "0 to 7", "above 0: why to doubt the point"),
    )
    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        read: Reader | None = None,
        every_n_steps: int | None = None,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "all codebooks")
        if (read is None) != (layers is None) or not (read is None or callable(read)):
            raise ValueError(
                f"`read` takes a function `read(module, args, output)` of the modules that `layers` names, and needs"
                f" them, got {read!r} and layers={layers!r}. Without both codebooks are found."
            )
        self.layers, self.reader = layers, read
        self._past: dict[str, dict[str, Tensor]] = {}
        self._resumed = False

    @override
    def state(self) -> dict[str, Any]:
        books = {} if self._hooks is None else self._hooks.books
        counts = {name: total for name, book in books.items() if (total := book.total()) is not None}
        window = counts if world_size() == 1 else {}  # a checkpoint holds what one process has seen
        return {"past": self._past, "codes": {name: book.codes for name, book in books.items()}, "window": window}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        assert self._hooks is not None
        device = self._device
        self._resumed = bool(state["codes"])
        self._past = {name: {key: x.to(device) for key, x in past.items()} for name, past in state["past"].items()}
        for name, codes in state["codes"].items():
            counts = state["window"].get(name)
            self._hooks.books[name] = Book(codes, None if counts is None else counts.to(device))

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        let_hooks_be_seen(pl_module)
        self._past, self._device, self._resumed = {}, pl_module.device, False
        taps = [] if self.layers is None else self.choose_taps(self.layers, [], pl_module)
        self._hooks = CodebookHooks(pl_module, self.contained, taps, self.reader)
        self._scope = StepScope(pl_module)
        if self.reader is None and is_compiled(pl_module):
            self.warn_once(f"no codebook is found in a compiled model. {_POINT_AT}")

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._hooks is None or self._scope is None:
            return
        self._hooks.measures = batches_left == 0
        # after a restart it is to be found again where codebooks are used
        self._hooks.deep = self._hooks.measures or self._hooks.inline or self._resumed
        if self._hooks.deep:
            self._hooks.given = {storage_of(x) for x in tree_leaves(batch) if isinstance(x, Tensor)}
        self._scope.request(self._hooks)

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Histograms over all processes, and how codes have moved. Collective."""
        if self._hooks is None:
            return {}
        self._agree()
        self._resumed = False
        hooks, books = self._hooks, self._hooks.books
        if not books:
            self.warn_once(f"no codebook was found, or it did not run before a point. {_POINT_AT}")
            return {}
        known = hooks.tables()
        tables = {name: known[name][0] if name in known else None for name in books}
        widths = {name: 0 if table is None else table.shape[1] for name, table in tables.items()}
        if world_size() > 1:
            every = from_all_processes(widths)
            widths = {name: max(of[name] for of in every) for name in books}
        own = [self._own(name, tables[name], widths[name]) for name in books]
        sums = torch.split(all_reduce_sum(torch.cat(own)), [len(piece) for piece in own])
        counts = {name: of[: books[name].codes + 1].long() for name, of in zip(books, sums, strict=True)}
        moved = all_reduce_sum(torch.stack([self._moved(name, tables[name], counts[name][:-1]) for name in books]))
        readings: dict[Name, Tensor] = {}
        for name, of, row in zip(books, sums, moved, strict=True):
            changed, compared, *_ = of[(first := books[name].codes + 1) :]
            found = self._usage(name, counts[name]) | {"churn": changed / compared}
            found |= {"motion": row[1] / row[0]}
            if name in known and known[name][1]:
                found["resets"] = row[2] / row[0]
            error, scale, _ = quantization_reading(of[first + 2 :])
            found |= {"quantization_error": error, "encoder_scale": scale}
            readings |= {(name, key): value for key, value in found.items()}
            self._remember(name, books[name], tables[name], counts[name][:-1])
        return readings

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points = []
        for layer in dict.fromkeys(layer for layer, _ in numbers):
            found = {key: value for (of, key), value in numbers.items() if of == layer}
            n, codes, flag = int(found.pop("n")), int(found.pop("codes")), Flag.OK
            if found.pop("strays"):
                flag = Flag.NONFINITE
                self.warn_once(f"indices of `{layer}` were not 0 to {codes - 1}, its codes; they are left out.")
            if not n:
                flag = Flag.NOT_CALLED
                self.warn_of_layer(layer, "the codebook {} was not used before every point; its curves read NaN there.")
            nulls = {"usage": usage_null(n, codes), "perplexity": assignment_null(n, codes), "dead": 0.0}
            found |= {"perplexity_null": nulls["perplexity"], "n": float(n), "flag": float(flag)}
            points += [
                Point(self.family, layer, key, step, value, n, nulls.get(key, nan), flag)
                for key, value in found.items()
                if value == value or (not n and key in ("usage", "perplexity"))
            ]
        return points

    def _agree(self) -> None:
        """What any process has found is known to all."""
        assert self._hooks is not None
        if world_size() > 1:
            books = self._hooks.books
            every = from_all_processes({name: book.codes for name, book in books.items()})
            found = {name: codes for of in every for name, codes in of.items()}
            self._hooks.books = {name: books.get(name, Book(found[name])) for name in sorted(found)}

    def _own(self, name: str, table: Tensor | None, width: int) -> Tensor:
        """What this process has seen: choices; rows that have changed their code, of how many; errors and scales."""
        assert self._hooks is not None
        book, past = self._hooks.books[name], self._past.get(name, {})
        dtype = accumulation_dtype(self._device)
        own = torch.zeros(book.codes + 7 + width, dtype=dtype, device=self._device)
        if (counts := book.total()) is not None:
            own[: book.codes + 1] = counts
        probe = past.get("probe")
        if table is not None and probe is not None and probe.shape[1] == table.shape[1]:
            own[book.codes + 1] = (nearest_codes(probe, table) != past["nearest"]).sum()
            own[book.codes + 2] = len(probe)
        if book.sums is not None and len(book.sums) == 4 + width:
            own[book.codes + 3 :] = book.sums
        return own

    def _moved(self, name: str, table: Tensor | None, counts: Tensor) -> Tensor:
        """Whether it is known here how codes moved, by how much, and how many were reset."""
        past = self._past.get(name, {})
        before = past.get("table")
        if table is None or before is None or before.shape != table.shape:
            return torch.zeros(3, dtype=accumulation_dtype(self._device), device=self._device)
        motion, resets = codebook_motion(before, table, counts), moved_idle_codes(before, table, past["counts"])
        return torch.stack([torch.ones_like(motion), motion, resets]).to(accumulation_dtype(self._device))

    def _usage(self, name: str, counts: Tensor) -> dict[str, Tensor]:
        """Readings of a histogram of all processes, and which codes it proves dead."""
        chosen, past = counts[:-1], self._past.setdefault(name, {})
        zeros = torch.zeros_like(chosen)
        history = past.get("history", zeros)
        past["missed"] = missed_hits(past.get("missed", zeros.to(accumulation_dtype(zeros.device))), chosen, history)
        past["history"] = history + chosen
        dead = dead_codes(past["missed"], past["history"]).float().mean()
        of = {"usage": usage(chosen), "perplexity": code_perplexity(chosen), "unseen_mass": unseen_mass(chosen)}
        return of | {"dead": dead, "n": chosen.sum(), "codes": chosen.new_tensor(len(chosen)), "strays": counts[-1]}

    def _remember(self, name: str, book: Book, table: Tensor | None, counts: Tensor) -> None:
        """Keep what the next point is compared with."""
        past = self._past[name]
        past["counts"] = counts
        if table is not None:
            past["table"] = table.clone()
            if book.probe is not None:
                past |= {"probe": book.probe, "nearest": nearest_codes(book.probe, table)}
        book.counts = book.sums = book.probe = book.table = None
