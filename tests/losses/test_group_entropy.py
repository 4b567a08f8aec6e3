"""Group entropy: its published values, its least value, and predictions that leave a group without mass."""

import math

import pytest
import torch

from lightning_collapse.losses import GroupEntropy, group_entropy_terms

F64 = torch.float64


def logits_of(*shares: float) -> torch.Tensor:
    return 0.1 * torch.tensor([shares], dtype=F64).log()


def test_published_values() -> None:
    assert GroupEntropy(8)(torch.zeros(4, 10, dtype=F64)).item() == pytest.approx(0.3855, abs=5e-5)
    assert GroupEntropy(5)(torch.zeros(4, 10, dtype=F64)).item() == pytest.approx(0, abs=1e-12)
    half = logits_of(*[0.5 / 8] * 8, 0.25, 0.25)
    assert GroupEntropy(8)(half).item() == pytest.approx(0, abs=1e-12)
    without = torch.tensor([[0.0] * 8 + [-torch.inf] * 2], dtype=F64)
    assert GroupEntropy(8)(without).item() == pytest.approx(2 * math.log(2))
    uneven = group_entropy_terms(logits_of(0.375, 0.125, 0.1, 0.4), old_classes=2)
    assert uneven["old"].item() == pytest.approx(math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert uneven["new"].item() == pytest.approx(math.log(2) + 0.2 * math.log(0.2) + 0.8 * math.log(0.8))


def test_half_of_the_mass_on_new_classes_is_the_least() -> None:
    for old in (1, 3, 9):
        shares = torch.linspace(0.05, 0.95, 19, dtype=F64)
        values = [
            group_entropy_terms(logits_of(*[(1 - s) / old] * old, s / 2, s / 2), old)["groups"].item()
            for s in shares.tolist()
        ]
        assert values.index(min(values)) == 9


def test_the_mean_prediction_decides_and_not_each_row() -> None:
    sure = torch.tensor([[9.0, 0.0], [0.0, 9.0]], dtype=F64)
    assert GroupEntropy(1)(sure).item() == pytest.approx(0, abs=1e-12)
    assert GroupEntropy(1)(sure[:1]).item() == pytest.approx(2 * math.log(2))


def test_one_new_class_is_even_by_itself() -> None:
    assert group_entropy_terms(logits_of(0.1, 0.2, 0.7), 2)["new"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("gap", [1.0, 5.0, 12.0, 1e4, math.inf])
def test_a_group_without_mass_has_a_value_and_a_finite_gradient(gap: float) -> None:
    leaf = torch.zeros(3, 6, requires_grad=True)
    value = GroupEntropy(4)(torch.cat([leaf[:, :4], leaf[:, 4:] - gap], dim=1))
    value.backward()
    assert 0.5 < value.item() <= 2 * math.log(2) + 1e-5
    assert leaf.grad.isfinite().all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"`old_classes` must be below .*, got 4 of 4\. Before new"):
        GroupEntropy(4)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="`old_classes` must be an integer of at least 1, got 0"):
        GroupEntropy(0)
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        GroupEntropy(4, temperature=0)
    with pytest.raises(ValueError, match="`old` must be finite, got nan"):
        GroupEntropy(4, old=math.nan)
    assert "old_classes=4, temperature=0.1" in repr(GroupEntropy(4))
