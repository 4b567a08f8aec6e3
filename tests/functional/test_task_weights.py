"""Closed forms: the factor is a stationary point, an update keeps its energy and leaves past directions."""

import pytest
import torch

from lightning_collapse.functional.task_weights import consolidated_update, dynamic_ema_decay


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decay_of(theta, average, step, curvature, slope, form="paper"):
    """In one dimension, of a parabola, the norms being absolute values."""
    numbers = (slope(theta), slope(theta) - slope(theta - step), step, theta - average)
    return dynamic_ema_decay(*(torch.tensor(abs(number), dtype=torch.float64) for number in numbers), form=form)


def test_the_factor_is_a_stationary_point():
    curvature, theta, average = 4.0, 2.0, 0.5
    decay, fallback = decay_of(theta, average, 0.25, curvature, lambda x: curvature * (x - 1.8))
    beta = torch.tensor(decay.item(), dtype=torch.float64, requires_grad=True)
    new = beta * average + (1 - beta) * theta
    objective = curvature / 2 * (new - 1.8) ** 2 - curvature / 2 * (theta - 1.8) ** 2 + new - average
    (slope,) = torch.autograd.grad(objective, beta)
    assert not fallback
    assert decay.item() == pytest.approx(0.3)  # (0.8 + 1) / (1.5 * 4)
    assert slope.item() == pytest.approx(0, abs=1e-12)


def test_a_factor_out_of_range_falls_back_in_both_forms():
    # 4.9 / (1 * 2.7) = 1.8148
    norms = [torch.tensor(value) for value in (3.9, 2.7, 1.0, 1.0)]
    for form in ("paper", "released"):
        decay, fallback = dynamic_ema_decay(*norms, form=form)
        assert fallback
        assert decay.item() == pytest.approx(0.99)
    share = (norms[0] + 1) / norms[3] * norms[2] / norms[1]
    assert share.item() == pytest.approx(1.8148, abs=1e-4)


def test_the_released_form_weighs_the_new_weights_and_knows_no_step():
    norms = torch.tensor([[1.0, 1.0], [4.0, 4.0], [1.0, 99.0], [5.0, 5.0]])
    decay, fallback = dynamic_ema_decay(*norms, form="released")
    torch.testing.assert_close(decay, torch.tensor([0.8, 0.8]))
    assert not fallback.any()
    paper, fallback = dynamic_ema_decay(*norms)
    torch.testing.assert_close(paper, torch.tensor([0.1, 0.99]))
    assert fallback.tolist() == [False, True]
    with pytest.raises(ValueError, match="`form` must be one of"):
        dynamic_ema_decay(*norms, form="code")


def test_nothing_that_is_no_number_comes_out():
    values = torch.tensor([0.0, 1.0, torch.inf, torch.nan])
    norms = torch.cartesian_prod(values, values, values, values).T
    decay, fallback = dynamic_ema_decay(*norms)
    assert ((decay > 0) & (decay < 1)).all()
    assert (decay[fallback] == 0.99).all()


def test_an_update_keeps_the_fewest_directions_with_the_energy():
    left, right = torch.linalg.qr(random(5, 4)).Q, torch.linalg.qr(random(6, 4, seed=1)).Q
    update = left @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.1], dtype=torch.float64)) @ right.T
    for energy, rank in ((0.5, 1), (0.9, 2), (0.93, 3), (0.9999, 4)):  # 9, 13, 14 and 14.01 of 14.01
        kept = consolidated_update(update, energy=energy)
        expected = left[:, :rank] @ left[:, :rank].T @ update
        torch.testing.assert_close(kept, expected)
    assert consolidated_update(update, energy=1.0) is update
    assert torch.equal(consolidated_update(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_past_directions_are_damped_and_others_are_not():
    update, past = random(5, 6), random(3, 30, seed=1)
    basis = torch.linalg.qr(past.T).Q.T
    inside = (basis @ update.flatten()) @ basis
    for gamma in (0.0, 0.1, 1.0):
        new = consolidated_update(update, past, energy=1.0, gamma=gamma)
        torch.testing.assert_close(new.flatten(), update.flatten() - inside + gamma * inside)
    assert torch.equal(new, update)
    orthogonal = consolidated_update(update, past, energy=1.0, gamma=0.0)
    torch.testing.assert_close(past @ orthogonal.flatten(), torch.zeros(3, dtype=torch.float64))


def test_rows_of_zeros_and_repeated_ones_damp_nothing_more():
    update, past = random(5, 6), random(2, 30, seed=1)
    padded = torch.cat([past, torch.zeros(3, 30), past[:1] * (1 + 1e-9)])
    for dtype in (torch.float32, torch.float64):
        few, many = (consolidated_update(update.to(dtype), rows.to(dtype)) for rows in (past, padded))
        torch.testing.assert_close(many, few)
    assert torch.equal(consolidated_update(update, torch.zeros(2, 30), energy=1.0), update)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"got \(4,\) and None"):
        consolidated_update(torch.zeros(4))
    with pytest.raises(ValueError, match=r"got \(2, 2\) and \(1, 3\)"):
        consolidated_update(torch.zeros(2, 2), torch.zeros(1, 3))
