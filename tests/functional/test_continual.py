"""Measures of a sequence of tasks on matrices small enough to do by hand."""

from math import isnan, nan

import pytest
import torch

from lightning_collapse.functional import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
    min_accuracy,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

TWO = torch.tensor([[0.9, nan], [0.6, 0.8]])
THREE = torch.tensor([[0.7, 0.3, 0.2], [0.9, 0.8, 0.4], [0.6, 0.5, 0.9]])


@pytest.mark.parametrize(
    ("measure", "two", "three"),
    [
        (average_accuracy, 0.7, 2.0 / 3),
        (learning_accuracy, 0.85, 0.8),
        (backward_transfer, -0.3, (-0.1 - 0.3) / 2),
        (forgetting, 0.3, (0.3 + 0.3) / 2),  # the best of the first task came after the second
    ],
)
def test_by_hand(measure, two, three):
    assert measure(TWO).item() == pytest.approx(two)
    assert measure(THREE).item() == pytest.approx(three)
    ahead = torch.cat([THREE, torch.full((3, 2), nan)], dim=1)  # tasks to come do not matter
    assert measure(ahead).item() == pytest.approx(three)


def test_with_references_by_hand():
    baseline = torch.tensor([0.5, 0.1, 0.25])
    assert forward_transfer(THREE, baseline).item() == pytest.approx((0.2 + 0.15) / 2)
    assert intransigence(THREE, torch.tensor([0.8, 0.8, 0.8])).item() == pytest.approx(0.0, abs=1e-6)
    assert intransigence(TWO, torch.tensor([1.0, 1.0])).item() == pytest.approx(0.15)


def test_after_the_first_of_several_tasks():
    one = torch.tensor([[0.9, 0.1, 0.2]])
    assert average_accuracy(one).item() == learning_accuracy(one).item() == pytest.approx(0.9)
    for value in (backward_transfer(one), forgetting(one), forward_transfer(one, torch.zeros(3))):
        assert isnan(value)


def test_what_is_unknown_stays_unknown():
    hole = THREE.clone()
    hole[2, 0] = nan
    assert isnan(average_accuracy(hole))
    assert isnan(backward_transfer(hole))
    assert isnan(forgetting(hole))
    assert learning_accuracy(hole).item() == pytest.approx(0.8)
    unseen = THREE.clone()
    unseen[0, 1] = nan  # not evaluated before it was learned: the best is of what is known
    assert forgetting(unseen).item() == forgetting(THREE).item()


def test_half_precision_is_read_in_single():
    assert average_accuracy(TWO.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("matrix", [torch.zeros(3), torch.zeros(3, 2), torch.zeros(0, 2)])
def test_shapes_that_make_no_sense(matrix):
    with pytest.raises(ValueError, match="`accuracies` must have shape"):
        average_accuracy(matrix)
    with pytest.raises(ValueError, match="`baseline` must have shape"):
        forward_transfer(THREE, torch.zeros(2))
    with pytest.raises(ValueError, match="`reference` must have shape"):
        intransigence(THREE, torch.zeros(2))


def test_a_dip_between_two_ends_is_seen():
    """Accuracy 0.9 after the first task, 0.2 in the midst of the second, 0.6 and 0.8 at its end."""
    dip = torch.tensor([[0.2, 0.6]])
    assert min_accuracy(dip).item() == pytest.approx(0.2)
    assert worst_case_accuracy(torch.tensor(0.8), dip).item() == pytest.approx(0.5)
    assert worst_case_accuracy(torch.tensor(0.8), torch.zeros(0, 2)).item() == pytest.approx(0.8)
    later = torch.tensor([[0.2, 0.6, 0.7], [nan, nan, 0.4]])
    assert worst_case_accuracy(torch.tensor(0.9), later).item() == pytest.approx((0.9 + 0.2 + 0.4) / 3)
    assert isnan(min_accuracy(torch.tensor([[0.2], [nan]])))
    assert isnan(min_accuracy(torch.zeros(0, 3)))


def test_windows_by_brute_force():
    curves = torch.rand(4, 30)
    for window in (2, 5, 40):
        pairs = [(m, n) for m in range(30) for n in range(m, min(m + window, 30))]
        fall = torch.stack([curves[:, m] - curves[:, n] for m, n in pairs]).amax(dim=0)
        rise = torch.stack([curves[:, n] - curves[:, m] for m, n in pairs]).amax(dim=0)
        assert torch.equal(windowed_forgetting(curves, window), fall)
        assert torch.equal(windowed_plasticity(curves, window), rise)


def test_windows_at_the_edges():
    rising = torch.tensor([[0.1, nan, 0.2, 0.3], [nan, nan, nan, nan]])
    fall, nothing = windowed_forgetting(rising, 3).tolist()
    assert fall == 0
    assert isnan(nothing)
    assert windowed_plasticity(rising, 3)[0].item() == pytest.approx(0.1)
    assert windowed_forgetting(torch.zeros(2, 0), 3).isnan().all()
    with pytest.raises(ValueError, match="at least 2"):
        windowed_forgetting(rising, 1)
    with pytest.raises(ValueError, match="at least one dimension"):
        windowed_forgetting(torch.tensor(1.0), 2)
    with pytest.raises(ValueError, match="evaluations"):
        min_accuracy(torch.zeros(3))
