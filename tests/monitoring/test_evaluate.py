"""Layers are read together, and none of them can tell."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import participation_ratio
from lightning_collapse.monitoring.evaluate import LayerRows, flag_of, read
from lightning_collapse.spectral.spectrum import spectrum_of
from lightning_collapse.utilities.registry import MEASURES, Measure


def layer(n: int, d: int, seed: int) -> LayerRows:
    rows = seed + torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return LayerRows(rows, torch.arange(n) % (seed + 2) > 0, n)


LAYERS = [layer(n, d, i) for i, (n, d) in enumerate([(9, 5), (6, 12), (9, 5), (8, 12), (6, 12), (9, 5)])]


def test_the_company_of_other_layers_changes_no_reading() -> None:
    measures = [measure for measure in MEASURES.values() if measure.kind != "pairs"]
    together, spectra = read(LAYERS, measures, spectra=True)
    for of_layer, values, found in zip(LAYERS, spectra, together, strict=True):
        [alone], [expected] = read([of_layer], measures, spectra=True)
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if measure.from_gram is not None])
@pytest.mark.parametrize("sketched", [False, True])
def test_what_needs_no_decomposition_reads_the_same_as_with_one(name: str, sketched: bool) -> None:
    layers = [replace(of_layer, sketched=sketched) for of_layer in LAYERS]
    layers += [LayerRows(3e37 * of_layer.rows, of_layer.mask, of_layer.expected) for of_layer in LAYERS]
    layers += [LayerRows(torch.ones(9, 5), torch.ones(9, dtype=torch.bool), 9)]
    found, _ = read(layers, [MEASURES[name]])
    expected, _ = read(layers, [replace(MEASURES[name], from_gram=None)])
    torch.testing.assert_close([v[3] for v in found], [v[3] for v in expected], rtol=1e-9, atol=0, equal_nan=True)
    assert [flag_of(*map(float, v[:3]), False) for v in found] == [flag_of(*map(float, v[:3]), False) for v in expected]


def test_the_widening_of_a_projection_is_removed() -> None:
    layers = [replace(of_layer, sketched=True) for of_layer in LAYERS]
    found, _ = read(layers, [MEASURES["participation_ratio"]])
    for of_layer, values, plain in zip(layers, found, read(LAYERS, [MEASURES["participation_ratio"]])[0], strict=True):
        record = replace(spectrum_of(of_layer.rows, mask=of_layer.mask), sketched=True)
        assert values[3].item() == pytest.approx(participation_ratio(record).item(), rel=1e-9)
        assert values[3] > 1.01 * plain[3]


def of_one_spectrum(singular_values: Tensor) -> Tensor:
    if singular_values.ndim > 1:
        raise ValueError("I was not told of this")
    return singular_values[0] / singular_values.sum()


@pytest.mark.parametrize("fn", [of_one_spectrum, lambda s: s[0] / s.sum(), lambda s: s[..., 0] / s.sum(dim=-1)])
def test_a_measure_may_be_written_for_one_spectrum(fn) -> None:
    layers = [LAYERS[0], LAYERS[2], LAYERS[5], layer(9, 5, 3), layer(9, 5, 4)]  # as many as there are singular values
    measure = Measure("top", fn)
    for chosen in (layers, layers[:3]):
        found, spectra = read(chosen, [measure], spectra=True)
        assert [v[3].item() for v in found] == [pytest.approx((s[0] / s.sum()).item()) for s in spectra]
