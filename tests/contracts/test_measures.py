"""One battery over every registered measure, against an independent reference in ``float64``."""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse import functional
from lightning_collapse.functional import expected_under_isotropy
from lightning_collapse.spectral import Moments, Spectrum, singular_values, spectrum_of
from lightning_collapse.spectral.eigenvalues import eigenvalues
from lightning_collapse.spectral.spectrum import finish_spectrum, gram_of
from lightning_collapse.utilities.registry import MEASURES

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]
EPS32 = 2.0**-23


def sigma(x: Matrix) -> np.ndarray:
    """Singular values of centered rows."""
    return np.linalg.svd(x - x.mean(axis=0), compute_uv=False)


def entropy_rank(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p))))


def naive_effective_rank(x: Matrix) -> float:
    return entropy_rank(sigma(x) / sigma(x).sum())


def naive_rankme(x: Matrix) -> float:
    s = np.linalg.svd(x, compute_uv=False)
    return entropy_rank(s / s.sum() + 1e-7)


def naive_eigenvalue_effective_rank(x: Matrix) -> float:
    energy = sigma(x) ** 2
    return entropy_rank(energy / energy.sum())


def naive_participation_ratio(x: Matrix) -> float:
    covariance = np.cov(x, rowvar=False).reshape(x.shape[1], -1)
    return float(np.trace(covariance) ** 2 / np.sum(covariance**2))


def naive_unbiased_participation_ratio(x: Matrix) -> float:
    n, d = x.shape
    s = np.cov(x, rowvar=False).reshape(d, -1)
    square, trace2 = np.sum(s**2), np.trace(s) ** 2
    q = np.sum(np.sum((x - x.mean(axis=0)) ** 2, axis=1) ** 2) / (n - 1)
    numerator = 2 * square + (n * n - 3 * n + 1) * trace2 - n * q
    denominator = (n - 1) * (n - 2) * square + trace2 - n * q
    return float(np.clip(numerator / denominator if denominator > 0 else d, 1, d))


def naive_stable_rank(x: Matrix) -> float:
    centered = x - x.mean(axis=0)
    return float((np.linalg.norm(centered) / np.linalg.norm(centered, 2)) ** 2)


def naive_nesum(x: Matrix) -> float:
    eigenvalues = np.linalg.eigvalsh(np.cov(x, rowvar=False))
    return float(eigenvalues.sum() / eigenvalues[-1])


def naive_numerical_rank(x: Matrix) -> float:
    return float(np.linalg.matrix_rank(x - x.mean(axis=0), rtol=max(x.shape) * EPS32))


def naive_srank(x: Matrix) -> float:
    s, total = sigma(x), 0.0
    for k, value in enumerate(s, 1):
        total += value
        if total >= 0.99 * s.sum():
            return float(k)
    raise AssertionError


def naive_isotropy(x: Matrix) -> float:
    """Steps 4 to 6 of the paper's algorithm."""
    d = x.shape[1]
    eigenvalues = np.linalg.eigvalsh(np.cov(x, rowvar=False))
    normalized = math.sqrt(d) * eigenvalues / np.linalg.norm(eigenvalues)
    defect = np.linalg.norm(normalized - 1) / math.sqrt(2 * (d - math.sqrt(d)))
    used = (d - defect**2 * (d - math.sqrt(d))) ** 2 / d**2
    return float((d * used - 1) / (d - 1))


def naive_power_law(x: Matrix) -> tuple[float, float]:
    energy = sigma(x) ** 2
    rank = np.arange(1, len(energy) + 1)
    fit = (rank >= 4) & (rank <= 100) & (energy > energy[0] * len(energy) * EPS32)
    a, b, w = np.log(rank[fit]), np.log(energy[fit]), 1 / rank[fit]
    slope, offset = np.polyfit(a, b, 1, w=np.sqrt(w))
    residual, spread = np.sum(w * (b - slope * a - offset) ** 2), np.sum(w * (b - np.average(b, weights=w)) ** 2)
    return float(-slope), float(1 - residual / spread) if spread > 1e-20 else 1.0  # flat is a power law, not 0 / 0


def naive_condition_number(x: Matrix) -> float:
    return float(sigma(x)[0] / sigma(x)[min(len(x) - 1, x.shape[1]) - 1])


def naive_top_share(x: Matrix) -> float:
    return float(sigma(x)[0] ** 2 / np.sum(sigma(x) ** 2))


def naive_svd_entropy(x: Matrix) -> float:
    energy = sigma(x) ** 2
    q = energy[energy > 0] / energy.sum()
    return float(-np.sum(q * np.log(q)) / np.log(min(len(x) - 1, x.shape[1])))


def naive_quartile_ratio(x: Matrix, power: int = 1) -> float:
    third, first = np.percentile(sigma(x)[: min(len(x) - 1, x.shape[1])] ** power, [75, 25])
    return float(third / first)


def naive_relative_spread(x: Matrix) -> float:
    return float(np.sqrt(x.var(axis=0).sum() / (x**2).mean(axis=0).sum()))


def naive_dead(x: Matrix) -> float:
    std = x.std(axis=0, ddof=1)
    return float(np.mean([value <= 0.01 * std.mean() for value in std]))


def unit(x: Matrix) -> Matrix:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def naive_mean_cosine(x: Matrix) -> float:
    u = unit(x)
    return float(np.mean([u[i] @ u[j] for i in range(len(u)) for j in range(i)]))


def naive_direction_spread(x: Matrix) -> float:
    return float(np.sqrt(unit(x).var(axis=0).sum()))


def naive_uniformity(x: Matrix) -> float:
    u = unit(x)
    return float(np.log(np.mean([np.exp(-2 * np.sum((u[i] - u[j]) ** 2)) for i in range(len(u)) for j in range(i)])))


def naive_recall_at_1(x: Matrix, y: Matrix) -> float:
    cosine = unit(x) @ unit(y).T
    return float(np.mean([np.argmax(row) == i for i, row in enumerate(cosine)]))


def naive_assignment_perplexity(x: Matrix) -> float:
    shares = np.bincount(x.argmax(axis=1), minlength=x.shape[1]) / len(x)
    return float(np.exp(-sum(p * np.log(p) for p in shares if p > 0)))


def naive_alignment(x: Matrix, y: Matrix) -> float:
    return float(np.mean(np.sum((unit(x) - unit(y)) ** 2, axis=1)))


REFERENCES: dict[str, Callable[..., float]] = {
    "alignment": naive_alignment,
    "assignment_perplexity": naive_assignment_perplexity,
    "alpha_req": lambda x: naive_power_law(x)[0],
    "alpha_req_fit": lambda x: naive_power_law(x)[1],
    "condition_number": naive_condition_number,
    "dead_dimensions": naive_dead,
    "direction_spread": naive_direction_spread,
    "effective_rank": naive_effective_rank,
    "eigenvalue_effective_rank": naive_eigenvalue_effective_rank,
    "eigenvalue_quartile_ratio": lambda x: naive_quartile_ratio(x, 2),
    "feature_std": lambda x: float(x.std(axis=0, ddof=1).mean()),
    "feature_std_floor": lambda x: float(x.std(axis=0, ddof=1).min()),
    "isotropy": naive_isotropy,
    "mean_cosine": naive_mean_cosine,
    "nesum": naive_nesum,
    "numerical_rank": naive_numerical_rank,
    "participation_ratio": naive_participation_ratio,
    "quartile_ratio": naive_quartile_ratio,
    "rankme": naive_rankme,
    "recall_at_1": naive_recall_at_1,
    "relative_spread": naive_relative_spread,
    "srank": naive_srank,
    "stable_rank": naive_stable_rank,
    "svd_entropy": naive_svd_entropy,
    "top_k_share": naive_top_share,
    "unbiased_participation_ratio": naive_unbiased_participation_ratio,
    "uniformity": naive_uniformity,
}
BOUNDS: dict[str, Callable[[int, int], tuple[float, float]]] = {
    "alignment": lambda n, d: (0, 4),
    "alpha_req": lambda n, d: (0, math.inf),
    "alpha_req_fit": lambda n, d: (0, 1),
    "condition_number": lambda n, d: (1, math.inf),
    "assignment_perplexity": lambda n, d: (1, min(n, d)),
    "dead_dimensions": lambda n, d: (0, 1),
    "direction_spread": lambda n, d: (0, 1),
    "eigenvalue_quartile_ratio": lambda n, d: (1, math.inf),
    "feature_std": lambda n, d: (0, math.inf),
    "feature_std_floor": lambda n, d: (0, math.inf),
    "isotropy": lambda n, d: (0, 1),
    "mean_cosine": lambda n, d: (-1 / (n - 1), 1),
    "numerical_rank": lambda n, d: (0, min(n - 1, d)),
    "quartile_ratio": lambda n, d: (1, math.inf),
    "rankme": lambda n, d: (1, min(n, d) * (1 + 2e-6 * min(n, d))),  # the epsilon exceeds K by a hair
    "recall_at_1": lambda n, d: (0, 1),
    "relative_spread": lambda n, d: (0, 1),
    "svd_entropy": lambda n, d: (0, 1),
    "top_k_share": lambda n, d: (1 / min(n - 1, d), 1),
    "unbiased_participation_ratio": lambda n, d: (1, d),
    "uniformity": lambda n, d: (-4 * n / (n - 1), 0),
}
AT_ZERO = {
    "assignment_perplexity": 1.0,
    "alpha_req": math.nan,
    "alpha_req_fit": math.nan,
    "dead_dimensions": 1.0,
    "mean_cosine": math.nan,
}
AT_ZERO |= dict.fromkeys(("uniformity", "alignment", "direction_spread", "recall_at_1"), math.nan)
STEPS = {"assignment_perplexity", "dead_dimensions", "numerical_rank", "recall_at_1", "srank"}
PLAIN = {"unbiased_participation_ratio"}  # takes a record only
FINE = 1e-5

OF_FEATURES = sorted(name for name, m in MEASURES.items() if m.kind != "weights")  # those: test_weights.py
every_measure = pytest.mark.parametrize("name", OF_FEATURES)
spectral_measure = pytest.mark.parametrize("name", sorted(m.name for m in MEASURES.values() if m.kind == "spectrum"))
measure_of_values = pytest.mark.parametrize(
    "name", sorted(m.name for m in MEASURES.values() if m.kind == "spectrum" and m.name not in PLAIN)
)


def with_spectrum(n: int, d: int, values: np.ndarray, seed: int = 0) -> Matrix:
    """Centered rows with these singular values."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n, len(values)))
    left, _ = np.linalg.qr(u - u.mean(axis=0))
    right, _ = np.linalg.qr(rng.normal(size=(d, len(values))))
    return (left * values) @ right.T


def noise(n: int, d: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(size=(n, d))


DATA: dict[str, Matrix] = {
    "white-tall": noise(40, 24),
    "white-wide": noise(24, 40),
    "power-tall": 3 + noise(60, 30) * np.arange(1.0, 31.0) ** -0.5,
    "power-wide": noise(30, 60) * np.arange(1.0, 61.0) ** -0.5,
    "rank8-tall": with_spectrum(60, 36, np.r_[np.ones(8), np.full(28, 1e-4)]) + 0.1,
    "rank8-wide": with_spectrum(40, 72, np.r_[np.ones(8), np.full(31, 1e-4)]) + 0.1,
    "dead": noise(50, 12) * np.r_[np.ones(9), 0.02, 1e-4, 1e-5] + 2,
}
FAR = {"far-tall": 1000 + noise(60, 20), "far-wide": 1000 + noise(20, 40)}
ILL = {
    "ill-tall": with_spectrum(50, 20, np.logspace(0, -5, 20)),
    "ill-wide": with_spectrum(21, 50, np.logspace(0, -5, 20)),
}


def partner(x: Matrix) -> Matrix:
    return x + np.abs(x - x.mean(axis=0)).mean() * noise(*x.shape, seed=1)


def evaluate(name: str, x: Tensor, y: Tensor | None = None) -> Tensor:
    """A measure of features, whatever it reads."""
    measure = MEASURES[name]
    if measure.kind == "spectrum":
        return measure.of_spectrum(spectrum_of(x, center=measure.spectrum == "centered"))
    if measure.kind == "rows":
        return measure.fn(x)
    return measure.fn(x, torch.as_tensor(partner(x.detach().double().numpy())).to(x) if y is None else y)


def reference(name: str, x: Tensor) -> float:
    rows = x.double().numpy()
    if MEASURES[name].kind != "pairs":
        return REFERENCES[name](rows)
    return REFERENCES[name](rows, torch.as_tensor(partner(rows)).to(x).double().numpy())


def test_the_battery_knows_every_measure() -> None:
    assert set(REFERENCES) == set(OF_FEATURES)
    assert set(OF_FEATURES) <= set(functional.__all__)


@every_measure
def test_registration_tells_the_facts(name: str) -> None:
    measure = MEASURES[name]
    assert measure.name == name == measure.fn.__name__
    assert measure.fn is getattr(functional, name)
    assert all([measure.range, measure.collapsed, measure.source, measure.fn.__doc__])
    assert measure.curve.startswith(name)
    assert measure.kind in ("spectrum", "rows", "pairs")
    assert measure.spectrum in ("centered", "raw")


def readings(name: str, data: dict[str, Matrix], dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """What a measure reads from each of the data, and what it should."""
    found, expected = {}, {}
    for key, rows in data.items():
        x = torch.from_numpy(rows).to(dtype)
        value = evaluate(name, x)
        assert value.shape == ()
        assert value.dtype == (torch.float64 if MEASURES[name].kind == "spectrum" else dtype)
        found[key], expected[key] = value.item(), reference(name, x)
    return found, expected


@every_measure
def test_value_is_the_reference(name: str) -> None:
    found, expected = readings(name, DATA | FAR, torch.float64)
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-12)
    # 1e-5 of the largest singular value is 1e-10 of the Gram matrix: five digits are left of it
    found, expected = readings(name, ILL, torch.float64)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)


@every_measure
def test_float32_is_the_reference(name: str) -> None:
    found, expected = readings(name, DATA | ILL, torch.float32)
    assert found == pytest.approx(expected, rel=FINE, abs=1e-7)


@every_measure
def test_float32_far_from_the_origin_is_the_reference(name: str) -> None:
    found, expected = readings(name, FAR, torch.float32)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-12)


@every_measure
def test_range(name: str) -> None:
    for data, rows in (DATA | FAR | ILL).items():
        low, high = BOUNDS.get(name, lambda n, d: (1, min(n - 1, d)))(*rows.shape)
        for dtype in (torch.float32, torch.float64):
            value = evaluate(name, torch.from_numpy(rows).to(dtype)).item()
            assert low - 1e-6 <= value <= high * (1 + 1e-6) + 1e-6, data


@every_measure
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float32, (2.0**-100, 2.0**-20, 2.0**20, 2.0**100)),
        (torch.float64, (2.0**-100, 2.0**100)),
        (torch.float64, (2.0**-500, 2.0**500)),
    ],
    ids=["float32", "float64", "float64-extreme"],
)
def test_scale(name: str, dtype: torch.dtype, scales: tuple[float, ...]) -> None:
    for data in ("power-tall", "power-wide", "dead"):
        x, y = (torch.from_numpy(rows).to(dtype) for rows in (DATA[data], partner(DATA[data])))
        expected = evaluate(name, x, y)
        for scale in scales:
            found = evaluate(name, scale * x, scale * y) / (1 if MEASURES[name].scale_free else scale)
            assert found.item() == pytest.approx(expected.item(), rel=FINE), (data, scale)


@every_measure
def test_zeros(name: str) -> None:
    for shape in ((6, 4), (4, 6)):
        for dtype in (torch.float32, torch.float64):
            zeros = torch.zeros(shape, dtype=dtype)
            value = evaluate(name, zeros, zeros).item()
            assert value == pytest.approx(AT_ZERO.get(name, 0.0), abs=0, nan_ok=True)


@measure_of_values
def test_zero_spectrum(name: str) -> None:
    assert MEASURES[name].fn(torch.zeros(5)).item() == pytest.approx(AT_ZERO.get(name, 0.0), abs=0, nan_ok=True)


@every_measure
def test_gradient_at_constant_features_is_finite(name: str) -> None:
    for value, shape, dtype in product((0.0, 3.0, 0.1), ((6, 4), (6, 8), (1, 4)), (torch.float32, torch.float64)):
        x = torch.full(shape, value, dtype=dtype, requires_grad=True)
        reading = evaluate(name, x, x.detach().clone())
        if name in STEPS:
            assert not reading.requires_grad
        elif len(x) > 1 or reading.isfinite():
            reading.backward()
            assert x.grad is not None
            assert x.grad.isfinite().all(), (value, shape, dtype)


@measure_of_values
def test_gradient_at_a_zero_spectrum_is_finite(name: str) -> None:
    values = torch.zeros(5, requires_grad=True)
    reading = MEASURES[name].fn(values)
    if name in STEPS:
        assert not reading.requires_grad
    else:
        reading.backward()
        assert values.grad is not None
        assert values.grad.isfinite().all()


@measure_of_values
def test_gradcheck_of_values(name: str) -> None:
    values = torch.tensor([5.0, 3.7, 2.9, 2.1, 1.2, 0.7, 0.3], dtype=torch.float64, requires_grad=True)
    if name not in STEPS:
        assert torch.autograd.gradcheck(MEASURES[name].fn, (values,))


@every_measure
def test_gradcheck_of_features(name: str) -> None:
    x = torch.from_numpy(noise(14, 6) * np.r_[3, 2, 1.5, 1, 0.5, 0.4] + 0.3).requires_grad_()
    y = torch.from_numpy(noise(14, 6, seed=1)).requires_grad_()
    if name not in STEPS:
        pair = MEASURES[name].kind == "pairs"
        assert torch.autograd.gradcheck(lambda *z: evaluate(name, *z), (x, y) if pair else (x,))


@measure_of_values
def test_gradient_where_rows_are_few(name: str) -> None:
    # central differences do not resolve the one singular value that is zero, an SVD without it does
    measure = MEASURES[name]
    if name in STEPS:
        return
    wide = noise(7, 12) * np.arange(1.0, 13.0) ** -0.5
    x, y = (torch.from_numpy(wide).requires_grad_() for _ in range(2))
    (grad,) = torch.autograd.grad(evaluate(name, x), x)
    rows = y - y.mean(dim=0) if measure.spectrum == "centered" else y
    values = torch.linalg.svdvals(rows)[: 6 if measure.spectrum == "centered" else 7]
    naive = measure.of_spectrum(Spectrum(values, torch.tensor(7.0, dtype=torch.float64), 12))
    (expected,) = torch.autograd.grad(naive, y)
    # what a singular value of 1e-8 leaves of the entropy's infinite slope
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@measure_of_values
def test_half_spectrum(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.tensor([[5.0, 3.0, 2.0, 1.0, 0.5, 0.25], [1.0] * 6], dtype=dtype)
        expected = MEASURES[name].fn(values.float())
        off = MEASURES[name].fn(values)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            on, single = MEASURES[name].fn(values), MEASURES[name].fn(values.float())
        assert off.dtype == on.dtype == torch.float32
        assert torch.equal(off, expected)
        assert torch.equal(on, expected)
        assert torch.equal(single, expected)


@every_measure
def test_half_features(name: str) -> None:
    far = DATA["white-tall"] * 2 + 1024
    for rows, dtype in product((DATA["power-tall"], DATA["power-wide"], far), (torch.float16, torch.bfloat16)):
        x, y = (torch.from_numpy(z).to(dtype) for z in (rows, partner(rows)))
        expected = evaluate(name, x.double(), y.double()).item()
        off = evaluate(name, x, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            on, single = evaluate(name, x, y), evaluate(name, x.float(), y.float())
        assert off.dtype == on.dtype == (torch.float64 if MEASURES[name].kind == "spectrum" else torch.float32)
        # eight roundings of the dot products that uniformity takes the exponential of
        assert off.item() == pytest.approx(expected, rel=FINE, abs=1e-6)
        assert torch.equal(on, off)
        assert torch.equal(single, off)


@measure_of_values
def test_half_features_give_float32_spectra(name: str) -> None:
    x = torch.from_numpy(DATA["power-tall"]).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = MEASURES[name].fn(singular_values(x, center=MEASURES[name].spectrum == "centered"))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference(name, x), rel=FINE)


@measure_of_values
def test_batched_equals_a_loop(name: str) -> None:
    values = torch.from_numpy(np.sort(np.abs(noise(6, 9)), axis=1)[:, ::-1].copy()).view(2, 3, 9)
    batched = MEASURES[name].fn(values)
    assert batched.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert torch.equal(batched[i, j], MEASURES[name].fn(values[i, j]))


@measure_of_values
def test_one_bad_spectrum_in_a_batch(name: str) -> None:
    values = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.5]] * 3)
    values[1, 2] = torch.nan
    found = MEASURES[name].fn(values)
    assert found[1].isnan()
    assert torch.equal(found[0], MEASURES[name].fn(values[0]))
    assert torch.equal(found[0], found[2])


@every_measure
def test_bad_rows_are_left_out(name: str) -> None:
    x, y = (torch.from_numpy(rows).float() for rows in (DATA["power-tall"], partner(DATA["power-tall"])))
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[[0, 7, 30]] = False
    expected = evaluate(name, x[keep], y[keep])
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = x.clone()
        spoiled[~keep, 5] = bad
        assert evaluate(name, spoiled, y).item() == pytest.approx(expected.item(), rel=1e-6)
        if MEASURES[name].kind == "pairs":
            assert evaluate(name, y, spoiled).item() == pytest.approx(expected.item(), rel=1e-6)


@every_measure
def test_nothing_but_bad_rows(name: str) -> None:
    for bad in (math.nan, math.inf):
        for shape in ((5, 4), (4, 5)):
            x = torch.full(shape, bad)
            value = evaluate(name, x, x)
            assert value.shape == ()
            assert value.isnan() or value == 0


@every_measure
def test_no_rows(name: str) -> None:
    value = evaluate(name, torch.zeros(0, 4), torch.zeros(0, 4))
    assert value.shape == ()
    assert value.isnan() or value == 0


@every_measure
def test_masks(name: str) -> None:
    measure = MEASURES[name]
    x = torch.from_numpy(DATA["power-tall"])
    mask = torch.arange(len(x)) % 3 != 0
    if measure.kind == "rows":
        assert measure.fn(x, mask).item() == pytest.approx(measure.fn(x[mask]).item(), rel=1e-12)
    elif measure.kind == "spectrum":
        center = measure.spectrum == "centered"
        found, expected = (measure.of_spectrum(spectrum_of(*z)) for z in ((x, center, mask), (x[mask], center)))
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)


@every_measure
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_rows_are_collapsed(name: str, dtype: torch.dtype) -> None:
    x = (0.1 * torch.arange(1, 6, dtype=torch.float64)).to(dtype).expand(77, 5)
    expected = dict.fromkeys(REFERENCES, 0.0) | {"dead_dimensions": 1.0, "mean_cosine": 1.0, "rankme": 1.0}
    expected |= {"alpha_req": math.nan, "alpha_req_fit": math.nan, "assignment_perplexity": 1.0, "recall_at_1": 1 / 77}
    for constant in (1, 10000):
        value = evaluate(name, constant * x, constant * x).item()
        assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6, nan_ok=True), constant


@pytest.mark.parametrize("k", [1, 3, 50, 100, 200])
def test_equal_singular_values(k: int) -> None:
    values = torch.cat([torch.full((k,), 0.3, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)])
    for name in ("effective_rank", "eigenvalue_effective_rank", "participation_ratio", "stable_rank", "nesum"):
        assert MEASURES[name].fn(values).item() == pytest.approx(k, rel=1e-12)
    assert functional.rankme(values, eps=0.0).item() == pytest.approx(k, rel=1e-12)
    assert functional.numerical_rank(values) == k
    assert functional.srank(values) == math.ceil(99 * k / 100)
    assert functional.srank(values.float()) == math.ceil(99 * k / 100)
    assert functional.top_k_share(values).item() == pytest.approx(1 / k)
    assert functional.isotropy(values).item() == pytest.approx((k - 1) / (k + 6))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.3, 2.0])
@pytest.mark.parametrize(("first", "last"), [(1, 10), (4, 100), (11, 100)])
def test_power_law(exponent: float, first: int, last: int) -> None:
    values = torch.arange(1, 201, dtype=torch.float64) ** (-exponent / 2)
    assert functional.alpha_req(values, first, last).item() == pytest.approx(exponent, rel=1e-9)
    assert functional.alpha_req_fit(values, first, last).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("alpha", "entropy_sigma", "entropy_lambda", "ratio", "top"),
    [(0.5, 982, 805, 521, 62.6), (1.0, 805, 182, 34.3, 7.5), (1.5, 478, 18.6, 5.4, 2.5)],
)
def test_published_table_of_power_laws(
    alpha: float, entropy_sigma: float, entropy_lambda: float, ratio: float, top: float
) -> None:
    values = torch.arange(1, 1025, dtype=torch.float64) ** (-alpha / 2)
    assert functional.effective_rank(values).item() == pytest.approx(entropy_sigma, rel=1e-3)
    assert functional.eigenvalue_effective_rank(values).item() == pytest.approx(entropy_lambda, rel=3e-3)
    assert functional.participation_ratio(values).item() == pytest.approx(ratio, rel=1e-2)
    assert functional.nesum(values).item() == pytest.approx(top, abs=0.05)  # printed with one decimal


def test_published_values_of_rankme() -> None:
    rank_one = torch.tensor([1.0] + [0.0] * 2047, dtype=torch.float64)
    full = torch.ones(2048, dtype=torch.float64)
    assert functional.rankme(rank_one).item() == pytest.approx(1.003, abs=5e-4)
    assert functional.rankme(rank_one, eps=1e-5).item() == pytest.approx(1.27, abs=5e-3)
    assert functional.rankme(rank_one, eps=1e-4).item() == pytest.approx(6.6, abs=5e-2)
    assert functional.rankme(full).item() == pytest.approx(2050.8, abs=5e-2)
    assert functional.rankme(full, eps=1e-5).item() == pytest.approx(2345, abs=0.5)


@cache
def draws(n: int, d: int, kind: str) -> list[Tensor | Spectrum]:
    rows = [torch.from_numpy(noise(n, d, seed)).float() for seed in range(20)]
    return list(rows) if kind == "rows" else [spectrum_of(x, center=kind == "centered") for x in rows]


@every_measure
def test_null_is_what_noise_reads(name: str) -> None:
    measure = MEASURES[name]
    for n, d in ((64, 32), (32, 64), (300, 50)):
        null = expected_under_isotropy(name, n, d)
        if measure.kind != "spectrum" and measure.null is None:
            assert math.isnan(null)
            continue
        inputs = draws(n, d, measure.spectrum if measure.kind == "spectrum" else "rows")
        read = measure.of_spectrum if measure.kind == "spectrum" else measure.fn
        pairs = pairwise(inputs)
        found = np.array([read(*z).item() for z in (pairs if measure.kind == "pairs" else zip(inputs, strict=True))])
        error = 4 * found.std(ddof=1) / math.sqrt(len(found))
        assert null == pytest.approx(found.mean(), rel=0.03, abs=error)


@pytest.mark.parametrize("n_per_d", [0.5, 1, 2, 5, 10])
def test_published_nulls(n_per_d: float) -> None:
    rows = {0.5: (0.463, 0.388, 0.332, 0.173), 1: (0.806, 0.607, 0.500, 0.258), 2: (0.925, 0.778, 0.666, 0.353)}
    rows |= {5: (0.973, 0.904, 0.832, 0.473), 10: (0.987, 0.951, 0.909, 0.590)}
    names = ("effective_rank", "eigenvalue_effective_rank", "participation_ratio", "nesum")
    for name, expected in zip(names, rows[n_per_d], strict=True):
        # the edge of the Marchenko-Pastur law is approached from below, by 2 percent at this size
        rel = 0.03 if name == "nesum" else 0.01
        assert expected_under_isotropy(name, int(256 * n_per_d), 256) / 256 == pytest.approx(expected, rel=rel)


def test_null_of_uniformity_is_bessels() -> None:
    assert expected_under_isotropy("uniformity", 1000, 64) == pytest.approx(-3.8752, abs=5e-5)
    assert expected_under_isotropy("uniformity", 1000, 128) == pytest.approx(-3.9375, abs=5e-5)


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_no_null_of_one_row(measure: str) -> None:
    assert math.isnan(expected_under_isotropy(measure, 1, 8))


def u_statistics(x: Matrix) -> tuple[float, float]:
    """Unbiased estimates of (tr Sigma)^2 and tr Sigma^2, from all ordered quadruples of rows."""
    trace2 = square = 0.0
    quadruples = list(permutations(range(len(x)), 4))
    for i, j, k, m in quadruples:
        a, b = x[i] - x[j], x[k] - x[m]
        trace2 += (a @ a) * (b @ b) / 4
        square += (a @ b) ** 2 / 4
    return trace2 / len(quadruples), square / len(quadruples)


@pytest.mark.parametrize("draw", ["normal", "exponential", "standard_cauchy"])
@pytest.mark.parametrize("seed", range(3))
def test_unbiased_participation_ratio_is_the_ratio_of_u_statistics(draw: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = getattr(rng, draw)(size=(8, 5)) * np.array([3, 2, 1, 1, 0.5]) + 7
    numerator, denominator = u_statistics(x)
    expected = np.clip(numerator / denominator if denominator > 0 else 5, 1, 5)
    assert functional.unbiased_participation_ratio(spectrum_of(torch.from_numpy(x))).item() == pytest.approx(expected)


def test_the_u_statistics_reach_inside_the_clamp() -> None:
    # otherwise the test above would compare clamped numbers
    inside = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        numerator, denominator = u_statistics(rng.normal(size=(8, 5)) * np.array([3, 2, 1, 1, 0.5]) + 7)
        inside += 1 < numerator / denominator < 5
    assert inside >= 2


@pytest.mark.parametrize("draw", ["normal", "exponential", "laplace"])
@pytest.mark.parametrize("n", [96, 256])
def test_unbiased_participation_ratio_does_not_grow_with_n(draw: str, n: int) -> None:
    d, rng = 60, np.random.default_rng(0)
    std = np.arange(1.0, d + 1) ** -0.25
    truth = np.sum(std**2) ** 2 / np.sum(std**4)
    unbiased, plain = [], []
    for _ in range(40):
        record = spectrum_of(torch.from_numpy(getattr(rng, draw)(size=(n, d)) * std))
        unbiased.append(functional.unbiased_participation_ratio(record).item())
        plain.append(functional.participation_ratio(record).item())
    assert np.mean(unbiased) == pytest.approx(truth, rel=0.03)
    assert np.mean(plain) < 0.95 * truth


def test_unbiased_participation_ratio_refuses_what_it_cannot_read() -> None:
    for argument in (torch.ones(3), spectrum_of(torch.ones(5, 3), center=False)):
        with pytest.raises(TypeError, match=r"needs the `Spectrum` record of centered features.*spectrum_of"):
            functional.unbiased_participation_ratio(argument)


@pytest.mark.parametrize("center", [True, False])
def test_records_of_one_shape_are_made_and_read_together(center: bool) -> None:
    """Layers with a mean, a scale, padding, bad rows or nothing at all in them, against each of them alone."""
    for n, d in ((9, 14), (40, 6)):
        x = torch.from_numpy(noise(5 * n, d)).view(5, n, d)
        x = torch.stack([x[0], 1e3 + x[1], 1e9 * x[2], x[3], 0 * x[4]])
        x[3, 2:4] = torch.nan
        mask = torch.ones(5, n, dtype=torch.bool)
        mask[0, ::3] = False
        gram, record = gram_of(x, center, mask)
        together = finish_spectrum(eigenvalues(gram), record)
        alone = [spectrum_of(features, center, m) for features, m in zip(x, mask, strict=True)]
        for measure in MEASURES.values():
            read = measure.of_spectrum if measure.kind == "spectrum" else measure.from_spectrum
            if read is None or ((measure.kind == "rows" or "unbiased" in measure.name) and not center):
                continue
            expected = torch.stack([read(one) for one in alone])
            torch.testing.assert_close(
                read(together), expected, rtol=1e-9, atol=1e-12, equal_nan=True, msg=measure.name
            )


@pytest.mark.parametrize("name", sorted(m.name for m in MEASURES.values() if m.from_spectrum is not None))
def test_value_of_a_record_is_that_of_its_rows(name: str) -> None:
    measure = MEASURES[name]
    for rows in (DATA | FAR).values():
        x = torch.from_numpy(rows)
        mask = torch.arange(len(x)) % 3 > 0
        found = measure.from_spectrum(spectrum_of(x, mask=mask)).item()
        assert found == pytest.approx(measure.fn(x, mask).item(), rel=1e-9)
        moments = Moments(x.shape[1])
        moments.update(x, mask)
        assert measure.from_spectrum(moments.spectrum()).item() == pytest.approx(found, rel=1e-9)
