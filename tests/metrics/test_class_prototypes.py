"""Class prototypes that grow: means and radius of all rows, however they arrive, and a head made of them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.metrics import ClassPrototypes

D = 4


def data(normalized: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 5, 2, 2, 0, 5, 5, 2, 0, 0, -100, 2])
    features = torch.randn(12, D, generator=generator, dtype=torch.float64) + labels.unsqueeze(1).clamp_min(0)
    return features, labels


def naive(features: Tensor, labels: Tensor, normalize: bool) -> tuple[np.ndarray, float]:
    x, y = features.numpy(), labels.numpy()
    if normalize:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    means = np.full((6, D), np.nan)
    traces = []
    for c in (0, 2, 5):
        means[c] = x[y == c].mean(axis=0)
        traces.append(np.trace(np.cov(x[y == c].T, bias=True)))
    return means, float(np.sqrt(np.mean(traces) / D))


@pytest.mark.parametrize("normalize", [False, True])
def test_means_and_radius_of_any_split(normalize: bool) -> None:
    features, labels = data()
    means, radius = naive(features, labels, normalize)
    for split in ([12], [1] * 12, [0, 5, 0, 7]):
        metric = ClassPrototypes(D, normalize)
        for x, y in zip(features.split(split), labels.split(split), strict=True):
            metric.update(x, y)
        found = metric.compute()
        np.testing.assert_allclose(found["prototypes"].numpy(), means, rtol=1e-12)
        assert found["radius"].item() == pytest.approx(radius, rel=1e-12)
        assert metric.count.tolist() == [4, 0, 4, 0, 0, 3]


def test_merging_with_one_that_has_seen_other_classes() -> None:
    features, labels = data()
    for first, second in ((labels == 5, labels != 5), (labels != 5, labels == 5)):
        metric, other = ClassPrototypes(D), ClassPrototypes(D)
        metric.update(features[first], labels[first])
        other.update(features[second], labels[second])
        metric.merge_state(other)
        np.testing.assert_allclose(
            metric.compute()["prototypes"].numpy(), naive(features, labels, False)[0], rtol=1e-12
        )
    for wrong in (ClassPrototypes(D + 1), {"count": 1}):
        with pytest.raises(ValueError, match="must be a `ClassPrototypes` metric, or its states, of `dim=4`, got"):
            metric.merge_state(wrong)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_it_saves_what_it_has_grown_to() -> None:
    metric, restored = ClassPrototypes(D), ClassPrototypes(D)
    metric.update(*data())
    for each in (metric, restored):
        each.persistent(True)
    restored.load_state_dict(metric.state_dict())
    assert torch.equal(restored.compute()["prototypes"].nan_to_num(), metric.compute()["prototypes"].nan_to_num())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_head_of_means(normalize: bool, dtype: torch.dtype) -> None:
    features, labels = data()
    head = ClassPrototypes(D, normalize)
    head.update(features.to(dtype), labels)
    logits = head.logits(features.to(dtype))
    assert logits.dtype == torch.float32
    assert (logits[:, [1, 3, 4]] == -torch.inf).all()  # nobody has seen these
    means, _ = naive(features.to(dtype).double(), labels, normalize)
    for row, choice in zip(features.to(dtype).double().numpy(), head.predict(features.to(dtype)), strict=True):
        row = row / np.linalg.norm(row) if normalize else row
        unit = means / np.linalg.norm(means, axis=1, keepdims=True) if normalize else means
        assert choice == np.nanargmin(np.linalg.norm(unit - row, axis=1))
    head.update(torch.full((3, D), -9.0, dtype=dtype), torch.tensor([7, 7, 7]))  # the head grows
    assert head.logits(features.to(dtype)).shape == (12, 8)


def test_rows_that_name_no_class_before_any_has_come() -> None:
    head = ClassPrototypes(D)
    head.update(torch.ones(2, D), torch.tensor([-100, -1]))
    assert head.compute()["prototypes"].isnan().all()
    assert head.compute()["radius"].isnan()
    head.update(*data())
    np.testing.assert_allclose(head.compute()["prototypes"].numpy(), naive(*data(), False)[0], rtol=1e-12)


def test_one_class_of_one_feature() -> None:
    head = ClassPrototypes(1)
    head.update(torch.ones(2, 1), torch.tensor([0, 0]))
    assert head.predict(torch.zeros(3, 1)).tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="`dim` is the number of features and must be positive, got 0"):
        ClassPrototypes(0)
    head = ClassPrototypes(D, room=10)
    with pytest.raises(ValueError, match=r"got torch.float64 of shape \(0, 4\)"):
        head.logits(torch.ones(2, D))
    with pytest.raises(ValueError, match=r"`labels` name class 1000000, and there is room for 10. .* `room=1000001`"):
        head.update(torch.ones(2, D), torch.tensor([0, 1_000_000]))
    with pytest.raises(ValueError, match=r"`features` of shape \(N, 4\)"):
        head.update(torch.ones(2, D + 1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"`labels` must be integers, got torch.float32"):
        head.update(torch.ones(2, D), torch.ones(2))
