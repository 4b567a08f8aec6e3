"""Streaming class statistics against two passes over all rows in double precision."""

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from lightning_collapse.spectral import ClassMoments

C, D, N = 5, 4, 60


def labelled(noise: float = 1.0, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Class 3 has no rows and class 4 only late ones; class means are at distances of about 1 from one another."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (N,), generator=generator)
    labels[-7:] = 4
    centers = torch.randn(C, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    spread = torch.randn(N, D, generator=generator, dtype=torch.float64) * torch.arange(1.0, D + 1)
    return centers[labels] + noise * spread + offset, labels


def naive(features: Tensor, labels: Tensor, classes: int = C) -> dict[str, np.ndarray]:
    """Means first, then the scatter about them, class by class."""
    x, y = features.numpy(), labels.numpy()
    dim = x.shape[1]
    means = np.stack([x[y == c].mean(axis=0) if (y == c).any() else np.full(dim, np.nan) for c in range(classes)])
    scatters = [
        sum((np.outer(r - means[c], r - means[c]) for r in x[y == c]), np.zeros((dim, dim))) for c in range(classes)
    ]
    return {
        "count": np.array([(y == c).sum() for c in range(classes)]),
        "means": means,
        "within_traces": np.array([np.trace(s) for s in scatters]),
        "within_scatter": sum(scatters, np.zeros((dim, dim))),
    }


def fed(*batches: tuple[Tensor, Tensor], dtype: torch.dtype | None = None, scatter: bool = True) -> ClassMoments:
    moments = ClassMoments(C, D, dtype=dtype, scatter=scatter)
    for features, labels in batches:
        moments.update(features, labels)
    return moments


def split(pair: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pair[0].split(sizes), pair[1].split(sizes), strict=True))


def check(moments: ClassMoments, expected: dict[str, np.ndarray], rtol: float = 1e-10) -> None:
    for name, value in expected.items():
        scale = np.nanmax(np.abs(value))
        found = getattr(moments, name).double().numpy()
        np.testing.assert_allclose(found, value, rtol=rtol, atol=1e-3 * rtol * scale, err_msg=name)


@pytest.mark.parametrize("sizes", [[60], [1, 59], [7, 0, 30, 23], [1] * 60])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_any_split_is_two_passes(sizes: list[int], offset: float) -> None:
    pair = labelled(offset=offset)
    check(fed(*split(pair, sizes)), naive(*pair), 1e-9)


@pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-6])
def test_tiny_scatter_beside_the_class_distance(noise: float) -> None:
    pair = labelled(noise=noise)
    check(fed(*split(pair, [13, 20, 27])), naive(*pair), 1e-8)


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_tiny_scatter_in_single_precision(offset: float) -> None:
    # the inputs are rounded first, so that only what the sums lose is seen
    features, labels = labelled(noise=1e-4, offset=offset)
    single = features.float()
    moments = fed(*split((single, labels), [20, 20, 20]), dtype=torch.float32)
    expected = naive(single.double(), labels)["within_traces"]
    assert moments.square.dtype == torch.float32
    np.testing.assert_allclose(moments.within_traces.numpy(), expected, rtol=1e-5)


def test_without_scatter() -> None:
    pair = labelled()
    moments = fed(*split(pair, [25, 35]), scatter=False)
    expected = naive(*pair)
    del expected["within_scatter"]
    check(moments, expected)
    assert moments.second.shape == moments.within_scatter.shape == (0, 0)
    twice = {name: 2 * expected[name] for name in ("count", "within_traces")}
    check(moments.merge(fed(pair, scatter=False)).reduce(), twice)


def test_global_means() -> None:
    features, labels = labelled()
    moments = fed((features, labels))
    torch.testing.assert_close(moments.global_mean("samples"), features.mean(dim=0))
    means = moments.means[[0, 1, 2, 4]]
    torch.testing.assert_close(moments.global_mean(), means.mean(dim=0))
    assert ClassMoments(C, D).global_mean().isnan().all()


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
def test_merge_of_streams_with_different_anchors(offset: float) -> None:
    first, second = labelled(), labelled(offset=offset, seed=1)
    second = (second[0][:40], second[1][:40].clamp_max(1) + 2)  # one common class, one that only this stream has
    expected = naive(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    check(fed(*split(first, [10, 50])).merge(fed(second)), expected, 1e-9)
    check(fed(second).merge(fed(first)), expected, 1e-9)
    check(fed(first).merge(fed(second)).reduce(), expected, 1e-9)


def test_merge_leaves_both_alone_and_nothing_adds_nothing() -> None:
    pair = labelled()
    first, second = fed(pair), fed(labelled(seed=1))
    before = [{k: v.clone() for k, v in m.states().items()} for m in (first, second)]
    first.merge(second)
    first.reduce()
    for moments, states in zip((first, second), before, strict=True):
        assert all(torch.equal(states[name], state) for name, state in moments.states().items())
    check(first.merge(ClassMoments(C, D)), naive(*pair))
    check(ClassMoments(C, D).merge(first), naive(*pair))


def test_growing_number_of_classes() -> None:
    features, labels = labelled()
    old = labels < 2
    small = ClassMoments(2, D)
    small.update(features[old], labels[old])
    grown = small.grow(C)
    grown.update(features[~old], labels[~old])
    check(grown, naive(features, labels))
    assert len(small.count) == 2
    assert small.grow(1) is small
    rest = fed((features[~old], labels[~old]))
    again = ClassMoments(2, D)
    again.update(features[old], labels[old])
    check(again.merge(rest), naive(features, labels))
    check(rest.merge(again), naive(features, labels))


def test_bad_rows_and_labels_are_counted_and_left_out() -> None:
    features, labels = labelled()
    features[3, 1], features[20], features[5] = torch.nan, torch.inf, -torch.inf
    labels[5] = labels[6] = -100  # a bad row that is ignored is ignored
    labels[7], labels[8], labels[9] = C, -1, 10**12
    moments = fed(*split((features, labels), [1, 9, 50]))
    keep = features.isfinite().all(dim=1) & (labels >= 0) & (labels < C)
    check(moments, naive(features[keep], labels[keep]))
    assert [moments.ignored, moments.invalid, moments.nonfinite] == [2, 3, 2]
    assert moments.count.sum() == N - 7
    twice = moments.merge(moments).reduce()
    assert [twice.ignored, twice.invalid, twice.nonfinite] == [4, 6, 4]


def test_the_anchor_waits_for_a_row_that_counts() -> None:
    features, labels = labelled(offset=1e6)
    moments = fed((torch.full((4, D), torch.nan), torch.tensor([0, 1, 2, 3])), (features, labels))
    torch.testing.assert_close(moments.shift[0], features[labels == 0].mean(dim=0), rtol=1e-14, atol=0)
    assert not moments.shift[3].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_summed_in_double(dtype: torch.dtype) -> None:
    features, labels = labelled()
    half = features.to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            moments = fed(*split((half, labels.to(torch.int32)), [30, 30]))
            check(moments, naive(half.double(), labels))
            check(moments.merge(moments), naive(half.double().repeat(2, 1), labels.repeat(2)))


def test_states_are_all_there_is() -> None:
    pair = labelled()
    states = pickle.loads(pickle.dumps(fed(*split(pair, [20, 40])[:1]).states()))
    restored = ClassMoments.from_states(states)
    restored.update(pair[0][20:], pair[1][20:])
    check(restored, naive(*pair))


def test_another_ignore_index() -> None:
    moments = ClassMoments(2, 1, ignore_index=0)
    moments.update(torch.ones(3, 1), torch.tensor([0, 1, -100]))
    assert [moments.count.tolist(), moments.ignored.item(), moments.invalid.item()] == [[0, 1], 1, 1]
    assert moments.merge(moments).grow(5).ignore_index == 0


def test_no_graph_is_kept() -> None:
    features, labels = labelled()
    moments = fed((features.requires_grad_(), labels))
    assert not any(state.requires_grad for state in moments.states().values())


def test_nothing_waits_for_the_device() -> None:
    # fake tensors have no values: whoever asks for one raises
    with FakeTensorMode():
        moments = ClassMoments(C, D)
        moments.update(torch.randn(9, D), torch.randint(C, (9,)))
        reduced = moments.merge(moments).grow(C + 2).reduce()
        assert reduced.means.shape == (C + 2, D)
        assert reduced.within_scatter.shape == (D, D)
        with pytest.raises(DataDependentOutputException):
            bool(reduced.count.sum() > 0)


def test_bad_arguments() -> None:
    moments = ClassMoments(C, D)
    for shape, labels in (((3, 5), 3), ((3,), 3), ((3, D), 2), ((2, 3, D), 2)):
        with pytest.raises(ValueError, match=r"Expected `features` of shape \(N, 4\) and `labels` of shape \(N,\)"):
            moments.update(torch.zeros(shape), torch.zeros(labels, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`labels` must be integers, got torch\.float32"):
        moments.update(torch.zeros(3, D), torch.zeros(3))
