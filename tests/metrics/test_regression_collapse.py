"""The streaming form: the functional of all rows, however they arrive."""

import pickle

import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import regression_collapse
from lightning_collapse.metrics import RegressionCollapse


def data(seed: int = 0, m: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + 4
    return rows, rows[:, :2] + torch.randn(m, 2, generator=generator, dtype=torch.float64) + 1000


WEIGHT = torch.randn(2, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def numbers(found: dict[str, Tensor]) -> list[float]:
    return [value.item() for value in found.values()]


def expected(rows: Tensor, targets: Tensor, center: bool = True):
    reading = regression_collapse(rows, targets, WEIGHT, center=center)
    return pytest.approx([value.item() for value in reading], rel=1e-9)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("split", [[60], [1, 2, 40, 17], [1] * 60, [0, 30, 0, 30]])
def test_any_split_is_the_functional(split: list[int], center: bool) -> None:
    rows, targets = data()
    metric = RegressionCollapse(6, 2, center)
    for x, y in zip(rows.split(split), targets.split(split), strict=True):
        metric.update(x, y)
    assert list(metric.compute(WEIGHT)) == ["nrc1", "nrc2", "nrc3", "n", "rank"]
    assert numbers(metric.compute(WEIGHT)) == expected(rows, targets, center)
    other = numbers(metric.compute(-WEIGHT.flip(1)))  # not the cached value of the first weight
    assert other[1] != pytest.approx(numbers(metric.compute(WEIGHT))[1], rel=1e-3)


def test_without_a_weight_only_the_first_is_known() -> None:
    rows, targets = data()
    metric = RegressionCollapse(6, 2)
    found = metric(rows[:30], targets[:30])
    assert found["nrc1"].item() == pytest.approx(regression_collapse(rows[:30], targets[:30]).nrc1.item(), rel=1e-9)
    assert all(found[name].isnan() for name in ("nrc2", "nrc3", "rank"))
    metric(rows[30:], targets[30:])
    assert numbers(metric.compute(WEIGHT)) == expected(rows, targets)


def test_far_from_the_origin_in_single_precision() -> None:
    rows, targets = data()
    metric = RegressionCollapse(6, 2)
    far = (rows + 3e3).float()
    for x, y in zip(far.split(7), targets.float().split(7), strict=True):
        metric.update(x, y)
    assert numbers(metric.compute(WEIGHT)) == expected(far.double(), targets.float().double())


def test_masks_bad_rows_and_half_precision() -> None:
    rows, targets = (x.bfloat16() for x in data())
    mask = torch.arange(60) % 3 != 0
    spoiled, bad = rows.clone(), targets.clone()
    spoiled[1], bad[2, 1] = torch.nan, torch.inf
    metric = RegressionCollapse(6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for part in torch.arange(60).split(13):
            metric.update(spoiled[part], bad[part], mask[part])
    mask[1:3] = False
    assert numbers(metric.compute(WEIGHT)) == expected(rows[mask].double(), targets[mask].double())
    assert metric.moments().seen == 40


def test_one_target_may_be_a_vector() -> None:
    rows, targets = data()
    flat, column = RegressionCollapse(6, 1), RegressionCollapse(6, 1)
    flat.update(rows, targets[:, 0])
    column.update(rows, targets[:, :1])
    assert numbers(flat.compute(WEIGHT[:1]))[:2] == numbers(column.compute(WEIGHT[:1]))[:2]


def test_merge_and_state_round_trip() -> None:
    rows, targets = data()
    first, second = RegressionCollapse(6, 2), RegressionCollapse(6, 2)
    first.update(rows[:11], targets[:11])
    second.update(rows[11:], targets[11:])
    first.persistent(True)
    restored = RegressionCollapse(6, 2)
    restored.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for metric in (first, restored):
        metric.merge_state(second)
        assert numbers(metric.compute(WEIGHT)) == expected(rows, targets)
    first.reset()
    first.update(rows, targets)
    assert numbers(first.compute(WEIGHT)) == expected(rows, targets)
    with pytest.raises(ValueError, match="`incoming_state` must be a `RegressionCollapse` metric, or its states"):
        first.merge_state(RegressionCollapse(5, 3))


def test_a_model_in_half_precision_leaves_the_sums_alone() -> None:
    metric = RegressionCollapse(6, 2).half()
    rows, targets = data()
    metric.update(rows, targets)
    assert numbers(metric.compute(WEIGHT)) == expected(rows, targets)


def test_nothing_but_bad_numbers() -> None:
    metric = RegressionCollapse(3, 2)
    metric.update(torch.full((5, 3), torch.nan), torch.zeros(5, 2))
    found = metric.compute(torch.ones(2, 3))
    assert found["n"] == 0
    assert all(found[name].isnan() for name in ("nrc1", "nrc2", "nrc3"))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`dim` must be positive, got 0"):
        RegressionCollapse(0, 1)
    with pytest.raises(ValueError, match="`targets` must be positive, got -1"):
        RegressionCollapse(2, -1)
    metric = RegressionCollapse(3, 2)
    with pytest.raises(ValueError, match=r"`targets` of shape \(N, 2\), got \(4, 3\) and \(4, 1\)"):
        metric.update(torch.zeros(4, 3), torch.zeros(4))
    metric.update(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"`weight` must have shape \(2, 3\), got \(3, 2\)"):
        metric.compute(torch.ones(3, 2))
