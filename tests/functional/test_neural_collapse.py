"""Measures of neural collapse against closed forms and against their formulas written out with numpy."""

import math
from importlib import import_module
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_collapse.functional import (
    between_rank,
    bias_collapse,
    cdnv,
    etf_error,
    etf_error_floor,
    gnc2,
    gof_error,
    nc1,
    nc1_null,
    nc2_equiangular,
    nc2_equinorm,
    nc3,
    nc4,
    nc5,
    nearest_class_center,
    neco_score,
    norm_count_slope,
    orthogonal_frame,
    unc3,
    vci,
)
from lightning_collapse.spectral import ClassMoments

C, D, A, S = 10, 64, 3.0, 0.5
F64 = torch.float64


def simplex(classes: int = C, dim: int = D, norm: float = A) -> Tensor:
    """Rows of a simplex equiangular tight frame, in a random orientation."""
    frame = torch.eye(classes, dtype=F64) - 1 / classes
    frame = frame / frame.norm(dim=1, keepdim=True) * norm
    wide = torch.randn(max(classes, dim), max(classes, dim), dtype=F64, generator=torch.Generator().manual_seed(3))
    return frame @ torch.linalg.qr(wide)[0][:classes, :dim] if classes <= dim else frame


def close(found: Tensor, expected: float, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    assert found.dtype == F64
    assert found.item() == pytest.approx(expected, rel=rtol, abs=atol, nan_ok=True)


def data(
    classes: int = 6, dim: int = 9, n: int = 400, noise: float = 1.0, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Unbalanced classes with unequal, skewed scatter."""
    generator = torch.Generator().manual_seed(5)
    labels = (torch.rand(n, generator=generator) ** 2 * classes).long()
    centers = torch.randn(classes, dim, generator=generator, dtype=F64)
    spread = torch.rand(n, dim, generator=generator, dtype=F64).log() * (1 + labels.unsqueeze(1))
    return centers[labels] + noise * spread + offset, labels


class Naive:
    """Everything in two passes over the rows, by the formulas; a class without rows is dropped first."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        x, y = features.double().numpy(), labels.numpy()
        self.classes = np.unique(y)
        self.x, self.n = x, np.array([(y == c).sum() for c in self.classes])
        self.means = np.stack([x[y == c].mean(axis=0) for c in self.classes])
        centered = x - self.means[np.searchsorted(self.classes, y)]
        self.within = sum(np.outer(r, r) for r in centered) / len(x)
        self.variances = np.array([(centered[y == c] ** 2).sum() / (y == c).sum() for c in self.classes])
        self.m = self.means - self.means.mean(axis=0)
        self.between = self.m.T @ self.m / len(self.classes)
        self.pairs = list(combinations(range(len(self.classes)), 2))

    def unit(self, rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def nc1(self) -> float:
        return np.trace(self.within @ np.linalg.pinv(self.between, rcond=1e-12, hermitian=True)) / len(self.classes)

    def nc2(self) -> tuple[float, float, float]:
        norms, k = np.linalg.norm(self.m, axis=1), len(self.classes)
        cosines = self.unit(self.m) @ self.unit(self.m).T
        angles = np.mean([abs(cosines[i, j] + 1 / (k - 1)) for i in range(k) for j in range(k) if i != j])
        gram, frame = self.m @ self.m.T, (np.eye(k) - 1 / k) / np.sqrt(k - 1)
        return norms.std(ddof=1) / norms.mean(), angles, np.linalg.norm(gram / np.linalg.norm(gram) - frame)

    def cdnv(self, debiased: bool = False) -> np.ndarray:
        values = []
        variances = self.variances * self.n / (self.n - 1) if debiased else self.variances
        for i, j in self.pairs:
            distance = ((self.means[i] - self.means[j]) ** 2).sum()
            distance -= variances[i] / self.n[i] + variances[j] / self.n[j] if debiased else 0
            values.append((variances[i] + variances[j]) / (2 * distance))
        return np.array(values)

    def vci(self) -> float:
        total = np.cov(self.x.T, bias=True)
        m = self.means - self.x.mean(axis=0)
        between = (m.T * self.n) @ m / self.n.sum()
        return 1 - np.trace(np.linalg.pinv(total) @ between) / min(m.shape[1], len(m) - 1)


def statistics(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means, covariance within, variances and counts, from one pass in batches."""
    moments = ClassMoments(classes, features.shape[1])
    for x, y in zip(features.split(37), labels.split(37), strict=True):
        moments.update(x, y)
    n = moments.count
    return moments.means, moments.within_scatter / n.sum(), moments.within_traces / n.clamp_min(1), n


def test_simplex_with_isotropic_scatter() -> None:
    means, within, variances = simplex(), S**2 * torch.eye(D, dtype=F64), torch.full((C,), D * S**2, dtype=F64)
    close(nc1(means, within), 0.225)
    close(nc1(means, within, per_class=False), 2.25)
    close(nc1(means, within, method="quotient"), D * S**2 / A**2)
    close(nc1(means, within.trace(), method="quotient"), 16 / 9)
    close(vci(means, within), 0.2)
    pairs = cdnv(means, variances)
    close(pairs.mean, 0.8)
    close(pairs.median, 0.8)
    close(pairs.mean_log, math.log(0.8))
    assert [pairs.pairs, pairs.unresolved] == [45, 0]
    close(nc2_equinorm(means), 0.0, atol=1e-12)
    close(nc2_equiangular(means), 0.0, atol=1e-12)
    close(etf_error(means), 0.0, atol=1e-12)
    close(gnc2(means).mean, -0.5 * math.log(2 * C / (C - 1)))
    close(gnc2(means).variance, 0.0)
    close(gof_error(means), 1 / (C - 1))
    close(between_rank(means), C - 1)


def test_collapsed_onto_a_simplex() -> None:
    means = simplex()
    weight, within = 2 * means, torch.zeros(D, D, dtype=F64)
    assert nc1(means, within) == vci(means, within).round(decimals=12) == 0
    assert cdnv(means, torch.zeros(C, dtype=F64)).mean == 0
    close(nc3(means, weight), 0.0)
    close(nc3(means, weight, method="distance"), 0.0, atol=1e-12)
    close(nc3(means, weight, method="simplex"), 0.0, atol=1e-12)
    close(unc3(means, weight), 0.0)
    close(nc3(means, -weight), 4.0)
    assert nc4(means, means @ weight.T, means) == 0
    assert torch.equal(nearest_class_center(means, means), torch.arange(C))


@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("noise", [1.0, 1e-4])
@pytest.mark.parametrize("shape", [(6, 9), (12, 5)], ids=["C < D", "C > D"])
def test_one_pass_is_the_formulas_in_two(shape: tuple[int, int], noise: float, offset: float) -> None:
    classes, dim = shape
    features, labels = data(classes, dim, noise=noise, offset=offset)
    labels[labels == 2] = 1  # class 2 is missing, and so is the last one
    means, within, variances, counts = statistics(features, labels, classes + 1)
    naive, rtol = Naive(features, labels), 1e-7
    close(nc1(means, within, counts), naive.nc1(), rtol)
    close(nc1(means, within, counts, method="quotient"), np.trace(naive.within) / np.trace(naive.between), rtol)
    norms, angles, frame = naive.nc2()
    close(nc2_equinorm(means, counts), norms, rtol)
    close(nc2_equiangular(means, counts), angles, rtol)
    close(etf_error(means, counts), frame, rtol)
    for debiased in (False, True):
        values, found = naive.cdnv(debiased), cdnv(means, variances, counts, debiased)
        resolved = values > 0  # the others are not further apart than their noise
        close(found.median, np.sort(np.where(resolved, values, np.inf))[(len(values) - 1) // 2], rtol)
        assert [found.pairs, found.unresolved] == [len(values), (~resolved).sum()]
        values = values[resolved]
        close(found.mean, values.mean(), rtol)
        close(found.mean_log, np.log(values).mean(), rtol)
    close(vci(means, within, counts), naive.vci(), rtol, atol=1e-7)
    distances = [np.linalg.norm(a - b) for a, b in combinations(naive.unit(naive.m), 2)]
    close(gnc2(means, counts).mean, -np.log(distances).mean(), rtol)
    close(gnc2(means, counts).variance, np.log(distances).var(), rtol)
    cosines = [abs(a @ b) for a, b in combinations(naive.unit(naive.means), 2)]
    close(gof_error(means, counts), np.mean(cosines), rtol)
    close(between_rank(means, counts), min(len(naive.m) - 1, dim))
    weight = torch.randn(classes + 1, dim, dtype=F64)
    w, ood = weight.numpy()[naive.classes], weight.sum(dim=0)
    difference = w / np.linalg.norm(w) - naive.m / np.linalg.norm(naive.m)
    close(nc3(means, weight, counts), (difference**2).sum(), rtol)
    product, k = w @ naive.m.T, len(w)
    product = product / np.linalg.norm(product) - (np.eye(k) - 1 / k) / np.sqrt(k - 1)
    close(nc3(means, weight, counts, method="simplex"), np.linalg.norm(product), rtol)
    close(unc3(means, weight, counts), (naive.unit(w) * naive.unit(naive.m)).sum(axis=1).var(), rtol)
    stranger = ood.numpy() / np.linalg.norm(ood.numpy())
    close(nc5(means, ood, counts), np.abs(naive.unit(naive.means) @ stranger).mean(), rtol)
    slope = np.polyfit(np.log(naive.n), np.log(np.linalg.norm(naive.means, axis=1)), 1)[0]
    close(norm_count_slope(means, counts), slope, rtol)


@pytest.fixture(scope="module")
def trained() -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and classifier of a network that has learned scikit-learn's digits; some units are dead."""
    images, targets = load_digits(return_X_y=True)
    x, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(targets)
    generator = torch.Generator().manual_seed(0)
    first, head = torch.nn.Linear(64, 48), torch.nn.Linear(48, 10)
    for weight in (first.weight, head.weight):
        torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
    for bias in (first.bias, head.bias):
        torch.nn.init.zeros_(bias)
    with torch.no_grad():
        first.bias[:4] = -100
    optimizer = torch.optim.Adam([*first.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(first(x).relu()), labels).backward()
        optimizer.step()
    return first(x).relu().detach(), labels, head.weight.detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [37, 1797])
def test_features_of_a_trained_network(trained: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, batch: int) -> None:
    features, labels, weight = trained[0].to(dtype), trained[1], trained[2]
    assert (features == 0).all(dim=0).sum() >= 4
    moments = ClassMoments(10, 48)
    for x, y in zip(features.split(batch), labels.split(batch), strict=True):
        moments.update(x, y)
    means, counts = moments.means, moments.count
    within, variances = moments.within_scatter / counts.sum(), moments.within_traces / counts
    naive, rtol = Naive(features, labels), 1e-9
    close(nc1(means, within, counts), naive.nc1(), rtol)
    for found, expected in zip(
        (nc2_equinorm(means), nc2_equiangular(means), etf_error(means)), naive.nc2(), strict=True
    ):
        close(found, expected, rtol)
    close(cdnv(means, variances, counts).mean, naive.cdnv().mean(), rtol)
    close(vci(means, within, counts), naive.vci(), rtol)
    w = weight.double().numpy()
    difference = w / np.linalg.norm(w) - naive.m / np.linalg.norm(naive.m)
    close(nc3(means, weight, counts), (difference**2).sum(), rtol)
    assert nc1(means, within, counts) < nc1_null(1797, 10, 48) / 20  # it has learned


def test_vci_of_a_singular_scatter() -> None:
    features, labels = data(4, 6)
    expected = vci(*statistics(features, labels, 4)[:2], statistics(features, labels, 4)[3])
    dead = torch.zeros(len(features), 3, dtype=F64)
    faint = 1e-9 * torch.randn(dead.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    repeated = features[:, :2] @ torch.randn(2, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    for extra in (dead, dead + 7.3, repeated, faint):
        means, within, _, counts = statistics(torch.cat([extra, features], dim=1), labels, 4)
        close(vci(means, within, counts) * 3, expected.item() * 3, 1e-6)


def test_nearest_centers_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = data()
    means = statistics(features, labels, 6)[0]
    expected = nearest_class_center(features, means)
    monkeypatch.setattr(import_module("lightning_collapse.functional.neural_collapse.nc4"), "BLOCK", 50)
    assert torch.equal(nearest_class_center(features, means), expected)
    assert nearest_class_center(features[:0], means).shape == (0,)


def test_mean_of_all_rows_as_the_global_mean() -> None:
    features, labels = data()
    means, within, _, counts = statistics(features, labels, 6)
    center, m = features.mean(dim=0), means - features.mean(dim=0)
    expected = (within @ torch.linalg.pinv(m.T @ m / 6, hermitian=True)).trace() / 6
    close(nc1(means, within, counts, center), expected.item())
    assert nc1(means, within, counts, center) != nc1(means, within, counts)
    assert between_rank(means, counts, center) == 5


def test_without_counts_all_classes_are_there() -> None:
    means, within, variances, counts = statistics(*data(), 6)
    assert nc1(means, within) == nc1(means, within, counts)
    assert cdnv(means, variances).mean == cdnv(means, variances, counts).mean
    means[2] = torch.nan  # a missing class of which nobody was told is not left out silently
    values = [nc1(means, within), nc2_equinorm(means), nc2_equiangular(means), etf_error(means), gof_error(means)]
    values += [vci(means, within), cdnv(means, variances).mean, cdnv(means, variances).median, gnc2(means).mean]
    assert all(value.isnan() for value in values)


def test_all_class_means_coincide() -> None:
    for means in (torch.ones(4, 3, dtype=F64), torch.full((4, 3), 0.1) * 1e3, torch.zeros(4, 3)):
        within, variances = torch.eye(3, dtype=F64), torch.ones(4, dtype=F64)
        values = [nc1(means, within), nc1(means, within, method="quotient"), nc2_equinorm(means), etf_error(means)]
        values += [
            nc2_equiangular(means),
            nc3(means, torch.randn(4, 3)),
            gnc2(means).variance,
            between_rank(means) + torch.nan,
        ]
        values += [nc1(means, torch.zeros(3, 3)), vci(means, torch.zeros(3, 3))]
        assert all(value.isnan() for value in values)
        pairs = cdnv(means, variances)
        assert pairs.mean.isnan()
        assert pairs.mean_log.isnan()
        assert pairs.median.isinf()
        assert pairs.pairs == pairs.unresolved == 6
        assert between_rank(means) == 0
        assert vci(means, within) == 1


def test_two_coincident_classes_are_counted() -> None:
    means = simplex()
    means[1] = means[0]
    pairs = cdnv(means, torch.ones(C, dtype=F64))
    assert [pairs.pairs, pairs.unresolved] == [45, 1]
    close(pairs.mean, 2 / (2 * 2 * A**2 * C / (C - 1)))
    assert between_rank(means) == C - 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_are_nan_and_no_error(bad: float) -> None:
    means, within, weight = simplex(), torch.eye(D, dtype=F64), torch.ones(C, D, dtype=F64)
    means[3, 2] = bad
    variances = torch.ones(C, dtype=F64)
    values = [nc1(means, within), nc1(simplex(), within * bad), vci(means, within), nc3(means, weight)]
    values += [nc2_equinorm(means), nc2_equiangular(means), etf_error(means), unc3(means, weight), gof_error(means)]
    values += [
        between_rank(means),
        gnc2(means).mean,
        gnc2(means).variance,
        nc5(means, weight[0]),
        cdnv(means, variances).mean,
    ]
    assert all(value.isnan() for value in values)


def test_one_class_or_none() -> None:
    for counts in (torch.tensor([0, 4, 0]), torch.zeros(3)):
        means, within, variances = torch.randn(3, 4), torch.eye(4), torch.ones(3)
        values = [nc1(means, within, counts), nc2_equinorm(means, counts), nc2_equiangular(means, counts)]
        values += [etf_error(means, counts), vci(means, within, counts), cdnv(means, variances, counts).mean]
        values += [cdnv(means, variances, counts).median, gnc2(means, counts).mean, gof_error(means, counts)]
        values += [norm_count_slope(means, counts), nc3(means, means, counts)]
        assert all(value.isnan() for value in values)


def test_tiles_change_nothing() -> None:
    means, _, variances, counts = statistics(*data(12, 5), 13)
    for tile in (1, 4, 12):
        close(nc2_equiangular(means, counts, tile=tile), nc2_equiangular(means, counts).item())
        close(gof_error(means, counts, tile=tile), gof_error(means, counts).item())
        close(gnc2(means, counts, tile=tile).variance, gnc2(means, counts).variance.item())
        for debiased in (False, True):
            whole, tiled = (cdnv(means, variances, counts, debiased, tile=t) for t in (100, tile))
            close(tiled.mean, whole.mean.item())
            close(tiled.mean_log, whole.mean_log.item())
            close(tiled.median, whole.median.item(), rtol=1 / 4000)
            assert tiled.pairs == whole.pairs


def test_median_in_tiles_of_extremes() -> None:
    means = simplex()
    assert cdnv(means, torch.zeros(C, dtype=F64), tile=3).median == 0
    assert cdnv(torch.ones(C, D, dtype=F64), torch.ones(C, dtype=F64), tile=3).median.isinf()


def test_more_classes_than_dimensions_meet_the_floor() -> None:
    # two orthogonal pairs of opposite directions are a tight frame
    means = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=F64)
    close(etf_error(means), etf_error_floor(4, 2), rtol=1e-7)
    assert etf_error_floor(11, 10) == 0
    assert etf_error_floor(29_233, 64) == pytest.approx(1.381, abs=1e-3)
    assert math.isnan(etf_error_floor(1, 4))


def test_features_without_structure_read_the_null() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 256, generator=generator, dtype=F64)
    means, within, variances, counts = statistics(features, torch.arange(2000) % 20, 20)
    assert nc1(means, within, counts).item() == pytest.approx(nc1_null(2000, 20, 256), rel=0.06)
    assert cdnv(means, variances, counts).mean.item() == pytest.approx(99 / 2, rel=0.06)
    assert vci(means, within, counts).item() == pytest.approx(1 - 256 / 1999, rel=0.02)
    assert vci(means, within, counts, adjusted=True).item() == pytest.approx(1, rel=0.02)
    assert math.isnan(nc1_null(1000, 128, 128))
    few = statistics(features[:100], torch.arange(100) % 5, 5)
    close(vci(few[0], few[1], few[3]), 0.0, atol=1e-9)
    assert vci(few[0], few[1], few[3], adjusted=True).isnan()


def test_debiased_cdnv_does_not_depend_on_the_number_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    means, found = simplex(), {}
    for n in (20, 500):
        labels = torch.arange(C * n) % C
        features = means[labels] + S * torch.randn(C * n, D, generator=generator, dtype=F64)
        centers, _, variances, counts = statistics(features, labels, C)
        found[n] = [cdnv(centers, variances, counts, debiased).mean.item() for debiased in (False, True)]
    assert found[500] == pytest.approx([0.8, 0.8], rel=0.02)
    assert found[20][1] == pytest.approx(0.8, rel=0.06)
    assert found[20][0] < 0.74  # few rows: their own mean is near them, and the means are far apart by chance


def test_classes_of_one_row_have_no_debiased_variance() -> None:
    means, variances = simplex(), torch.ones(C, dtype=F64)
    counts = torch.full((C,), 50)
    counts[[1, 4]] = 1
    assert cdnv(means, variances, counts, debiased=True).pairs == 28
    assert cdnv(means, variances, counts).pairs == 45


def test_orthogonal_frame() -> None:
    counts = torch.tensor([100, 50, 20, 5])
    frame = orthogonal_frame(counts, 1e-2, 1e-4)
    assert frame.weight.tolist() == pytest.approx([0.9825, 0.6896, 0.4297, 0.2061], abs=5e-5)
    assert frame.mean.tolist() == pytest.approx([0.9825, 1.3792, 2.1486, 4.1221], abs=5e-5)
    assert not frame.collapsed.any()
    strong = orthogonal_frame(counts, 1e-2, 3e-2)  # N^2 times both is 9.19
    assert strong.collapsed.tolist() == [False, False, False, True]
    assert strong.weight[3] == strong.mean[3] == 0
    means = torch.diag(frame.mean.sqrt())
    close(gof_error(means), 0.0)
    for values, sign in ((frame.weight, 1), (frame.mean, -1)):
        slope = norm_count_slope(torch.diag(values.sqrt()), counts)
        assert slope.item() == pytest.approx(sign / 4, abs=0.02)
    assert norm_count_slope(means, torch.full((4,), 7)).isnan()


def test_the_frame_is_where_gradient_descent_ends() -> None:
    counts, decay = torch.tensor([6, 3, 1]), (0.05, 0.02)
    labels = torch.repeat_interleave(torch.arange(3), counts)
    weight = torch.randn(3, 4, dtype=F64, requires_grad=True)
    features = torch.randn(4, 10, dtype=F64, requires_grad=True)
    target = torch.nn.functional.one_hot(labels, 3).T.to(F64)
    optimizer = torch.optim.LBFGS(
        [weight, features], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight @ features - target).square().sum() / 20
        loss = loss + decay[0] / 2 * weight.square().sum() + decay[1] / 2 * features.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    frame = orthogonal_frame(counts, *decay)
    torch.testing.assert_close(weight.detach().square().sum(dim=1), frame.weight, rtol=1e-5, atol=1e-6)
    means = torch.stack([features.detach().T[labels == c].mean(dim=0) for c in range(3)])
    torch.testing.assert_close(means.square().sum(dim=1), frame.mean, rtol=1e-5, atol=1e-6)


def test_bias() -> None:
    weight, bias, center = torch.randn(3, 4, dtype=F64), torch.randn(3, dtype=F64), torch.randn(4, dtype=F64)
    close(bias_collapse(weight, bias, center), np.linalg.norm(weight.numpy() @ center.numpy() + bias.numpy()))
    close(bias_collapse(weight, None, center), np.linalg.norm(weight.numpy() @ center.numpy()))


def test_nearest_center_far_from_the_origin_and_with_missing_classes() -> None:
    features, labels = data(offset=1e5)
    means, _, _, counts = statistics(features, labels, 8)
    kept = means[counts > 0]
    expected = torch.cdist(features, kept, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    assert torch.equal(nearest_class_center(features, means, counts), expected)
    logits = torch.randn(len(features), 8)
    features[4] = torch.nan
    logits[6, 2] = torch.nan
    rows = [i for i in range(len(features)) if i not in (4, 6)]
    disagree = (expected != logits.argmax(dim=1))[rows].double().mean()
    close(nc4(features, logits, means, counts), disagree.item())
    assert nc4(features[:0], logits[:0], means).isnan()


def test_neco() -> None:
    components = torch.eye(5, dtype=F64)[:, :2]
    features = torch.tensor([[3, 4, 0, 0, 0], [0, 0, 1, 2, 3], [1, 0, 0, 0, 1], [0] * 5, [math.inf] * 5], dtype=F64)
    expected = [1, 0, 0.5**0.5, math.nan, math.nan]
    assert neco_score(features, components).tolist() == pytest.approx(expected, nan_ok=True)
    scaled = neco_score(features, components, max_logit=torch.full((5,), 2.0, dtype=F64))
    assert scaled.tolist() == pytest.approx([2 * value for value in expected], nan_ok=True)
    assert neco_score(features[:1], components, mean=features[0]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_promoted(dtype: torch.dtype, autocast: bool) -> None:
    means, within, variances, counts = statistics(*data(), 6)
    weight = torch.randn(6, 9).to(dtype)
    means, within, variances = means.to(dtype), within.to(dtype), variances.to(dtype)
    wide = [tensor.double() for tensor in (means, within, variances, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, expected = (
            [
                *(
                    nc1(m, w, counts),
                    nc2_equinorm(m),
                    nc2_equiangular(m),
                    etf_error(m),
                    nc3(m, c),
                    unc3(m, c),
                    vci(m, w),
                ),
                *(*cdnv(m, v, counts, debiased=True)[:3], *gnc2(m), gof_error(m), nc5(m, c[0]), between_rank(m)),
            ]
            for m, w, v, c in ((means, within, variances, weight), wide)
        )
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(reference.item(), rel=1e-5, abs=1e-6)


def test_arguments_by_name() -> None:
    within = torch.eye(D, dtype=F64)
    close(nc1(counts=torch.ones(C), within=within, means=simplex()), nc1(simplex(), within).item())


def test_bad_arguments() -> None:
    means, within = torch.ones(4, 3), torch.eye(3)
    with pytest.raises(ValueError, match=r"`means` must have shape \(C, D\)"):
        nc2_equinorm(torch.ones(3))
    with pytest.raises(ValueError, match=r"`counts` \(C,\), got \(4, 3\) and \(3,\)"):
        etf_error(means, torch.ones(3))
    with pytest.raises(ValueError, match="`method` must be"):
        nc1(means, within, method="official")
    with pytest.raises(ValueError, match="`method` must be"):
        nc3(means, means, method="official")
    for measure in (nc1, vci):
        with pytest.raises(ValueError, match=r"`within` must have shape \(3, 3\), got \(4, 4\)"):
            measure(means, torch.eye(4))
    with pytest.raises(ValueError, match="`adjusted` needs `counts`"):
        vci(means, within, adjusted=True)
    with pytest.raises(ValueError, match="`debiased` needs `counts`"):
        cdnv(means, torch.ones(4), debiased=True)
    with pytest.raises(ValueError, match=r"`variances` must have shape \(4,\)"):
        cdnv(means, torch.ones(3))
    for measure in (nc3, unc3):
        with pytest.raises(ValueError, match="`weight` must have the shape of `means`"):
            measure(means, torch.ones(3, 3))
    with pytest.raises(ValueError, match="must be positive"):
        orthogonal_frame(torch.ones(3), 0.0, 1.0)
    with pytest.raises(ValueError, match="`features` must have shape"):
        nearest_class_center(torch.ones(2, 4), means)
    with pytest.raises(ValueError, match=r"`logits` must have shape \(2, 4\), got \(2, 3\)"):
        nc4(torch.ones(2, 3), torch.ones(2, 3), means)
    with pytest.raises(ValueError, match=r"`components` must have shape \(3, K\)"):
        neco_score(means, torch.ones(4, 2))


def normed(classes: int, dim: int, n: int) -> tuple[Tensor, Tensor]:
    """Features behind a LayerNorm: the direction of the reciprocals of its gain is null."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(classes).repeat(n)
    rows = torch.randn(classes, dim, generator=generator)[labels]
    rows = rows + 0.5 * torch.randn(len(labels), dim, generator=generator)
    gain, offset = 0.5 + torch.rand(2, dim, generator=generator, dtype=F64)
    return torch.nn.functional.layer_norm(rows.double(), (dim,), gain, offset), labels


def narrow(classes: int, dim: int, n: int) -> tuple[Tensor, Tensor]:
    """Features that a matrix of rank 5 spreads over more dimensions than there are classes."""
    features, labels = data(classes, 5, n * classes)
    return 0.3 + features @ torch.randn(5, dim, dtype=F64, generator=torch.Generator().manual_seed(6)), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "shape", "rank"),
    [(normed, (40, 16, 40), 15), (normed, (100, 64, 50), 63), (narrow, (12, 32, 60), 5), (narrow, (12, 300, 9), 5)],
    ids=["layer norm", "wide layer norm", "bottleneck", "wide bottleneck"],
)
def test_a_direction_of_rounding_is_not_inverted(make, shape, rank, dtype) -> None:
    """The inverse of a direction that only rounding fills would be most of NC1: 1.5 for 0.17."""
    features, labels = make(*shape)
    found = []
    for x in (features, features.to(dtype)):
        moments = ClassMoments(shape[0], shape[1])
        for rows, y in zip(x.split(100), labels.split(100), strict=True):
            moments.update(rows, y)
        means, within, counts = moments.means, moments.within_scatter / moments.count.sum(), moments.count
        resolution = moments.resolution
        assert resolution.item() == pytest.approx(torch.finfo(x.dtype).eps)
        assert between_rank(means, counts, within=within, resolution=resolution) == rank
        found.append(
            [
                nc1(means, within, counts, resolution=resolution).item(),
                nc1(means, within, counts, per_class=False, resolution=resolution).item(),
                nc1(means, within, counts, method="quotient", resolution=resolution).item(),
                vci(means, within, counts, resolution=resolution).item(),
            ]
        )
    assert found[1] == pytest.approx(found[0], rel=2 * torch.finfo(dtype).eps)
    assert all(value > 0.01 for value in found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_quiet_direction_that_features_do_fill_is_inverted(dtype) -> None:
    """A hundredth of the others, and far more than rounding: its class means count, however near they lie."""
    features, labels = data(6, 9)
    features[:, 0] *= 0.01
    expected = nc1(*statistics(features, labels, 6)[:2])
    moments = ClassMoments(6, 9)
    moments.update(features.to(dtype), labels)
    found = nc1(moments.means, moments.within_scatter / moments.count.sum(), resolution=moments.resolution)
    close(found, expected.item(), 3 * torch.finfo(dtype).eps)


def test_resolution_is_that_of_the_means_unless_it_is_given() -> None:
    means = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.001, 0.999]])
    assert [between_rank(means), between_rank(means.bfloat16()), between_rank(means, resolution=1e-2)] == [2, 1, 1]
    assert nc1(means, 0.1 * torch.eye(2)) > 1e4 * nc1(means, 1e-6 * torch.eye(2), resolution=1e-2) > 0
