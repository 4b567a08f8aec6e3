"""What the streaming spectrum can do besides the battery."""

import pytest
import torch
from torch import Tensor

from lightning_collapse import functional
from lightning_collapse.metrics import EffectiveRank, NumericalRank, ParticipationRatio, SpectralMetric, Spectrum
from lightning_collapse.spectral import Moments, spectrum_of
from lightning_collapse.utilities.registry import MEASURES, register_measure


def rows(n: int = 40, d: int = 6, offset: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.arange(1.0, d + 1) + offset


@pytest.mark.parametrize("center", [True, False])
def test_center(center: bool) -> None:
    metric = Spectrum(6, center=center)
    for batch in rows().split(7):
        metric.update(batch)
    expected = spectrum_of(rows(), center)
    torch.testing.assert_close(metric.compute(), expected.singular_values, rtol=1e-10, atol=0)
    assert metric.record().count == 40
    assert (metric.record().kurtosis is None) is not center


def test_any_measure_of_the_record() -> None:
    metric = Spectrum(6)
    metric.update(rows())
    for name in ("alpha_req_fit", "top_k_share", "unbiased_participation_ratio"):
        measure = MEASURES[name]
        expected = measure.of_spectrum(spectrum_of(rows()))
        torch.testing.assert_close(measure.of_spectrum(metric.record()), expected, rtol=1e-10, atol=0, equal_nan=True)


def test_a_metric_of_ones_own() -> None:
    try:

        @register_measure
        def second_value(singular_values):
            return singular_values[..., 1]

        class SecondValue(SpectralMetric):
            measure = "second_value"

        metric = SecondValue(6)
        metric.update(rows())
        assert metric.compute().item() == pytest.approx(spectrum_of(rows()).singular_values[1].item(), rel=1e-10)
    finally:
        MEASURES.pop("second_value", None)


def test_moments_are_the_states() -> None:
    metric = Spectrum(6)
    metric.update(rows())
    moments = metric.moments()
    assert isinstance(moments, Moments)
    assert moments.second is metric.second
    torch.testing.assert_close(moments.mean, rows().mean(dim=0))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_states(offset: float) -> None:
    # for devices without float64; of features with a mean of 1000 times their spread
    x = (rows(400, 16, 0.0) / 10 + offset).float()
    single, double = ParticipationRatio(16, dtype=torch.float32), ParticipationRatio(16)
    for batch in x.split(50):
        single.update(batch)
        double.update(batch)
    assert single.compute().dtype == torch.float32
    assert single.compute().item() == pytest.approx(double.compute().item(), rel=1e-3)


def test_float32_states_of_collapsed_features() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator) @ torch.randn(3, 16, generator=generator)
    single, double = NumericalRank(16, dtype=torch.float32), NumericalRank(16)
    single.update(x)
    double.update(x)
    assert double.compute() == 3
    assert single.compute() == 3


@pytest.mark.parametrize("incoming", [3, {"count": torch.tensor(1.0)}, EffectiveRank(4)], ids=["int", "part", "width"])
def test_merge_refuses_what_does_not_fit(incoming: object) -> None:
    metric = EffectiveRank(6)
    metric.update(rows())
    before = {name: state.clone() for name, state in metric.metric_state.items()}
    with pytest.raises(ValueError, match="state"):  # as torchmetrics itself does
        metric.merge_state(incoming)
    assert all(torch.equal(before[name], state) for name, state in metric.metric_state.items())


def test_arithmetic_of_metrics() -> None:
    ratio = ParticipationRatio(6) / EffectiveRank(6)
    for batch in rows().split(13):
        ratio.update(batch)
    record = spectrum_of(rows())
    expected = functional.participation_ratio(record) / functional.effective_rank(record)
    assert ratio.compute().item() == pytest.approx(expected.item(), rel=1e-10)


def test_states_move_with_the_metric() -> None:
    metric = EffectiveRank(6)
    metric.to("meta")
    assert metric.second.device.type == "meta"
    assert metric.second.dtype == torch.float64


def test_the_class_without_a_measure_says_what_to_take():
    with pytest.raises(TypeError, match=r"`SpectralMetric` names no measure\. Take a subclass such as `EffectiveRank`"):
        SpectralMetric(4)
