"""Evaluation of measures on layers: batched, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import isnan
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_collapse.functional.assignment import assignment_counts, perplexity
from lightning_collapse.monitoring.feature_buffer import LayerFeatures
from lightning_collapse.spectral.eigenvalues import eigenvalues
from lightning_collapse.spectral.moments import Moments, reduce_moments
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.spectral.spectrum import Spectrum, finish_spectrum, gram_of, uncentered, values_of
from lightning_collapse.utilities.distributed import all_gather_rows, all_reduce_sum, world_size
from lightning_collapse.utilities.points import Flag
from lightning_collapse.utilities.registry import Measure

MAX_GATHERED_ROWS = 2048


@dataclass
class Evaluation:
    """Readings of one layer, on its device.

    Attributes:
        n: Finite rows of all processes, 0-dimensional.
        seen: Considered rows of all processes.
        top: The largest singular value or, where nothing needs one, the features' norm; of centered features, unless
            only raw ones were asked for.
        values: Of every measure, by the name of its curve.
        singular_values: Of the same features, descending, if something needs them.
    """

    n: Tensor
    seen: Tensor
    top: Tensor
    values: dict[str, Tensor]
    singular_values: Tensor

    def readings(self) -> dict[str, Tensor]:
        """All numbers by name: those of the curves, ``n``, ``seen`` and ``top``."""
        return {**self.values, "n": self.n, "seen": self.seen, "top": self.top}


@torch.no_grad()
def evaluate(
    layers: Mapping[str, LayerFeatures], measures: Sequence[Measure], spectra: bool = False
) -> dict[str, Evaluation]:
    """Evaluate measures on layers.

    Collective: every process must call it, with layers of the same widths in the same order. Where all processes
    together hold fewer rows than features the rows are gathered and decomposed by their smaller side; elsewhere
    moments are summed. Measures of rows read at most :data:`MAX_GATHERED_ROWS` rows of all processes.

    Args:
        layers: What was captured, by name.
        measures: What to evaluate; kinds ``"spectrum"`` and ``"rows"``.
        spectra: Whether the singular values are wanted themselves.

    Returns:
        By the names of the layers; values are ``float64`` (``float32`` on devices without).
    """
    names, given = list(layers), list(layers.values())
    kinds: set[str] = {measure.spectrum for measure in measures if measure.kind == "spectrum"}
    if spectra or not kinds or any(measure.from_spectrum is not None for measure in measures):
        kinds |= {"centered"}
    solved = {measure.spectrum for measure in measures if measure.kind == "spectrum" and measure.from_gram is None}
    solved |= {"centered"} if spectra else set()
    given, shared = _share(given, [m for m in measures if m.kind == "rows" and m.from_spectrum is None])
    found: dict[str, Evaluation] = {}
    for members in _alike(given, shared):
        group = _Group([given[i] for i in members], [shared[i] for i in members])
        grams = _grams(group, kinds)
        records = {kind: record for kind, (_, record) in grams.items()}
        records |= {kind: finish_spectrum(eigenvalues(grams[kind][0]), records[kind]) for kind in solved}
        kind = "centered" if "centered" in kinds else "raw"
        record = records[kind]
        top = values_of(record)[..., 0] if kind in solved else _norm(grams[kind][0])
        columns = {m.curve: _evaluate(m, group, grams, records).to(record.count).unbind() for m in measures}
        own = zip(record.count.unbind(), group.seen, top.unbind(), record.singular_values.unbind(), strict=True)
        for j, (i, (n, seen, of_top, singular_values)) in enumerate(zip(members, own, strict=True)):
            values = {curve: column[j] for curve, column in columns.items()}
            found[names[i]] = Evaluation(n, seen, of_top, values, singular_values)
    return {name: found[name] for name in names}


@torch.no_grad()
def assignments(layers: Mapping[str, LayerFeatures]) -> dict[str, Tensor]:
    """Perplexity of what rows choose, of layers that are scores; collective, see :func:`assignment_perplexity`."""
    if not layers:
        return {}
    counts = [assignment_counts(layer.rows, layer.mask) for layer in layers.values()]
    total = torch.split(all_reduce_sum(torch.cat(counts)), [len(of) for of in counts])
    return {name: perplexity(of) for name, of in zip(layers, total, strict=True)}


class _Group:
    """Layers that are taken together, with their moments where several processes share these."""

    def __init__(self, layers: Sequence[LayerFeatures], moments: Sequence[Moments | None]) -> None:
        self.layers = layers
        self.moments = [of_layer for of_layer in moments if of_layer is not None]

    @cached_property
    def rows(self) -> Tensor:
        """Of all layers, shape ``(L, N, D)``."""
        return _stacked([layer.rows for layer in self.layers])

    @cached_property
    def mask(self) -> Tensor:
        """Of all layers, boolean, shape ``(L, N)``."""
        return _stacked([layer.mask for layer in self.layers])

    @property
    def seen(self) -> Sequence[Tensor]:
        """Considered rows of each layer."""
        return [of_layer.seen for of_layer in self.moments] or self.mask.sum(dim=-1).unbind()


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)  # without a copy


def flag_of(n: int, seen: int, top: float, sketched: bool) -> Flag:
    """Why a reading deserves doubt, from ``n``, ``seen`` and ``top`` of an :class:`Evaluation`."""
    if not seen:
        return Flag.NOT_CALLED
    if n < 2:
        return Flag.FEW_ROWS
    if isnan(top):
        return Flag.SOLVER
    if top == 0:
        return Flag.CONSTANT
    return Flag.NONFINITE if n < seen else Flag.SKETCHED if sketched else Flag.OK


def _evaluate(
    measure: Measure,
    group: _Group,
    grams: Mapping[str, tuple[Tensor, Spectrum]],
    records: Mapping[str, Spectrum],
) -> Tensor:
    """Values of a measure, one per layer of a group: of all at once, or where that fails of one after the other."""
    layers = group.layers
    nothing = layers[0].rows.new_full((), torch.nan)
    if layers[0].sketched and not measure.sketchable:
        return nothing.expand(len(layers))
    if measure.from_gram is not None:
        return measure.from_gram(*grams[measure.spectrum])
    record = records[measure.spectrum]
    if not _is_ours(measure):  # it may write into what it is given
        tensors: dict[str, Any] = {name: value.clone() for name, value in _tensors(record).items()}
        record = replace(record, **tensors)
        layers = [replace(layer, rows=layer.rows.clone()) for layer in layers] if measure.kind == "rows" else layers
    if measure.kind == "spectrum" or measure.from_spectrum is not None:
        from_spectrum = measure.from_spectrum or measure.of_spectrum
        if len(layers) != record.singular_values.shape[-1]:  # a value per axis must not pass for one per layer
            with suppress(Exception):
                values = from_spectrum(record)
                if values.shape == (len(layers),):
                    return values
        calls = [partial(from_spectrum, _part(record, i)) for i in range(len(layers))]
    elif measure.batched and measure.statistic is not None and measure.from_statistic is not None:
        sums = [layer.sums[measure.name] for layer in layers if measure.name in layer.sums]
        total = torch.stack(sums) if sums else measure.statistic(group.rows, group.mask)
        return measure.from_statistic(total)
    else:
        calls = [
            partial(measure.from_statistic, layer.sums[measure.name])
            if measure.from_statistic is not None and measure.name in layer.sums
            else partial(measure.fn, layer.rows, layer.mask)
            for layer in layers
        ]
    return torch.stack([_one(measure, call, nothing).to(record.count) for call in calls])


def _is_ours(measure: Measure) -> bool:
    return getattr(measure.fn, "__module__", "").startswith("lightning_collapse.")


def _one(measure: Measure, call: Callable[[], Tensor], nothing: Tensor) -> Tensor:
    try:
        return call().reshape(())
    except Exception as error:  # a measure of the user's own must not end the run either
        rank_zero_warn(f"Measure `{measure.name}` failed and reads NaN: {error}")
        return nothing


def _share(
    layers: Sequence[LayerFeatures], of_rows: Sequence[Measure]
) -> tuple[list[LayerFeatures], list[Moments | None]]:
    """Let every process know the rows, or where they are many their moments, sums, and if need be some of the rows."""
    ranks = world_size()
    if ranks == 1:
        return list(layers), [None] * len(layers)
    many = [layer.expected > layer.rows.shape[1] for layer in layers]
    moments = []
    for layer in (layer for layer, by_moments in zip(layers, many, strict=True) if by_moments):
        moments.append(Moments(layer.rows.shape[1], layer.rows.device))
        moments[-1].update(layer.rows, layer.mask)
    reduced = iter(reduce_moments(moments) if moments else [])
    layers = _add_sums(layers, many, [measure for measure in of_rows if measure.from_statistic is not None])
    needs_rows = any(measure.from_statistic is None for measure in of_rows)
    gathered = []
    for layer, by_moments in zip(layers, many, strict=True):
        if by_moments and not needs_rows:
            gathered.append(layer)
            continue
        most = max(MAX_GATHERED_ROWS // ranks, 1)
        stride = -(-len(layer.rows) // most) or 1
        # of one dtype everywhere: a process where the layer did not run does not know in which precision it runs
        own = layer.rows[::stride].to(accumulation_dtype(layer.rows.device)).contiguous()
        rows, mask = all_gather_rows(own, layer.mask[::stride].contiguous())
        gathered.append(replace(layer, rows=rows, mask=mask))
    return gathered, [next(reduced) if by_moments else None for by_moments in many]


def _add_sums(
    layers: Sequence[LayerFeatures], many: Sequence[bool], measures: Sequence[Measure]
) -> list[LayerFeatures]:
    """The layers, those of many rows with the sums over all processes that measures ask for: one message."""
    asked = [
        (i, measure.name, measure.statistic(layers[i].rows, layers[i].mask))
        for i, by_sums in enumerate(many)
        for measure in measures
        if by_sums and measure.statistic is not None
    ]
    if not asked:
        return list(layers)
    total = all_reduce_sum(torch.cat([statistic for _, _, statistic in asked]))
    parts = torch.split(total, [len(statistic) for _, _, statistic in asked])
    sums: list[dict[str, Tensor]] = [{} for _ in layers]
    for (i, name, _), part in zip(asked, parts, strict=True):
        sums[i][name] = part
    return [replace(layer, sums=of_layer) for layer, of_layer in zip(layers, sums, strict=True)]


def _alike(layers: Sequence[LayerFeatures], shared: Sequence[Moments | None]) -> list[list[int]]:
    """Layers that can be taken together, by position: a device works through a few layers in the time of one."""
    groups: dict[Hashable, list[int]] = {}
    for i, (layer, moments) in enumerate(zip(layers, shared, strict=True)):
        shape = layer.rows.shape if moments is None else layer.rows.shape[1:]
        groups.setdefault((shape, layer.rows.dtype, layer.rows.device, layer.sketched), []).append(i)
    return list(groups.values())


def _grams(group: _Group, kinds: Collection[str]) -> dict[str, tuple[Tensor, Spectrum]]:
    grams = {kind: _gram(group, kind) for kind in ("centered",) if kind in kinds}
    if "raw" in kinds:
        by_features = "centered" in grams and grams["centered"][0].shape[-1] == group.layers[0].rows.shape[1]
        grams["raw"] = uncentered(*grams["centered"]) if by_features else _gram(group, "raw")
    return grams


def _gram(group: _Group, kind: str) -> tuple[Tensor, Spectrum]:
    center = kind == "centered"
    if group.moments:
        grams, records = zip(*(m.gram(center) for m in group.moments), strict=True)
        gram, record = torch.stack(grams), _together(records)
    else:
        gram, record = gram_of(group.rows, center, group.mask)
    return gram, replace(record, sketched=group.layers[0].sketched)


def _norm(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).sqrt()


def _together(records: Sequence[Spectrum]) -> Spectrum:
    tensors: dict[str, Any] = {name: torch.stack([getattr(r, name) for r in records]) for name in _tensors(records[0])}
    return replace(records[0], **tensors)


def _part(record: Spectrum, i: int) -> Spectrum:
    tensors: dict[str, Any] = {name: value[i] for name, value in _tensors(record).items()}
    return replace(record, **tensors)


def _tensors(record: Spectrum) -> dict[str, Tensor]:
    return {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
