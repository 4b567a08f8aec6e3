"""States of recurrent and state-space models against closed forms and plain loops in double precision."""

import math

import pytest
import torch
from torch import nn

from lightning_collapse.functional.states import (
    cell_step,
    eigenmodes,
    forgetting_horizon,
    head_growth,
    memory_share,
    scan_states,
    state_statistics,
    time_constants,
    token_divergence,
    transient_growth,
    transition_matrix,
)
from lightning_collapse.functional.states.eigenmodes import UNRELIABLE


def hippo(n):
    """The matrix of HiPPO-LegS, and the vector that makes it normal."""
    b = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    return -(torch.outer(b, b).tril(-1) + torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64))), b


@pytest.mark.parametrize(("n", "conditioning"), [(4, 86), (8, 7.7e4), (16, 8.3e10)])
def test_eigenvectors_of_hippo_are_as_ill_conditioned_as_published(n, conditioning):
    values, found = eigenmodes(hippo(n)[0])
    assert found.item() == pytest.approx(conditioning, rel=0.02)
    assert found < UNRELIABLE
    torch.testing.assert_close(
        values.real.sort().values, -torch.arange(n, 0.0, -1, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_where_eigenvectors_are_noise_it_shows():
    assert eigenmodes(hippo(24)[0]).conditioning > UNRELIABLE


def test_the_normal_part_of_hippo_has_orthogonal_eigenvectors_and_one_time_constant():
    matrix, b = hippo(16)
    values, conditioning = eigenmodes(matrix + torch.outer(b, b) / 2)
    assert conditioning.item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(time_constants(values, "continuous"), torch.full((16,), 2.0, dtype=torch.float64))


def test_a_gaussian_matrix_stretches_more_than_its_radius_says():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(10, 32, 32, generator=generator, dtype=torch.float64) / math.sqrt(32)
    values, conditioning = eigenmodes(draws)
    assert 25 < conditioning.median() < 90  # published: 46
    growth = transient_growth(draws, (1, 4, 10, 16))
    exact = torch.stack([torch.linalg.matrix_norm(torch.linalg.matrix_power(draws, k), 2) for k in (1, 4, 10, 16)], 1)
    assert ((growth <= exact * (1 + 1e-9)) & (growth > 0.97 * exact)).all()  # from below
    assert (growth[:, 2] > values.abs().amax(dim=1) ** 10).all()
    assert 2 < growth[:, 2].median() < 7  # published: 3.8


@pytest.mark.parametrize("size", [0.05, 20.0])
def test_squares_of_large_and_small_powers_do_not_leave_the_range_of_floats(size):
    assert transient_growth(size * torch.eye(3), (16,)).item() == pytest.approx(size**16, rel=1e-5)


def test_matrices_that_hold_no_numbers_have_no_modes():
    bad = torch.eye(3).repeat(2, 1, 1)
    bad[0, 1, 1] = math.nan
    values, conditioning = eigenmodes(bad)
    assert values[0].isnan().all()
    assert conditioning[0].isnan()
    assert conditioning[1] == 1
    assert transient_growth(bad).isnan().tolist() == [[True] * 3, [False] * 3]
    with pytest.raises(ValueError, match=r"must be square .* got \(2, 3\)"):
        eigenmodes(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`powers` .* got \(0,\)"):
        transient_growth(torch.eye(2), (0,))


def test_time_constants_say_when_a_mode_has_faded():
    matrix = torch.tensor([[0.8, -0.3], [0.3, 0.8]])  # turns, and shrinks
    tau = time_constants(torch.linalg.eigvals(matrix))[0].item()
    assert (0.73**0.5) ** tau == pytest.approx(math.exp(-1))
    assert time_constants(torch.tensor([1.0, 1.2, math.nan])).tolist()[:2] == [math.inf, math.inf]
    assert memory_share(torch.tensor([[1.0, 9.0], [math.inf, 20.0]]), 8).tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match=r"`time` .*'daily'"):
        time_constants(torch.ones(1), "daily")


def test_nothing_is_left_at_the_forgetting_horizon():
    generator = torch.Generator().manual_seed(1)
    matrix = 0.8 * torch.randn(8, 8, generator=generator, dtype=torch.float64) / math.sqrt(8)
    values, conditioning = eigenmodes(matrix)
    steps = math.ceil(forgetting_horizon(time_constants(values), conditioning, left=0.05))
    assert torch.linalg.matrix_norm(torch.linalg.matrix_power(matrix, steps), 2) <= 0.05
    assert forgetting_horizon(time_constants(torch.tensor([0.5])), left=0.25).item() == pytest.approx(2)
    with pytest.raises(ValueError, match=r"`left` .* got 1"):
        forgetting_horizon(torch.ones(1), left=1)


def test_tokens_converge_where_all_eigenvalues_are_negative_and_only_there():
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0][:3]
    mixed = torch.diag(torch.tensor([-1.0, -2.0, 0.5], dtype=torch.float64))
    assert token_divergence(basis, mixed @ basis).item() == pytest.approx(0.25)
    assert token_divergence(basis, -mixed.abs() @ basis).item() == pytest.approx(-0.25)
    full = torch.linalg.eigvals((mixed @ basis).T @ basis)  # the large matrix has the same, and zeros
    assert full.real.amax().item() == pytest.approx(0.5)
    assert token_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(3, 2\)"):
        token_divergence(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize("rates", [1, 3], ids=["a rate for a head", "a rate for a number"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_scan_is_the_recurrence_and_reads_again_beyond_the_end(rates, shared, monkeypatch):
    monkeypatch.setattr("lightning_collapse.functional.states.scan._ENTRIES", 100)  # in pieces
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    steps, decay, inputs = draw(2, 9, 4).exp(), -draw(4, rates).exp(), draw(2, 9, 4, 2)
    keys = draw(2, 9, 3) if shared else draw(2, 9, 4, 3)
    found = scan_states(steps, decay, inputs, keys, (1, 4, 9, 18))
    state, wanted = torch.zeros(2, 4, 2, 3, dtype=torch.float64), []
    for t in range(18):
        i = t % 9
        key = keys[:, i, None, None] if shared else keys[:, i, :, None]
        state = (steps[:, i, :, None] * decay).exp()[:, :, None] * state + inputs[:, i, :, :, None] * key
        wanted += [state] if t + 1 in (1, 4, 9, 18) else []
    torch.testing.assert_close(found, torch.stack(wanted, dim=1))
    with pytest.raises(ValueError, match=r"`places` must ascend from 1, got \(2, 2\)"):
        scan_states(steps, decay, inputs, keys, (2, 2))


def test_statistics_are_of_each_head_and_leave_out_what_was_never_a_number():
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(7, 2, 3, 2, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.0]).view(3, 1, 1) + 2
    states[3, 0, 1, 0, 0] = math.nan
    mask = torch.tensor([True] * 6 + [False])
    found = state_statistics(states, mask)
    rows = states[[0, 1, 2, 4, 5]].double()
    torch.testing.assert_close(found.mean, rows.mean(dim=(0, 3, 4)))
    torch.testing.assert_close(found.variance, rows.permute(1, 2, 0, 3, 4).flatten(2).var(dim=2, correction=0))
    torch.testing.assert_close(found.rms, rows.square().mean(dim=(0, 3, 4)).sqrt())
    for place, head in ((0, 0), (1, 1)):
        matrix = rows[:, place, head].flatten(0, 1)
        p = torch.linalg.svdvals(matrix - matrix.mean(dim=0))
        p = p[p > 1e-9] / p.sum()
        assert found.effective_rank[place, head].item() == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)
    assert found.effective_rank[0, 2] == 0


def test_infinity_is_an_explosion_and_no_gap():
    states = torch.ones(3, 2, 1, 1, 4)
    states[0, 1] = math.inf
    states[1, 1] = math.nan
    found = state_statistics(states + torch.arange(4))
    assert found.rms.isfinite().all()
    assert head_growth(found.variance[0], found.variance[1]) > 100


def test_growth_is_of_the_head_and_not_of_noise_in_a_dead_one():
    before, after = torch.tensor([1.0, 2.0, 1e-20]), torch.tensor([4.0, 2.0, 1e-12])
    torch.testing.assert_close(head_growth(before, after), torch.tensor([math.log(4), 0.0, 0.0]))


CELLS = {"RNN_TANH": nn.RNNCell, "RNN_RELU": nn.RNNCell, "GRU": nn.GRUCell, "LSTM": nn.LSTMCell}


@pytest.mark.parametrize("kind", CELLS)
def test_transitions_are_those_of_the_cell_of_torch(kind):
    torch.manual_seed(5)
    more = {"nonlinearity": kind[4:].lower()} if kind.startswith("RNN") else {}
    cell = CELLS[kind](3, 4, dtype=torch.float64, **more)
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    inputs, state = torch.randn(3).double(), torch.randn(8 if kind == "LSTM" else 4).double()

    def step(h):
        return (
            torch.cat(cell(inputs[None], (h[None, :4], h[None, 4:])), 1)[0]
            if kind == "LSTM"
            else cell(inputs[None], h[None])[0]
        )

    torch.testing.assert_close(cell_step(kind, weights, inputs, state), step(state))
    h = 1e-6
    slopes = [(step(state + h * e) - step(state - h * e)) / (2 * h) for e in torch.eye(len(state)).double()]
    matrix = transition_matrix(kind, weights, inputs, state)
    torch.testing.assert_close(matrix, torch.stack(slopes, dim=1).detach(), rtol=1e-6, atol=1e-8)
    assert not matrix.requires_grad
    if kind == "RNN_TANH":  # at rest it is the weight itself
        zeros = [cell.weight_ih, cell.weight_hh, None, None]
        torch.testing.assert_close(transition_matrix(kind, zeros, 0 * inputs, 0 * state), cell.weight_hh.detach())
