"""Statistics of classes that come one after the other are those of a table of all of them."""

import pytest
import torch

from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.spectral.seen_classes import SeenClassMoments, feature_rank

FAR = torch.tensor([0, 10**12, 7, 49_999, 3, 2**40])


def stream(seed=0, batches=5):
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(6, (20,), generator=generator) for _ in range(batches)]
    return [(torch.randn(20, 3, generator=generator), y) for y in labels]


def test_any_integers_are_classes():
    seen, dense = SeenClassMoments(8, 3), ClassMoments(6, 3)
    for x, y in stream():
        seen.update(x, FAR[y])
        dense.update(x, y)
    found = seen.reduce()
    order = FAR.argsort()
    assert torch.equal(found.classes, FAR[order])
    assert torch.equal(found.moments.count, dense.count[order])
    torch.testing.assert_close(found.moments.means, dense.means[order])
    torch.testing.assert_close(found.moments.within_scatter, dense.within_scatter)
    assert found.crowded == 0


def test_what_there_is_no_room_for_is_counted():
    seen = SeenClassMoments(4, 3)
    batches = stream()
    for x, y in batches:
        seen.update(x, y)
    found = seen.reduce()
    everything = torch.cat([y for _, y in batches])
    kept = torch.isin(everything, found.classes)
    assert len(found.classes) == 4
    assert found.moments.count.sum() == kept.sum()
    assert found.crowded == (~kept).sum() > 0


def test_labels_that_name_no_class():
    seen = SeenClassMoments(4, 1, num_classes=3)
    seen.update(torch.ones(5, 1), torch.tensor([-100, -1, 3, 2, 2]))
    found = seen.reduce()
    assert found.classes[found.moments.count > 0].tolist() == [2]
    assert (found.moments.count.sum(), found.crowded) == (2, 0)
    assert SeenClassMoments(4, 1).reduce().moments.count.sum() == 0


def test_a_checkpoint_goes_on():
    whole, half = SeenClassMoments(4, 3), SeenClassMoments(4, 3)
    batches = stream()
    for x, y in batches:
        whole.update(x, y)
    for x, y in batches[:2]:
        half.update(x, y)
    again = SeenClassMoments(4, 3)
    assert again.load_states({name: state.clone() for name, state in half.states().items()})
    assert not SeenClassMoments(5, 3).load_states(half.states())
    for x, y in batches[2:]:
        again.update(x, y)
    for name, state in whole.states().items():
        assert torch.equal(state, again.states()[name]), name


def test_rank_of_one_batch():
    x = torch.randn(30, 4)
    x[:, 3] = 3 - x[:, :3].sum(dim=1)  # a plane, up to rounding
    for rows, rank in ((x, 3), (x.bfloat16(), 3), (torch.randn(30, 4), 4), (x[:5], 4)):
        assert feature_rank(rows, torch.finfo(rows.dtype).eps) == rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_makes_features_no_more_precise(dtype):
    x = torch.randn(30, 4).to(dtype)
    for features, expected in ((x, dtype), (x.float(), dtype), (x.double() / 3, torch.float64)):
        moments = ClassMoments(2, 4)
        moments.update(features, torch.arange(30) % 2)
        assert moments.resolution == pytest.approx(torch.finfo(expected).eps)
