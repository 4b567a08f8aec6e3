"""Layers are read together, and none of them can tell."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import participation_ratio
from lightning_collapse.monitoring.evaluate import Evaluation, evaluate, flag_of
from lightning_collapse.monitoring.feature_buffer import LayerFeatures
from lightning_collapse.spectral.spectrum import spectrum_of
from lightning_collapse.utilities.points import Flag
from lightning_collapse.utilities.registry import MEASURES, Measure


def layer(n: int, d: int, seed: int) -> LayerFeatures:
    rows = seed + torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return LayerFeatures(rows, torch.arange(n) % (seed + 2) > 0, n)


def read(layers: list[LayerFeatures], measures: list[Measure], spectra: bool = False) -> list[Evaluation]:
    return list(evaluate({str(i): layer for i, layer in enumerate(layers)}, measures, spectra).values())


def numbers(found: Evaluation) -> Tensor:
    return torch.stack([value.double() for value in found.readings().values()])


def sketched_(of_layer: LayerFeatures) -> LayerFeatures:
    return replace(of_layer, width=2 * of_layer.width)


def flag(found: Evaluation) -> Flag:
    return flag_of(int(found.n), int(found.seen), float(found.top), False)


LAYERS = [layer(n, d, i) for i, (n, d) in enumerate([(9, 5), (6, 12), (9, 5), (8, 12), (6, 12), (9, 5)])]


def test_the_company_of_other_layers_changes_no_reading() -> None:
    measures = [measure for measure in MEASURES.values() if measure.kind in ("spectrum", "rows")]
    for of_layer, found in zip(LAYERS, read(LAYERS, measures, spectra=True), strict=True):
        [alone] = read([of_layer], measures, spectra=True)
        assert list(found.readings()) == list(alone.readings())
        torch.testing.assert_close(numbers(found), numbers(alone), rtol=1e-9, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(found.singular_values, alone.singular_values)


@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if measure.from_gram is not None])
@pytest.mark.parametrize("sketched", [False, True])
def test_what_needs_no_decomposition_reads_the_same_as_with_one(name: str, sketched: bool) -> None:
    layers = [sketched_(of_layer) if sketched else of_layer for of_layer in LAYERS]
    layers += [LayerFeatures(3e37 * of_layer.rows, of_layer.mask, of_layer.expected) for of_layer in LAYERS]
    layers += [LayerFeatures(torch.ones(9, 5), torch.ones(9, dtype=torch.bool), 9)]
    found = read(layers, [MEASURES[name]])
    expected = read(layers, [replace(MEASURES[name], from_gram=None)])
    curve = MEASURES[name].curve
    ours, theirs = ([of_layer.values[curve] for of_layer in each] for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0, equal_nan=True)
    assert list(map(flag, found)) == list(map(flag, expected))


def test_the_widening_of_a_projection_is_removed() -> None:
    measure = MEASURES["participation_ratio"]
    found, plain = read([sketched_(of_layer) for of_layer in LAYERS], [measure]), read(LAYERS, [measure])
    for of_layer, corrected, raw in zip(LAYERS, found, plain, strict=True):
        record = replace(spectrum_of(of_layer.rows, mask=of_layer.mask), sketched=True)
        value = corrected.values["participation_ratio"]
        assert value.item() == pytest.approx(participation_ratio(record).item(), rel=1e-9)
        assert value > 1.01 * raw.values["participation_ratio"]


def of_one_spectrum(singular_values: Tensor) -> Tensor:
    if singular_values.ndim > 1:
        raise ValueError("I was not told of this")
    return singular_values[0] / singular_values.sum()


@pytest.mark.parametrize("fn", [of_one_spectrum, lambda s: s[0] / s.sum(), lambda s: s[..., 0] / s.sum(dim=-1)])
def test_a_measure_may_be_written_for_one_spectrum(fn) -> None:
    layers = [LAYERS[0], LAYERS[2], LAYERS[5], layer(9, 5, 3), layer(9, 5, 4)]  # as many as there are singular values
    measure = Measure("top", fn)
    for chosen in (layers, layers[:3]):
        for found in read(chosen, [measure], spectra=True):
            values = found.singular_values
            assert found.values["top"].item() == pytest.approx((values[0] / values.sum()).item())


def overwrites(values: Tensor, mask: Tensor | None = None) -> Tensor:
    return values.zero_().sum()


@pytest.mark.parametrize("kind", ["spectrum", "rows"])
def test_a_measure_of_a_user_may_write_into_what_it_is_given(kind: Any) -> None:
    def beside(own: Any) -> list[dict[str, Tensor]]:
        measures = [MEASURES[name] for name in ("effective_rank", "feature_std", "direction_spread")]
        found = read([layer(9, 5, 0), layer(8, 4, 1), layer(8, 4, 2)], [Measure("own", own, kind=kind), *measures])
        return [{name: value for name, value in of.readings().items() if name != "own"} for of in found]

    assert beside(overwrites) == beside(lambda values, mask=None: values.sum())
    assert all(values["top"] > 0 for values in beside(overwrites))
