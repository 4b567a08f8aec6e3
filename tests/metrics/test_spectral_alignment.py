"""The streaming form counts what the functional sees in all rows at once."""

import pickle

import pytest
import torch
from torch import nn

from lightning_collapse.functional import majority_fraction, mean_energy_share, sign_diversity, spectral_alignment
from lightning_collapse.metrics import SpectralAlignment
from lightning_collapse.spectral import top_singular_pair


@pytest.fixture
def data():
    weight = torch.randn(12, 20)
    return torch.randn(101, 20) + 0.2, weight, top_singular_pair(weight).direction


def test_any_split_is_the_functional(data):
    inputs, weight, direction = data
    alignment = spectral_alignment(inputs, weight)
    for sizes in ([101], [1, 50, 50], [0, 100, 1]):
        metric = SpectralAlignment(dim=20)
        for part in inputs.split(sizes):
            metric.update(part, direction)
        assert metric.compute() == sign_diversity(alignment)
        assert metric.majority_fraction == majority_fraction(alignment)
        assert metric.mean == pytest.approx(alignment.mean().item(), abs=1e-6)
        assert metric.std == pytest.approx(alignment.std(correction=0).item(), abs=1e-6)
        assert metric.mean_energy_share == pytest.approx(mean_energy_share(inputs).item(), rel=1e-6)
        assert metric.count == 101
        assert torch.equal(metric.histogram.double(), torch.histc(alignment.double(), 41, -1, 1))


def test_centered_on_the_batch(data):
    inputs, weight, direction = data
    metric = SpectralAlignment(dim=20, center=True)
    metric.update(inputs + 3 * direction.float(), direction)
    assert metric.compute() == sign_diversity(spectral_alignment(inputs, weight, center=True))


def test_zeros_and_bad_rows():
    direction = torch.tensor([1.0, 0.0])
    metric = SpectralAlignment(dim=2)
    metric.update(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [float("nan"), 1.0], [-1.0, 9.0]]), direction)
    assert (metric.positive, metric.negative, metric.zero) == (1, 1, 2)
    assert metric.histogram.sum() == 4
    assert metric.mean.isfinite()


def test_merge_reset_pickle_and_state(data):
    inputs, _, direction = data
    whole, first, second = (SpectralAlignment(dim=20) for _ in range(3))
    whole.update(inputs, direction)
    first.update(inputs[:30], direction)
    second.update(inputs[30:], direction)
    first.merge_state(second)
    assert first.compute() == whole.compute()
    assert pickle.loads(pickle.dumps(first)).compute() == whole.compute()
    assert not first.state_dict()
    first.reset()
    assert first.count == 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before the ``update``")
def test_nothing_seen_is_nan():
    assert SpectralAlignment(dim=3).compute().isnan()


def test_precision_of_the_model_leaves_the_sums_alone(data):
    inputs, _, direction = data
    metric = SpectralAlignment(dim=20)
    nn.ModuleList([metric]).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(inputs.bfloat16(), direction.bfloat16())
    assert metric.total.dtype == torch.float64
    rounded = inputs.bfloat16().float() @ direction.bfloat16().float()
    assert metric.compute() == sign_diversity(rounded)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`dim` is the width of the inputs and must be positive, got 0"):
        SpectralAlignment(dim=0)
    with pytest.raises(ValueError, match=r"Expected `inputs` of shape \(N, 3\)"):
        SpectralAlignment(dim=3).update(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="`direction`"):
        SpectralAlignment(dim=3).update(torch.ones(2, 3), torch.ones(4))
