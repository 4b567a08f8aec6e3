"""The bounded sample: uniform over the stream, the same however it is cut, and no generator touched."""

import pickle

import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import local_intrinsic_dimension, two_nn
from lightning_collapse.metrics import IntrinsicDimension


def data(n: int = 500, width: int = 4) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0))


def fed(rows: Tensor, sizes: list[int] | int, **kwargs: int) -> IntrinsicDimension:
    metric = IntrinsicDimension(**kwargs)
    for part in rows.split(sizes):
        metric.update(part)
    return metric


def numbers(metric: IntrinsicDimension) -> list[float]:
    return [value.item() for value in metric.compute().values()]


def test_all_rows_while_there_is_room() -> None:
    rows = data()
    found = fed(rows, 37).compute()
    assert list(found) == ["two_nn", "lid", "n", "ties"]
    assert found["two_nn"].item() == pytest.approx(two_nn(rows).dimension.item(), rel=1e-12)
    assert found["lid"].item() == pytest.approx(local_intrinsic_dimension(rows).dimension.item(), rel=1e-12)
    assert found["n"] == 500


@pytest.mark.parametrize("sizes", [500, 1, 7, [0, 480, 20]])
def test_the_sample_does_not_depend_on_the_split(sizes: list[int] | int) -> None:
    before = torch.get_rng_state()
    expected, metric = fed(data(), 100, capacity=64), fed(data(), sizes, capacity=64)
    assert torch.equal(before, torch.get_rng_state())
    assert len(metric.rows) == 64
    assert torch.equal(metric.rows[metric.priority.argsort()], expected.rows[expected.priority.argsort()])
    assert numbers(metric) == pytest.approx(numbers(expected), rel=1e-9)


def test_the_sample_is_uniform_over_the_stream() -> None:
    places = torch.arange(100_000.0).unsqueeze(1)
    taken = fed(places, 1000, capacity=2000).rows.flatten()
    assert len(taken.unique()) == 2000
    tenths = torch.histc(taken, 10, 0, 100_000)
    # counts of 200 in each tenth, binomial: chi squared with 9 degrees of freedom is below 27.9 in 999 of 1000
    assert ((tenths - 200).square() / 200).sum() < 27.9
    gaps = taken.sort().values.diff()
    # gaps of a uniform sample are geometric: their standard deviation is their mean, here to 1 / sqrt(2000) and a half
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.1)


def test_merging_is_the_sample_of_both() -> None:
    first, second = fed(data(), 50, capacity=64), fed(data() + 9, 50, capacity=64)
    both = torch.cat([first.rows, second.rows])
    order = torch.cat([first.priority, second.priority]).argsort(stable=True)[:64]
    for form in (second, second.metric_state):
        metric = pickle.loads(pickle.dumps(first))
        metric.merge_state(form)
        assert torch.equal(metric.rows, both[order])
        assert metric.seen == 1000
    assert 15 < (both[order].mean(dim=1) > 4.5).sum() < 49  # either has its part
    empty = IntrinsicDimension(64)
    empty.merge_state(first)
    assert numbers(empty) == numbers(first)
    first.merge_state(IntrinsicDimension(64))
    assert numbers(empty) == numbers(first)
    with pytest.raises(ValueError, match="`incoming_state` must be an `IntrinsicDimension` metric, or its states"):
        first.merge_state(fed(data(9, 3), 9))


def test_state_round_trip_and_reset() -> None:
    metric = fed(data(), 50, capacity=64)
    metric.persistent(True)
    restored = IntrinsicDimension(64)
    restored.load_state_dict(pickle.loads(pickle.dumps(metric.state_dict())))
    for each in (metric, restored):
        each.update(data() * 2)
    assert numbers(metric) == numbers(restored)
    metric.reset()
    metric.update(data())
    assert numbers(metric) == pytest.approx(numbers(fed(data(), 500, capacity=64)), rel=1e-9)


def test_forward_reads_the_batch_and_keeps_the_stream() -> None:
    metric = IntrinsicDimension()
    assert metric(data()[:100])["n"] == 100
    metric(data()[100:])
    assert numbers(metric) == numbers(fed(data(), 250))


def test_masks_bad_rows_half_precision_and_no_graph() -> None:
    rows = data().bfloat16().requires_grad_()
    spoiled = rows.detach().clone()
    spoiled[3], spoiled[5, 1] = torch.nan, torch.inf
    mask = torch.arange(500) % 3 != 0
    metric = IntrinsicDimension().half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(spoiled, mask)
    mask[5] = False
    found, expected = metric.compute(), two_nn(rows[mask])
    assert found["two_nn"].item() == pytest.approx(expected.dimension.item(), rel=1e-9)
    assert found["n"] + found["ties"] == mask.sum()
    metric.update(rows)
    assert not metric.rows.requires_grad
    assert metric.rows.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_to_read() -> None:
    assert IntrinsicDimension().compute()["two_nn"].isnan()
    metric = IntrinsicDimension()
    metric.update(torch.full((9, 3), torch.nan))
    metric.update(torch.zeros(0, 3))
    assert metric.compute()["two_nn"].isnan()
    assert metric.compute()["n"] == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`capacity` must be at least 3, got 2"):
        IntrinsicDimension(2)
    with pytest.raises(ValueError, match="`k` must be at least 3, got 1"):
        IntrinsicDimension(k=1)
    metric = fed(data(), 500)
    with pytest.raises(ValueError, match=r"`features` must have shape \(N, 4\), got \(3, 5\)"):
        metric.update(torch.zeros(3, 5))
