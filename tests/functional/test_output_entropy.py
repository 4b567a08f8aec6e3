"""Entropy of outputs: closed forms, a slow float64 reference, any layout and precision."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from lightning_collapse.functional import advantage_covariance, entropy_change, output_rows
from lightning_collapse.functional.output_entropy import output_readings, output_sums
from lightning_collapse.metrics import OutputEntropy


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(z):
    """Row after row, in double precision."""
    log_z = logsumexp(z, axis=-1)
    log_p = z - log_z[..., None]
    return -(np.exp(log_p) * log_p).sum(axis=-1), log_z, z.max(axis=-1)


@pytest.mark.parametrize("size", [2, 7, 50_257])
def test_closed_forms(size):
    uniform, sure = torch.zeros(1, size), torch.full((1, size), -torch.inf)
    sure[0, 1] = 3.0
    assert output_rows(uniform).entropy.item() == pytest.approx(math.log(size), rel=1e-6)
    assert output_rows(uniform).log_z.item() == pytest.approx(math.log(size), rel=1e-6)
    found = output_rows(sure, torch.tensor([1]))
    assert (found.entropy.item(), found.log_z.item(), found.log_prob.item()) == (0.0, 3.0, 0.0)
    two = sure.clone()
    two[0, 0] = 3.0
    assert output_rows(two).entropy.item() == pytest.approx(math.log(2), rel=1e-6)


def test_it_is_the_reference_and_does_not_mind_a_constant():
    z = logits(5, 40, 17)
    targets = torch.randint(17, (5, 40), generator=torch.Generator().manual_seed(1))
    entropy, log_z, top = naive(z.numpy())
    for moved in (0.0, 1000.0, -1000.0):
        found = output_rows(z + moved, targets, chunk=16)
        np.testing.assert_allclose(found.entropy, entropy, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.log_z, log_z + moved, rtol=1e-12)
        np.testing.assert_allclose(found.max_logit, top + moved, rtol=1e-12)
        expected = z.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        np.testing.assert_allclose(found.log_prob, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 3, 64, 5000])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
def test_any_chunk_and_layout(chunk, layout):
    z = logits(6, 9, 11)
    moved = {
        "contiguous": z,
        "sliced": torch.cat([z, z[:, :1]], dim=1)[:, :-1],
        "transposed": z.transpose(0, 1).contiguous().transpose(0, 1),
    }[layout]
    targets = torch.arange(54).view(6, 9) % 12 - 1
    whole, found = output_rows(z, targets, chunk=10_000), output_rows(moved, targets, chunk=chunk)
    for one, other in zip(whole, found, strict=True):
        assert torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0))


def test_logits_are_never_copied_as_a_whole():
    z, copied = torch.zeros(4096, 64), []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() != z.data_ptr():
                copied.append(output.numel())
            return output

    with Sizes():
        output_rows(z, torch.zeros(4096, dtype=torch.long), chunk=128)
    assert max(copied) <= 128 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_read_in_full(dtype, autocast):
    z = logits(8, 33).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = output_rows(z)
    assert {field.dtype for field in found} == {torch.float32}
    np.testing.assert_allclose(found.entropy, naive(z.double().numpy())[0], rtol=1e-4, atol=1e-5)


def test_rows_that_are_no_numbers_are_left_out_and_counted():
    z = logits(6, 4)
    z[0, 1], z[1, 2], z[2] = torch.nan, torch.inf, -torch.inf
    found = output_readings(output_sums(output_rows(z), 4), 4)
    assert (found["n"], found["nonfinite"]) == (3, 3)
    assert found["entropy"].item() == pytest.approx(naive(z[3:].numpy())[0].mean())
    assert found["histogram"].sum() == 3


def test_targets_out_of_range_are_none():
    found = output_rows(logits(3, 4), torch.tensor([4, -100, 2]))
    assert found.log_prob.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("bad", [torch.zeros(()), torch.zeros(3, 0)])
def test_no_logits_are_refused(bad):
    with pytest.raises(ValueError, match=r"`logits` must have shape"):
        output_rows(bad)
    with pytest.raises(ValueError, match=r"`targets` must have shape \(3,\), got \(2,\)"):
        output_rows(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("step", ["natural", "vanilla"])
def test_a_change_of_logits_moves_the_entropy_by_the_covariance(step):
    z, gain = logits(12, seed=2), logits(12, seed=3)
    p = z.softmax(0)
    u = gain if step == "natural" else p * (gain - (p * gain).sum())
    h = 1e-5
    moved = (output_rows(z + h * u).entropy - output_rows(z - h * u).entropy) / (2 * h)
    assert entropy_change(z, u).item() == pytest.approx(moved.item(), rel=1e-7, abs=1e-8)


def test_covariance_of_tokens():
    x, y = logits(50, seed=4), logits(50, seed=5)
    counted = torch.arange(50) % 3 != 0
    y[7] = torch.nan
    found = advantage_covariance(x, y, counted)
    valid = counted & y.isfinite()
    expected = np.cov(x[valid].numpy(), y[valid].numpy(), bias=True)[0, 1]
    assert found[valid].mean().item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(found.isnan(), ~valid)
    with pytest.raises(ValueError, match="`advantages` must have shape"):
        advantage_covariance(x, y[:3])


def test_streams_are_the_whole_in_any_split():
    z = logits(100, 9)
    targets = torch.randint(9, (100,), generator=torch.Generator().manual_seed(0))
    z[4] = torch.nan
    mask = (torch.arange(100) % 4 != 0) | (torch.arange(100) == 4)
    whole = OutputEntropy(9)
    whole.update(z, targets, mask)
    expected, mask[4] = whole.compute(), False
    assert whole.nonfinite == 1
    assert whole.histogram.sum() == expected["n"] == mask.sum()
    assert expected["entropy"].item() == pytest.approx(naive(z[mask].numpy())[0].mean(), rel=1e-12)
    assert expected["cross_entropy"].item() == pytest.approx(
        torch.nn.functional.cross_entropy(z[mask], targets[mask]).item(), rel=1e-12
    )
    mask[4] = True
    for split in ([1] * 100, [60, 0, 40], [13, 87]):
        metric = OutputEntropy(9)
        for part in zip(z.split(split), targets.split(split), mask.split(split), strict=True):
            metric.update(*part)
        found = metric.compute()
        assert all(torch.allclose(found[name], expected[name], rtol=1e-12) for name in expected)
