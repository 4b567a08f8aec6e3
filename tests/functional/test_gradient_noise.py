"""The noise scale and the coherence of gradients: closed forms, and who is biased."""

import math

import pytest
import torch

from lightning_collapse.functional import gradient_coherence, gradient_noise_scale


def test_exact_norms_give_exact_numbers() -> None:
    trace, signal = 7.0, 0.25
    for small, big in ((1, 2), (3, 48)):
        norms = (torch.tensor(signal + trace / b, dtype=torch.float64) for b in (small, big))
        found = gradient_noise_scale(*norms, small, big)
        assert [x.item() for x in found] == pytest.approx([trace, signal, trace / signal])


def test_estimates_are_unbiased_and_the_mean_of_ratios_is_not() -> None:
    dim, small, big, steps = 100, 8, 32, 8000
    truth = torch.full((dim,), 0.135)
    scale = dim / truth.square().sum().item()
    micro = truth + torch.randn(steps, big // small, dim) / math.sqrt(small)
    trace, signal, ratio = gradient_noise_scale(
        micro.square().sum(dim=-1).mean(dim=-1), micro.mean(dim=1).square().sum(dim=-1), small, big
    )
    assert trace.mean().item() == pytest.approx(dim, rel=0.01)
    assert (trace.mean() / signal.mean()).item() == pytest.approx(scale, rel=0.02)
    assert ratio[signal > 0].mean().item() > 1.08 * scale


def test_a_signal_drowned_in_noise_is_told_as_it_is() -> None:
    found = gradient_noise_scale(torch.tensor([1.0, 0.0]), torch.tensor([0.1, 0.0]), 1, 4)
    assert found.signal[0] < 0
    assert found.scale.isnan().all()


@pytest.mark.parametrize(("small", "big"), [(4, 4), (8, 4), (0, 4)])
def test_batch_sizes(small: int, big: int) -> None:
    with pytest.raises(ValueError, match="smaller than `big_batch`"):
        gradient_noise_scale(torch.tensor(1.0), torch.tensor(1.0), small, big)


def test_coherence_is_the_mean_cosine_of_unit_gradients() -> None:
    gradients = torch.nn.functional.normalize(torch.randn(5, 30, dtype=torch.float64) + 0.2, dim=1)
    cosines = gradients @ gradients.T
    expected = (cosines.sum() - 5) / 20
    found = gradient_coherence(gradients.sum(dim=0).square().sum(), gradients.square().sum(), 5)
    assert found.item() == pytest.approx(expected.item())
    assert gradient_coherence(torch.tensor(0.0), torch.tensor(0.0), 2).isnan()
    with pytest.raises(ValueError, match="`count` must be at least 2"):
        gradient_coherence(torch.tensor(1.0), torch.tensor(1.0), 1)
