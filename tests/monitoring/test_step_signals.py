"""Bursts among steps: robust scores against numpy, what one bad step does to those after it, and a new level."""

import math

import numpy as np
import pytest
import torch

from lightning_collapse.monitoring import StepSignals


def noise(count, seed=0, spread=0.05):
    return np.exp(spread * np.random.default_rng(seed).standard_normal(count))


def feed(signals, losses, norms=None, **kwargs):
    """Flags of the steps."""
    norms = np.ones(len(losses)) if norms is None else norms
    pairs = zip(torch.tensor(losses), torch.tensor(norms), strict=True)
    return [signals.update(step, loss, norm, **kwargs).item() for step, (loss, norm) in enumerate(pairs)]


def score(window, value):
    logs = np.log(window)
    median = np.sort(logs)[(len(logs) - 1) // 2]
    deviations = np.sort(np.abs(logs - median))[(len(logs) - 1) // 2]
    return (math.log(value) - median) / max(1.4826 * deviations, 1e-6 * (1 + abs(median)))


def test_scores_are_those_of_the_steps_before():
    losses, norms = noise(300), noise(300, seed=1)
    signals = StepSignals(torch.device("cpu"))
    assert not any(feed(signals, losses, norms))
    steps, rows = signals.pop()
    assert steps == list(range(300))
    assert rows[:64, 2:4].isnan().all()
    ends = [t - t % 8 for t in range(64, 300)]  # median and deviation are taken anew every eighth step
    expected = [[score(x[max(e - 128, 0) : e], x[t]) for x in (losses, norms)] for t, e in enumerate(ends, 64)]
    torch.testing.assert_close(rows[64:, 2:4], torch.tensor(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rows[:, :2], torch.tensor(np.stack([losses, norms], axis=1)))
    assert len(signals.pop()[0]) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 100.0])
def test_one_bad_step_flags_itself_alone_and_does_not_raise_the_bar(bad):
    losses = noise(400)
    losses[200], losses[201] = bad, 2.0  # 14 standard deviations: hidden behind the first where that enters the window
    assert np.flatnonzero(feed(StepSignals(torch.device("cpu")), losses)).tolist() == [200, 201]


def test_a_new_level_is_accepted_after_so_many_steps_and_then_learned():
    losses = np.concatenate([noise(200), 5 * noise(300, seed=1)])
    losses[400] = 50
    flags = feed(StepSignals(torch.device("cpu"), limit=8), losses)
    assert np.flatnonzero(flags).tolist() == [*range(200, 208), 400]


def test_steps_that_are_not_finite_are_never_accepted():
    losses = np.concatenate([noise(100), np.full(30, np.nan)])
    assert sum(feed(StepSignals(torch.device("cpu")), losses)) == 30


def test_what_a_scaler_deals_with_is_not_flagged():
    losses, norms = noise(100), noise(100, seed=1)
    norms[80] = math.inf
    assert not any(feed(StepSignals(torch.device("cpu")), losses, norms, overflows=True))
    assert sum(feed(StepSignals(torch.device("cpu")), losses, norms)) == 1


def test_a_negative_loss_has_no_bursts_and_a_constant_one_none_either():
    assert not any(feed(StepSignals(torch.device("cpu")), -noise(200)))
    assert not any(feed(StepSignals(torch.device("cpu")), np.ones(200)))


def test_healthy_noise_is_flagged_less_than_once_in_ten_thousand_steps():
    signals = StepSignals(torch.device("cpu"))
    assert sum(feed(signals, noise(6000, spread=0.6), noise(6000, seed=1, spread=0.3))) == 0


def test_norms_of_parameters_around_the_first_flagged_step_are_kept():
    signals = StepSignals(torch.device("cpu"))
    losses = noise(100)
    losses[[80, 90]] = 50
    for step, loss in enumerate(losses):
        signals.update(step, torch.tensor(loss), torch.tensor(1.0), squares=torch.full((3,), float(step)))
    torch.testing.assert_close(signals.pop_squares(), torch.arange(73.0, 81)[:, None].expand(8, 3))
    signals.pop()
    signals.update(100, torch.tensor(1.0), torch.tensor(1.0), squares=torch.full((3,), 100.0))
    assert signals.pop_squares().isnan().all()
    signals.pop()
    signals.update(101, torch.tensor(99.0), torch.tensor(1.0), squares=torch.full((3,), 101.0))
    torch.testing.assert_close(signals.pop_squares(), torch.arange(94.0, 102)[:, None].expand(8, 3))  # across points


def test_state_goes_on():
    losses = noise(200)
    losses[150] = 50
    whole, first = StepSignals(torch.device("cpu")), StepSignals(torch.device("cpu"))
    feed(whole, losses)
    feed(first, losses[:120])
    second = StepSignals(torch.device("cpu"))
    second.load_state_dict(first.state_dict())
    feed(second, losses[120:])
    torch.testing.assert_close(second.pop()[1], whole.pop()[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, 50.0])
def test_steps_judged_together_are_what_they_are_one_by_one(bad):
    losses, norms = noise(400), noise(400, seed=1)
    losses[[150, 230]] = bad
    losses[160:171] = 30  # a level that is accepted in the middle of eight steps
    norms[300:] *= 5
    parts = torch.tensor(norms)[:, None] * torch.tensor([0.6, 0.0, 0.8])
    one, together = StepSignals(torch.device("cpu")), StepSignals(torch.device("cpu"))
    for step, loss in enumerate(torch.tensor(losses)):
        squares = parts[step].square()
        one.update(step, loss, squares.sum().sqrt(), squares=squares)
        if step % 97:
            together.note(step, loss, parts[step])
        else:
            together.update(step, loss, squares.sum().sqrt(), squares=squares)
        if step in (161, 239, 399):
            torch.testing.assert_close(together.pop_squares(), one.pop_squares(), equal_nan=True)
            (steps, rows), (expected, wanted) = together.pop(), one.pop()
            assert steps == expected
            assert wanted[:, 4].any()
            torch.testing.assert_close(rows, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_what_is_kept_between_two_points_has_a_bound():
    signals = StepSignals(torch.device("cpu"))
    for step, loss in enumerate(torch.tensor(noise(4200))):
        signals.note(step, loss, torch.ones(2))
    steps, rows = signals.pop()
    assert steps == list(range(4200 - 4096, 4200))
    assert rows.shape == (4096, 8)
