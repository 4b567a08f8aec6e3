"""Prototypes of classes: moments, limits and draws, against loops in ``float64``."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import prototypes
from lightning_collapse.functional.prototypes import (
    compatibility,
    compatibility_weight,
    cross_recall,
    fetril_features,
    prototype_logits,
    sample_prototypes,
    sampling_probabilities,
    teen_calibrate,
)

F64 = torch.float64


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_translated_rows_have_the_mean_of_the_old_class_and_the_covariance_of_the_donor() -> None:
    labels = torch.tensor([7, 4, 7, 7, 4, 9, 4, 9, 7, -100])
    features, means = rows(0, 10, 4) + labels.unsqueeze(1), rows(1, 3, 4) + torch.tensor([[4.0], [8.5], [7.2]])
    found, old = fetril_features(features, labels, means)
    for k in range(3):
        own = {c: features[labels == c] for c in (4, 7, 9)}
        donor = own[min(own, key=lambda c: torch.dist(own[c].mean(dim=0), means[k]).item())]
        mine = found[old == k]
        torch.testing.assert_close(mine.mean(dim=0), means[k], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(torch.cov(mine.T), torch.cov(donor.T), rtol=1e-12, atol=1e-14)
        assert len(mine) == len(donor)


def test_division_by_the_length_moves_the_mean() -> None:
    mean = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=F64)
    found, _ = fetril_features(rows(10, 50, 4), torch.zeros(50, dtype=torch.long), mean)
    torch.testing.assert_close(found.mean(dim=0), mean[0])
    assert (torch.nn.functional.normalize(found, dim=1).mean(dim=0) - mean[0]).norm() > 0.2


def test_translation_leaves_out_what_is_no_number_and_passes_gradients() -> None:
    features, labels = rows(2, 6, 3), torch.tensor([0, 0, 1, 1, 1, 0])
    features[5] = torch.nan
    found, old = fetril_features(features.requires_grad_(), labels, torch.zeros(1, 3, dtype=F64))
    assert found.isfinite().all()
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(3, dtype=F64), rtol=0, atol=1e-15)
    found.sum().backward()
    assert features.grad.sum() == 3 * len(old)
    half, _ = fetril_features(features.detach()[:5].half(), labels[:5], torch.zeros(1, 3).half())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_calibration_is_the_formula(share: float) -> None:
    new, base = rows(3, 2, 5), rows(4, 4, 5)
    found = teen_calibrate(new, base, share, 16.0)
    for c in range(2):
        scores = np.exp(16 * unit(base.numpy()) @ unit(new[c].numpy()))
        mixed = (scores / scores.sum()) @ base.numpy()
        expected = (1 - share) * new[c].numpy() + share * unit(mixed)
        assert found[c].numpy() == pytest.approx(expected, rel=1e-12)
    if share == 0.0:
        assert torch.equal(found, new)


def test_limits_of_calibration() -> None:
    new, base = rows(3, 2, 5), rows(4, 4, 5)
    nearest = (unit(new.numpy()) @ unit(base.numpy()).T).argmax(axis=1)
    sharp = teen_calibrate(new, base, share=1.0, temperature=1e6)
    assert sharp.numpy() == pytest.approx(unit(base.numpy())[nearest], rel=1e-9)
    unseen = torch.cat([base, torch.full((1, 5), torch.nan, dtype=F64)])
    torch.testing.assert_close(teen_calibrate(new, unseen), teen_calibrate(new, base))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_logits_are_distances_and_cosines(distance: str) -> None:
    x, means = rows(5, 6, 4) + 1000, rows(6, 3, 4) + 1000  # a mean a thousand times the spread
    found = prototype_logits(x, means, distance, temperature=0.5)
    for i in range(6):
        for c in range(3):
            a, b = x[i].numpy(), means[c].numpy()
            exact = -np.sum((a - b) ** 2) if distance == "euclidean" else unit(a) @ unit(b)
            assert found[i, c].item() == pytest.approx(exact / 0.5, rel=1e-9)
    if distance == "euclidean":
        torch.testing.assert_close(
            prototype_logits(x.float(), means.float(), distance).double(), found / 2, rtol=1e-3, atol=0
        )
    assert torch.equal(prototype_logits(x.view(2, 3, 4), means, distance, 0.5).view(6, 3), found)
    unseen = torch.cat([means[:1], torch.full((1, 4), torch.nan, dtype=F64), means[1:]])
    again = prototype_logits(x, unseen, distance, temperature=0.5)
    assert (again[:, 1] == -torch.inf).all()
    torch.testing.assert_close(again[:, [0, 2, 3]], found)
    x.requires_grad_()
    prototype_logits(torch.cat([x, 0 * x]), unseen, distance).softmax(dim=1)[:, 0].sum().backward()
    assert x.grad.isfinite().all()


def test_classes_that_are_near_others_are_drawn_more_often() -> None:
    means = rows(7, 5, 3)
    cosines = unit(means.numpy()) @ unit(means.numpy()).T
    hardness = np.array([sum(cosines[c, k] for k in range(5) if k != c) / 4 for c in range(5)])
    expected = np.exp(hardness / 0.1) / np.exp(hardness / 0.1).sum()
    assert sampling_probabilities(means).numpy() == pytest.approx(expected, rel=1e-9)
    assert sampling_probabilities(means, 1e9).numpy() == pytest.approx(np.full(5, 0.2), rel=1e-6)
    nan = torch.full((1, 3), torch.nan, dtype=F64)
    unseen = sampling_probabilities(torch.cat([nan, means, nan]))
    assert unseen.numpy() == pytest.approx(np.concatenate([[0], expected, [0]]), rel=1e-9)
    assert sampling_probabilities(nan).tolist() == [0.0]
    assert sampling_probabilities(means[:1]).tolist() == [1.0]


def test_draws_have_the_published_law_and_leave_the_global_generator_alone() -> None:
    nan = torch.full((1, 3), torch.nan, dtype=F64)
    means = torch.cat([nan, rows(7, 4, 3), nan])
    state, n = torch.get_rng_state(), 20_000
    found, labels = sample_prototypes(means, 0.3, n, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    probabilities = sampling_probabilities(means)
    shares = torch.bincount(labels, minlength=6) / n
    deviation = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((shares - probabilities).abs() <= 4 * deviation).all()  # exactly 0 where nobody has seen a class
    noise = (found - means[labels]) / 0.3
    assert noise.mean().abs() < 4 / (3 * n) ** 0.5
    assert (noise.square().mean() - 1).abs() < 4 * (2 / (3 * n)) ** 0.5
    again = sample_prototypes(means, torch.tensor(0.3, dtype=F64), n, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], found)
    assert torch.equal(again[1], labels)


def test_compatibility_by_hand() -> None:
    scores = torch.tensor([[0.6, 9.0, 9.0], [0.65, 0.7, torch.nan], [0.5, 0.75, 0.8]], dtype=F64)
    found = compatibility(scores)
    assert [value.item() for value in found] == pytest.approx([2 / 3, -0.025, -0.05])
    assert compatibility(torch.full((4, 4), 0.5)).average.item() == 1.0  # ties are compatible
    unknown = scores.clone()
    unknown[2, 0] = torch.nan
    assert [value.isnan().item() for value in compatibility(unknown)] == [True, True, False]
    assert all(value.isnan() for value in compatibility(scores[:1, :1]))
    with pytest.raises(ValueError, match=r"`scores` must have shape \(T, T\), .* got \(2, 3\)"):
        compatibility(scores[:2])
    assert compatibility_weight(20, 45) == pytest.approx(20 / 3)
    with pytest.raises(ValueError, match="`old` must be an integer of at least 1, got 0"):
        compatibility_weight(20, 0)


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_recall_between_models_is_the_nearest_row(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_recall.__wrapped__.__wrapped__.__globals__, "BLOCK", block)
    x, y, labels = rows(8, 30, 3), rows(9, 30, 3) + 0.5 * rows(8, 30, 3), torch.arange(30) % 4
    for same in (False, True):
        hits = []
        for i in range(30):
            cosines = unit(y.numpy()) @ unit(x[i].numpy())
            if same:
                cosines[i] = -np.inf
            hits.append(labels[cosines.argmax()] == labels[i])
        found = cross_recall(x, labels, 5 * y, labels, same_rows=same)
        assert found.item() == pytest.approx(float(np.mean(hits)))
    assert cross_recall(x[:0], labels[:0], y, labels).isnan()


def test_bad_input_is_named() -> None:
    x, means = torch.randn(4, 3), torch.randn(2, 3)
    labels = torch.tensor([0, 0, 1, 1])
    for call, name in (
        (lambda m: fetril_features(m, labels, means), "features"),
        (lambda m: prototype_logits(x, m), "prototypes"),
        (lambda m: teen_calibrate(m, means), "new"),
        (lambda m: cross_recall(x, labels, m, labels[: len(m)]), "gallery"),
    ):
        for wrong in (torch.randn(2, 5), torch.empty(0, 3), torch.ones(2, 3, dtype=torch.long)):
            with pytest.raises(ValueError, match=rf"`{name}` must be floating point .* got .*{wrong.shape[1]}\). Make"):
                call(wrong)
    with pytest.raises(ValueError, match=r"`means` must be floating point .* got torch.float32 of shape \(0, 3\)"):
        fetril_features(x, labels, torch.empty(0, 3))
    for wrong in ((labels[:2], labels), (labels, labels[:2])):
        with pytest.raises(ValueError, match=r"abels` must have shape \(4,\), one per row, got \(2,\)"):
            cross_recall(x, wrong[0], x, wrong[1])
    with pytest.raises(ValueError, match=r"`prototypes` must be floating point"):
        sample_prototypes(torch.empty(0, 3), 0.1, 4)
    with pytest.raises(ValueError, match=r"got NaN for \[1\]: nobody has seen them. Leave"):
        fetril_features(x, labels, torch.tensor([[1.0] * 3, [torch.nan] * 3]))
    with pytest.raises(ValueError, match=r"`labels` must be integers of shape \(4,\).* got torch.float32"):
        fetril_features(x, labels.float(), means)
    with pytest.raises(ValueError, match="`labels` must name a class of one finite row at least, got 4"):
        fetril_features(x, labels - 100, means)
    with pytest.raises(ValueError, match=r"`share` must be between 0 and 1, got 1\.5"):
        teen_calibrate(x, means, share=1.5)
    for call in (lambda t: teen_calibrate(x, means, temperature=t), lambda t: sampling_probabilities(x, t)):
        with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
            call(0.0)
    with pytest.raises(ValueError, match=r"`distance` must be one of \('euclidean', 'cosine'\), got 'l1'"):
        prototype_logits(x, means, "l1")
    with pytest.raises(ValueError, match=r"`radius` must not be negative, got -1"):
        sample_prototypes(means, -1.0, 4)
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1, got 0"):
        sample_prototypes(means, 1.0, 0)
    with pytest.raises(ValueError, match="`same_rows` needs as many rows in both, got 4 and 2"):
        cross_recall(x, labels, means, labels[:2], same_rows=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_and_without_autocast(dtype: torch.dtype) -> None:
    x, means = rows(5, 6, 4).to(dtype), rows(6, 3, 4).to(dtype)

    def calls() -> list[Tensor]:
        return [
            prototype_logits(x, means),
            teen_calibrate(x, means),
            sampling_probabilities(means),
            sample_prototypes(means, 0.1, 5, torch.Generator().manual_seed(0))[0],
        ]

    off = calls()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        on = calls()
    assert all(value.dtype == torch.float32 for value in off)
    assert all(map(torch.equal, on, off))


def test_all_names_are_there() -> None:
    assert all(callable(getattr(prototypes, name)) for name in prototypes.__all__)
