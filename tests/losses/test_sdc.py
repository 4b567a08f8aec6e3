"""Similarity distribution calibration: quantiles against scipy, closed forms, order of pairs, how bits are used."""

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_collapse.losses import SDC, TooFewRowsError, hash_code_readings, sdc_terms
from lightning_collapse.losses.sdc import beta_cosines


@pytest.mark.parametrize("concentration", [0.5, 5.0, 31.5, 200.0])
def test_quantiles_are_those_of_the_beta_law(concentration: float) -> None:
    for pairs in (1, 7, 64):
        grid = (2 * np.arange(1, pairs + 1) - 1) / (2 * pairs)
        expected = 2 * stats.beta.ppf(grid, concentration, concentration) - 1
        assert beta_cosines(pairs, concentration).numpy() == pytest.approx(expected, abs=1e-12)


def test_published_targets() -> None:
    targets = beta_cosines(64)
    assert targets[-1].item() == pytest.approx(0.677, abs=5e-4)
    assert targets.square().mean().sqrt().item() == pytest.approx(0.300, abs=5e-4)
    assert beta_cosines(4096).square().mean().sqrt().item() == pytest.approx(11**-0.5, abs=1e-4)


def reference(features: np.ndarray, codes: np.ndarray, orthogonal: bool) -> tuple[float, float]:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    pairs = len(codes) // 2
    found = sorted((cosine(features[i], features[i + pairs]), i) for i in range(pairs))
    gaps = []
    for place, (_, i) in enumerate(found):
        target = 2 * stats.beta.ppf((2 * place + 1) / (2 * pairs), 5, 5) - 1
        gaps.append(abs(cosine(codes[i], codes[i + pairs]) - (max(target, 0.0) if orthogonal else target)))
    return float(np.mean(gaps)), float(np.mean([1 - cosine(v, np.sign(v)) for v in codes[: 2 * pairs]]))


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("rows", [12, 13])
def test_terms_are_the_reference(rows: int, orthogonal: bool) -> None:
    features, codes = torch.randn(rows, 5, dtype=torch.float64), torch.randn(rows, 8, dtype=torch.float64)
    expected = reference(features.numpy(), codes.numpy(), orthogonal)
    for scope in ("rank", "global"):
        terms = sdc_terms(features, codes, orthogonal=orthogonal, scope=scope)
        assert [term.item() for term in terms.values()] == pytest.approx(expected, rel=1e-10)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(SDC()(features.float(), codes.float()), SDC()(features.float(), codes.float()))
        assert SDC()(features.bfloat16(), codes.bfloat16()).dtype == torch.float32


def test_gradient_reaches_codes_alone() -> None:
    features, codes = (torch.randn(10, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda v: SDC()(features.detach(), v), codes)
    SDC()(features, codes).backward()
    assert features.grad is None
    assert (codes.grad.norm(dim=1) > 0).all()


def test_both_ends() -> None:
    """128 rows: equal codes, orthogonal ones, and random ones of 64 bits."""
    features, equal = torch.randn(128, 8), torch.ones(128, 64)
    loss = SDC(orthogonal=False)
    assert loss(features, equal).item() == pytest.approx(1.0)
    assert loss.at_collapse(128, 64) == pytest.approx(1.0)
    assert SDC()(features, equal).item() == pytest.approx(SDC().at_collapse(128, 64))
    one, other = torch.tensor([1.0, 1.0]).repeat(64, 1), torch.tensor([1.0, -1.0]).repeat(64, 1)
    assert loss(features, torch.cat([one, other])).item() == pytest.approx(0.2456, abs=1e-4)
    grads = []
    for codes in (equal.clone(), torch.zeros(128, 64)):
        value = loss(features, codes.requires_grad_())
        grads += torch.autograd.grad(value, codes)
    assert all(grad.isfinite().all() for grad in grads)


def test_codes_in_the_order_of_features_at_the_quantiles_read_zero() -> None:
    angles = beta_cosines(16).acos()[torch.randperm(16)]
    first, second = torch.zeros(16, 1, dtype=torch.float64), angles.unsqueeze(1)
    codes = torch.cat([torch.cat([first.cos(), first.sin()], 1), torch.cat([second.cos(), second.sin()], 1)])
    assert sdc_terms(codes, codes, orthogonal=False)["similarity"].item() == pytest.approx(0, abs=1e-12)
    assert sdc_terms(-codes.roll(1, 0), codes, orthogonal=False)["similarity"].item() > 0.1


def test_it_compiles() -> None:
    features, codes = torch.randn(12, 5), torch.randn(12, 8)
    loss = SDC()
    torch.compiler.reset()
    compiled = torch.compile(lambda x, v: loss(x, v), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, codes), loss(features, codes))


def test_readings_of_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(4000, 12, generator=generator)
    readings = hash_code_readings(codes)
    signs = np.where(codes.numpy() < 0, -1, 1)
    correlation = np.abs(np.corrcoef(signs.T))
    assert readings["correlation"].item() == pytest.approx((correlation.sum() - 12) / 132, rel=1e-4)
    assert readings["imbalance"].item() == pytest.approx((2 / (np.pi * 4000)) ** 0.5, rel=0.5)
    assert readings["duplicates"].item() == pytest.approx(1 - len(np.unique(signs, axis=0)) / 4000)
    constant = hash_code_readings(torch.ones(8, 4))
    assert [reading.item() for reading in constant.values()] == [1.0, 0.0, 0.875]


def test_misuse_is_refused() -> None:
    rows = torch.randn(8, 4)
    with pytest.raises(ValueError, match="`features` and `codes` of `sdc_terms` must have as many rows, got 8, 7"):
        SDC()(rows, rows[:7])
    with pytest.raises(ValueError, match=r"`codes` of `sdc_terms` must be floating point of shape \(N, D\)"):
        SDC()(rows, rows[0])
    with pytest.raises(TooFewRowsError, match="at least 2 rows"):
        SDC()(rows[:1], rows[:1])
    with pytest.raises(ValueError, match="`scope` must be one of"):
        sdc_terms(rows, rows, scope="papr")
    with pytest.raises(ValueError, match="`concentration` must be positive, got 0"):
        SDC(concentration=0.0)
