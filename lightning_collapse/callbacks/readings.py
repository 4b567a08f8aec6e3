"""From rows of many layers to readings of many measures: batched, over all processes, in one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_collapse.spectral.eigenvalues import eigenvalues
from lightning_collapse.spectral.moments import Moments, reduce_moments
from lightning_collapse.spectral.spectrum import Spectrum, finish_spectrum, gram_of, values_of
from lightning_collapse.utilities.distributed import all_gather_rows, world_size
from lightning_collapse.utilities.points import Flag
from lightning_collapse.utilities.registry import Measure

MAX_GATHERED_ROWS = 2048


@dataclass
class LayerRows:
    """What was heard of one layer.

    Attributes:
        rows: Shape ``(n, D)``, of this process.
        mask: Boolean, shape ``(n,)``: rows that are not padding.
        expected: How many rows all processes together hold at most; the same on every process.
        sketched: Whether the rows are a random projection.
    """

    rows: Tensor
    mask: Tensor
    expected: int
    sketched: bool = False


@torch.no_grad()
def read(layers: Sequence[LayerRows], measures: Sequence[Measure]) -> tuple[list[Tensor], list[Spectrum]]:
    """Evaluate measures on layers.

    Collective: every process must call it, with layers of the same widths in the same order. Where all processes
    together hold fewer rows than features the rows are gathered and decomposed by their smaller side; elsewhere
    moments are summed. Measures of rows read at most :data:`MAX_GATHERED_ROWS` rows of all processes.

    Args:
        layers: What was heard.
        measures: What to evaluate; kinds ``"spectrum"`` and ``"rows"``.

    Returns:
        Per layer a ``float64`` vector (``float32`` on devices without) of ``3 + len(measures)`` numbers: finite rows,
        considered rows, the largest centered singular value, then the value of every measure, in order; and per layer
        the centered spectrum.
    """
    kinds = {measure.spectrum for measure in measures if measure.kind == "spectrum"} | {"centered"}
    needs_rows = any(measure.kind == "rows" and measure.of_record is None for measure in measures)
    layers, shared = _share(layers, needs_rows)
    grams = {
        kind: [_gram(layer, moments, kind) for layer, moments in zip(layers, shared, strict=True)] for kind in kinds
    }
    spectra = {kind: _decompose(pairs, layers) for kind, pairs in grams.items()}
    readings = []
    for i, (layer, moments) in enumerate(zip(layers, shared, strict=True)):
        of_layer = {kind: records[i] for kind, records in spectra.items()}
        count = of_layer["centered"].count
        seen = layer.mask.sum() if moments is None else moments.seen
        values = [count, seen, values_of(of_layer["centered"])[0]]
        values += [_evaluate(measure, layer, of_layer) for measure in measures]
        readings.append(torch.stack([value.to(count) for value in values]))
    return readings, spectra["centered"]


def flag_of(n: int, seen: int, top: float, sketched: bool) -> Flag:
    """Why a reading deserves doubt: from finite rows, considered rows and the largest singular value."""
    if not seen:
        return Flag.NOT_CALLED
    if n < 2:
        return Flag.FEW_ROWS
    if isnan(top):
        return Flag.SOLVER
    if top == 0:
        return Flag.CONSTANT
    return Flag.NONFINITE if n < seen else Flag.SKETCHED if sketched else Flag.OK


def _evaluate(measure: Measure, layer: LayerRows, spectra: dict[str, Spectrum]) -> Tensor:
    if layer.sketched and not measure.sketchable:
        return layer.rows.new_full((), torch.nan)
    try:
        if measure.kind == "spectrum":
            return measure.of_spectrum(spectra[measure.spectrum]).reshape(())
        if measure.of_record is not None:
            return measure.of_record(spectra["centered"]).reshape(())
        return measure.fn(layer.rows, layer.mask).reshape(())
    except Exception as error:  # a measure of the user's own must not end the run either
        rank_zero_warn(f"Measure `{measure.name}` failed and reads NaN: {error}")
        return layer.rows.new_full((), torch.nan)


def _share(layers: Sequence[LayerRows], needs_rows: bool) -> tuple[list[LayerRows], list[Moments | None]]:
    """Let every process know the rows, or where they are many their moments and some of the rows."""
    ranks = world_size()
    if ranks == 1:
        return list(layers), [None] * len(layers)
    many = [layer.expected > layer.rows.shape[1] for layer in layers]
    moments = []
    for layer in (layer for layer, by_moments in zip(layers, many, strict=True) if by_moments):
        moments.append(Moments(layer.rows.shape[1], layer.rows.device))
        moments[-1].update(layer.rows, layer.mask)
    reduced = iter(reduce_moments(moments) if moments else [])
    gathered = []
    for layer, by_moments in zip(layers, many, strict=True):
        if by_moments and not needs_rows:
            gathered.append(layer)
            continue
        most = max(MAX_GATHERED_ROWS // ranks, 1)
        stride = -(-len(layer.rows) // most) or 1
        rows, mask = all_gather_rows(layer.rows[::stride].contiguous(), layer.mask[::stride].contiguous())
        gathered.append(replace(layer, rows=rows, mask=mask))
    return gathered, [next(reduced) if by_moments else None for by_moments in many]


def _gram(layer: LayerRows, moments: Moments | None, kind: str) -> tuple[Tensor, Spectrum]:
    if moments is None:
        return gram_of(layer.rows, kind == "centered", layer.mask)
    return moments.gram(kind == "centered")


def _decompose(pairs: Sequence[tuple[Tensor, Spectrum]], layers: Sequence[LayerRows]) -> list[Spectrum]:
    """One batched decomposition per size: CUDA solves a batch in the time of a few."""
    by_size: dict[tuple[int, torch.device], list[int]] = {}
    for i, (gram, _) in enumerate(pairs):
        by_size.setdefault((len(gram), gram.device), []).append(i)
    spectra: dict[int, Spectrum] = {}
    for members in by_size.values():
        for i, values in zip(members, eigenvalues(torch.stack([pairs[i][0] for i in members])), strict=True):
            spectra[i] = replace(finish_spectrum(values, pairs[i][1]), sketched=layers[i].sketched)
    return [spectra[i] for i in range(len(pairs))]
