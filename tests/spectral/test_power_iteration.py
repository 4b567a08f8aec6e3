"""The power iteration finds what a singular value decomposition finds, stays with it, and says when it does not."""

import math

import pytest
import torch

from lightning_collapse.spectral import PowerIteration, power_iteration, top_singular_pair


def reference(weight):
    """Right singular vector, the largest singular value and the gap, by a full decomposition in double precision."""
    _, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    second = s[1] if len(s) > 1 else torch.tensor(0.0)
    return vh[0], s[0], 1 - (second / s[0]) ** 2


@pytest.mark.parametrize("shape", [(64, 64), (200, 40), (40, 200), (3, 5), (1, 7), (7, 1)])
def test_cold_start_is_the_exact_pair(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pair = top_singular_pair(weight)
    v, s, gap = reference(weight)
    assert (pair.direction @ v).abs() == pytest.approx(1, abs=1e-9)
    assert pair.norm == pytest.approx(s.item(), rel=1e-12)
    assert pair.gap == pytest.approx(gap.item(), abs=1e-9)
    assert pair.residual < 1e-12
    assert pair.direction[pair.direction.abs().argmax()] > 0


@pytest.mark.parametrize("shape", [(128, 128), (512, 128), (128, 512)])
def test_one_step_at_a_time_follows_a_drifting_matrix(shape):
    """From Gaussian weights, without any gap to speak of, where a single vector would never converge."""
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(shape, generator=generator) / shape[1] ** 0.5

    weight, velocity, power = noise(), noise(), PowerIteration()
    previous = power.step({"": weight})[""].direction
    for _ in range(100):
        velocity = 0.9 * velocity + 0.43 * noise()
        weight = weight + 0.002 * velocity
        pair = power.step({"": weight})[""]
        v, s, _ = reference(weight)
        assert (pair.direction.double() @ v).abs() > 0.995
        assert pair.norm == pytest.approx(s.item(), rel=1e-4)
        assert pair.direction @ previous > 0.5  # the sign is kept
        previous = pair.direction


def test_residual_over_gap_bounds_the_error_of_the_direction():
    """Blocks that start badly: the bound holds at every iteration on the way."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    power = PowerIteration()
    power.load_state_dict({"": torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64))[0].T})
    v, s, gap = reference(weight)
    seen = []
    for _ in range(300):
        pair = power.step({"": weight})[""]
        explicit = torch.linalg.vector_norm(weight.T @ (weight @ pair.direction) - pair.norm**2 * pair.direction)
        assert pair.residual == pytest.approx((explicit / pair.norm**2).item(), abs=1e-12)
        sine = (1 - (pair.direction @ v) ** 2).clamp_min(0).sqrt()
        seen.append(sine.item())
        if pair.residual < 0.2 * gap:  # close enough for the theorem, with the true gap
            assert sine <= 1.3 * pair.residual / gap + 1e-7
    assert seen[0] > 0.3
    assert seen[-1] < 1e-6
    assert pair.norm == pytest.approx(s.item(), rel=1e-12)


def test_more_iterations_are_that_many_steps():
    weight = torch.randn(50, 60)
    start = {"": torch.linalg.qr(torch.randn(60, 8))[0].T}
    one, ten = PowerIteration(), PowerIteration()
    one.load_state_dict(start)
    ten.load_state_dict(start)
    for _ in range(10):
        slow = one.step({"": weight})[""]
    fast = ten.step({"": weight}, iterations=10)[""]
    assert (slow.direction @ fast.direction).abs() == pytest.approx(1, abs=1e-4)
    assert fast.norm == pytest.approx(slow.norm.item(), rel=1e-5)


def test_above_the_exact_size(monkeypatch):
    monkeypatch.setattr(power_iteration, "MAX_EXACT", 16)
    left, right = (torch.linalg.qr(torch.randn(n, 30, dtype=torch.float64))[0] for n in (60, 40))
    weight = left @ torch.diag(0.8 ** torch.arange(30, dtype=torch.float64)) @ right.T
    state = torch.random.get_rng_state()
    pair, again = top_singular_pair(weight), top_singular_pair(weight)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(pair.direction, again.direction)
    assert (pair.direction @ right[:, 0]).abs() == pytest.approx(1, abs=1e-9)


def test_rank_one():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, -4.0])
    pair = PowerIteration().step({"": torch.outer(a, b)})[""]
    torch.testing.assert_close(pair.direction, torch.tensor([-0.6, 0.0, 0.8]))
    assert pair.norm == pytest.approx(5 * math.sqrt(5), rel=1e-6)
    assert pair.residual < 1e-6
    assert pair.gap == pytest.approx(1)


def test_bad_numbers_are_told_and_do_not_spread():
    good = torch.randn(6, 6)
    weights = {"nan": good * math.nan, "zero": torch.zeros(6, 6), "huge": good * 1e30, "good": good}
    power = PowerIteration()
    for _ in range(3):
        pairs = power.step(weights, iterations=2)
        assert all(pair.direction.isfinite().all() for pair in pairs.values())
        assert pairs["nan"].norm.isnan()
        assert pairs["huge"].norm.isnan()  # its Gram matrix overflows
        assert pairs["zero"].norm == 0
        assert pairs["zero"].residual.isnan()
        assert pairs["good"].norm == pytest.approx(torch.linalg.matrix_norm(good, 2).item(), rel=1e-5)
    recovered = power.step(weights | {"nan": good, "zero": good}, iterations=50)
    assert recovered["nan"].norm == pytest.approx(pairs["good"].norm.item(), rel=1e-5)
    assert recovered["zero"].norm == pytest.approx(pairs["good"].norm.item(), rel=1e-5)


def test_half_precision_and_autocast():
    weight = torch.randn(40, 30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        pair = PowerIteration().step({"": weight})[""]
    assert pair.direction.dtype == torch.float32
    assert pair.norm == pytest.approx(reference(weight)[1].item(), rel=1e-5)


def test_names_do_not_mix_and_state_is_restored():
    weights = {"a": torch.randn(20, 10), "b": torch.randn(10, 20), "c": torch.randn(20, 10)}
    power, other = PowerIteration(), PowerIteration()
    pairs = power.step(weights)
    assert list(pairs) == ["a", "b", "c"]
    for name, weight in weights.items():
        assert pairs[name].norm == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=1e-5)
    other.load_state_dict(power.state_dict() | {"b": torch.zeros(1, 1)})  # one that does not fit starts cold
    for name, pair in other.step(weights).items():
        torch.testing.assert_close(pair.direction, power.step(weights)[name].direction, rtol=0, atol=1e-4)


def test_a_block_needs_two_vectors():
    with pytest.raises(ValueError, match="`size` must be at least 2, got 1"):
        PowerIteration(size=1)
