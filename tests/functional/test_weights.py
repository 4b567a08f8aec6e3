"""Measures of weights and units against closed forms and plain references in ``float64``."""

import math
from itertools import combinations, product

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.functional import condition_number, weights
from lightning_collapse.functional.weights import (
    cloned_fraction,
    composition_scores,
    magnitude_ratio,
    merge_units,
    mergeable_share,
    non_zero_share,
    orthogonality_defect,
    pq_index,
    sap_keep_count,
    std_ratio,
    weights_per_unit,
)
from lightning_collapse.utilities.registry import MEASURES

OF_WEIGHTS = sorted(name for name, measure in MEASURES.items() if measure.kind == "weights")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCES = {
    "pq_index": lambda w: 1 - w.abs().sqrt().sum() ** 2 / w.abs().sum() / w.numel(),
    "non_zero_share": lambda w: torch.tensor([float(x != 0) for x in w.flatten()]).double().mean(),
    "weights_per_unit": lambda w: torch.tensor([float(sum(x != 0 for x in row)) for row in w]).double().mean(),
    "orthogonality_defect": lambda w: (torch.linalg.svdvals(w) ** 2 - 1).square().mean().sqrt(),
    "mergeable_share": lambda w: torch.tensor([float(partner(w, i)) for i in range(len(w))]).double().mean(),
}


def partner(w: Tensor, i: int) -> bool:
    widest = max((w[j] - w[k]).square().sum() for j, k in combinations(range(len(w)), 2))
    return bool(min((w[i] - w[j]).square().sum() for j in range(len(w)) if j != i) <= 0.1 * widest)


def cases() -> list[Tensor]:
    sparse = normal(9, 6) * (normal(9, 6, seed=1) > 0.5)
    twins = torch.cat([normal(5, 7), normal(5, 7)[:3] + 0.01])
    return [normal(12, 5), normal(5, 12), sparse, twins, torch.eye(4, dtype=torch.float64)]


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_value_is_the_reference(name: str) -> None:
    measure = MEASURES[name]
    assert measure.fn is getattr(weights, name)
    assert all([measure.range, measure.collapsed, measure.source, measure.fn.__doc__])
    for case in cases():
        expected = float(REFERENCES[name](case))
        assert measure.fn(case).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert measure.fn(case.float()).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            half = measure.fn(case.bfloat16())
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(measure.fn(case.bfloat16().double()).item(), rel=1e-5, abs=1e-6)
    assert measure.fn(torch.zeros(3, 4)).isfinite()
    if measure.scale_free:
        assert measure.fn(2.0**60 * case).item() == measure.fn(case).item()


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_null_is_what_noise_reads(name: str) -> None:
    null = MEASURES[name].null
    if null is not None:
        assert MEASURES[name].fn(normal(200, 300)).item() == pytest.approx(null(200, 300), abs=3e-3)


def test_every_measure_of_weights_has_a_reference() -> None:
    assert set(OF_WEIGHTS) == set(REFERENCES)
    assert set(OF_WEIGHTS) <= set(weights.__all__)


def test_population_values_of_the_pq_index_and_of_what_is_pruned() -> None:
    noise = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    laplace = noise.sign() * -torch.rand(1_000_000, generator=torch.Generator().manual_seed(1)).clamp_min(1e-30).log()
    expected = {(0.5, 1.0): (0.1528, 0.1528, 0.2146, 0.2146), (1.0, 2.0): (0.2021, 1 - 2 / math.pi, 0.2929, 0.5)}
    for (p, q), values in expected.items():
        found = [
            reading
            for x in (noise, laplace)
            for reading in (pq_index(x, p, q).item(), 1 - sap_keep_count(x, p, q).item() / x.numel())
        ]
        assert found == pytest.approx(values, abs=2e-3)


def test_sap_keeps_at_least_a_tenth_and_what_its_bound_says() -> None:
    one = nn.functional.one_hot(torch.tensor(7), 100).float()
    assert (pq_index(one).item(), int(sap_keep_count(one))) == (pytest.approx(0.99), 10)
    assert int(sap_keep_count(torch.ones(100))) == 100  # equal weights are all needed
    assert int(sap_keep_count(torch.zeros(0))) == 0
    assert int(sap_keep_count(torch.tensor([1.0, math.nan]))) == 2
    values = normal(1000)
    index, d = pq_index(values).item(), 1000
    assert int(sap_keep_count(values)) == d - math.floor(d - math.ceil(d * (1 - index)))
    kept = math.ceil(d * 1.5**-2 * (1 - index))  # q / (p - q) = -2, pq / (q - p) = 1
    assert int(sap_keep_count(values, eta=0.5, gamma=0.7)) == d - math.floor(d * 0.7 * (1 - kept / d))
    with pytest.raises(ValueError, match="`beta` must be from 0 to 1, got 2"):
        sap_keep_count(values, beta=2.0)


def test_bound_of_the_pq_index_holds() -> None:
    """With the largest m weights holding all but a share eta of the p-norm, m is no less than the bound."""
    for seed, (p, q) in product(range(5), ((0.5, 1.0), (1.0, 2.0))):
        values = normal(300, seed=seed).abs().pow(2).sort(descending=True).values
        powers, index = values.pow(p), float(pq_index(values, p, q))
        for r in range(1, 301):
            eta = float(powers[r:].sum() / powers[:r].sum())
            bound = 300 * (1 + eta) ** (q / (p - q)) * (1 - index) ** (p * q / (q - p))
            assert r >= bound - 1e-6


def test_sparsity_of_nothing() -> None:
    assert non_zero_share(torch.zeros(0, 3)).isnan()
    assert weights_per_unit(torch.zeros(0, 3)).isnan()
    assert weights_per_unit(torch.ones(4, 3, 2)).item() == 6


@pytest.mark.parametrize("shape", [(6, 6), (3, 8), (8, 3)])
def test_orthonormal_weights_have_no_defect_and_condition_one(shape: tuple[int, int]) -> None:
    weight = nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64))
    assert orthogonality_defect(weight).item() == pytest.approx(0, abs=1e-12)
    assert orthogonality_defect(2 * weight).item() == pytest.approx(3)
    assert condition_number(torch.linalg.svdvals(weight)).item() == pytest.approx(1)
    assert orthogonality_defect(torch.zeros(shape)).item() == 1


def test_units_with_a_partner_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    units = torch.cat([normal(6, 20), normal(6, 20)[:3]])  # three twice
    expected = mergeable_share(units)
    assert expected.item() == pytest.approx(6 / 9)
    monkeypatch.setattr(weights.mergeable, "TILE", 2 * len(units))
    assert torch.equal(mergeable_share(units), expected)
    apart = torch.cat([torch.zeros(1, 6), 100 * torch.arange(1.0, 4).unsqueeze(0)], dim=1)
    assert mergeable_share(units, outgoing=apart.double()).item() == pytest.approx(6 / 9)  # one far apart from six
    assert mergeable_share(torch.ones(4, 3)).item() == 1
    assert mergeable_share(torch.ones(1, 3)).isnan()
    assert mergeable_share(torch.tensor([[math.nan], [1.0]])).isnan()


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.Tanh(), nn.Softplus()])
@pytest.mark.parametrize("convolution", [False, True])
def test_a_merge_of_identical_units_is_exact(activation: nn.Module, convolution: bool) -> None:
    kernel = (3,) if convolution else ()
    first, second, bias = normal(8, 5, *kernel), normal(4, 8, *kernel), normal(8)
    for copy, of in ((3, 0), (6, 0), (7, 2)):
        first[copy], bias[copy] = first[of], bias[of]
    merged = merge_units(first, second, bias, share=1e-9)
    assert merged.groups.tolist() == [0, 1, 2, 0, 3, 4, 0, 2]
    apply = nn.functional.conv1d if convolution else nn.functional.linear
    x = normal(10, 5, *[9] * convolution, seed=2)
    before = apply(activation(apply(x, first, bias)), second)
    after = apply(activation(apply(x, merged.first, merged.bias)), merged.second)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_near_units_are_merged_into_their_mean_nearest_first() -> None:
    first = torch.tensor([[0.0], [1.0], [100.0], [2.5], [50.0]])
    merged = merge_units(first, torch.ones(1, 5))
    assert merged.groups.tolist() == [0, 0, 1, 0, 2]  # half of five units at most go
    assert merged.first.flatten().tolist() == pytest.approx([3.5 / 3, 100, 50])
    assert merged.second.tolist() == [[3, 1, 1]]
    assert merge_units(first, torch.ones(1, 5), most=0.2).groups.tolist() == [0, 0, 1, 2, 3]
    assert merge_units(torch.eye(4), torch.ones(1, 4)).groups.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="a column and `bias` an element for each of the 5 rows"):
        merge_units(first, torch.ones(5, 1))


@pytest.mark.parametrize(("d", "r"), [(64, 8), (128, 16), (128, 1)])
def test_random_heads_do_not_compose(d: int, r: int) -> None:
    later, earlier = [normal(12, d, r, seed=i) for i in range(2)], [normal(10, d, r, seed=2 + i) for i in range(2)]
    found = composition_scores(later[0], later[1].mT, earlier[0], earlier[1].mT)
    assert found.shape == (12, 10)
    w_r, w_w = later[0] @ later[1].mT, earlier[0] @ earlier[1].mT
    norms = w_r.flatten(1).norm(dim=1).unsqueeze(1) * w_w.flatten(1).norm(dim=1)
    plain = (w_r.unsqueeze(1) @ w_w).flatten(2).norm(dim=2) / norms
    torch.testing.assert_close(found + d**-0.5, plain, rtol=1e-10, atol=1e-12)
    if r > 1:
        assert plain.mean().item() == pytest.approx(d**-0.5, rel=0.02)
    gain = normal(d, seed=9)
    scaled = composition_scores(later[0], later[1].mT, earlier[0], earlier[1].mT, gain=gain)
    expected = composition_scores(later[0], later[1].mT * gain, earlier[0], earlier[1].mT)
    torch.testing.assert_close(scaled, expected)


def test_an_average_of_independent_units_loses_spread() -> None:
    for alpha in (0.5, 0.3):
        one, other = normal(20_000, 12), normal(20_000, 12, seed=1)
        merged = alpha * one + (1 - alpha) * other
        reference = alpha * one.std(dim=0) + (1 - alpha) * other.std(dim=0)
        expected = math.sqrt(alpha**2 + (1 - alpha) ** 2)
        assert std_ratio(merged.std(dim=0), reference).item() == pytest.approx(expected, rel=0.01)
        sizes = alpha * one.abs().mean(dim=0) + (1 - alpha) * other.abs().mean(dim=0)
        assert magnitude_ratio(merged.abs().mean(dim=0), sizes).item() == pytest.approx(expected, rel=0.01)
    assert std_ratio(torch.ones(3), torch.zeros(3)).isnan()
    assert magnitude_ratio(torch.ones(3), torch.zeros(3)).isnan()


def test_clones_up_to_scale_and_offset() -> None:
    units = normal(300, 10)
    units[:, 7], units[:, 8], units[:, 9] = 1000 + 3 * units[:, 0], -units[:, 1], 5.0
    for scale in (1.0, 1e-160, 1e160):
        assert cloned_fraction(scale * units).item() == pytest.approx(0.4)
    units[4] = math.nan
    mask = torch.arange(300) % 2 == 0
    assert cloned_fraction(units, mask).item() == pytest.approx(0.4)
    sigmoids = (0.3 * normal(300, 50)).sigmoid()
    unit = nn.functional.normalize(sigmoids, dim=0)
    assert ((unit.T @ unit).fill_diagonal_(0).amax(dim=0) > 0.95).all()  # which is not what is meant
    assert cloned_fraction(sigmoids).item() == 0
    assert cloned_fraction(units[:2]).isnan()
    assert cloned_fraction(units[:0]).isnan()
