"""Diversity of heads and queries, against sums over pairs and the closed forms."""

import math

import pytest
import torch

from lightning_collapse.functional import head_cosine, head_cosine_null, head_divergence, query_nmi, query_nmi_null


def weights(*shape, spread=1.0, causal=False, seed=0):
    logits = spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if causal:
        logits = logits.masked_fill(torch.ones(shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(dim=-1)


def entropy(p):
    return -sum(x * math.log(x) for x in p.tolist() if x > 0)


def test_head_cosine_is_the_mean_over_pairs_of_rows():
    p = weights(2, 5, 3, 7)
    pairs = [(a, b) for a in range(5) for b in range(a)]
    expected = sum(torch.cosine_similarity(p[:, a], p[:, b], dim=-1) for a, b in pairs) / len(pairs)
    torch.testing.assert_close(head_cosine(p), expected, rtol=1e-12, atol=0)
    assert head_cosine(p[:, :1]).isnan().all()
    assert head_divergence(p[:, :1]).isnan().all()
    assert head_cosine_null(torch.ones(2, 1, 3)).isnan().all()


def test_heads_alike_and_heads_apart():
    p = weights(1, 1, 4, 8).expand(1, 3, 4, 8)
    torch.testing.assert_close(head_cosine(p), torch.ones(1, 4, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(head_divergence(p), torch.zeros(1, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    apart = torch.eye(6, dtype=torch.float64)[:3].view(1, 3, 1, 6)
    assert head_cosine(apart).item() == 0
    assert head_divergence(apart).item() == pytest.approx(1, abs=1e-12)


def test_head_divergence_is_that_of_jensen_and_shannon():
    p = weights(4, 1, 9)
    expected = (entropy(p.mean(dim=0)[0]) - sum(entropy(row[0]) for row in p) / 4) / math.log(4)
    assert head_divergence(p).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("spread", "expected"), [(0.5, 0.78), (1.0, 0.37)])
def test_null_of_independent_heads(spread, expected):
    null = head_cosine_null(torch.full((4, 1), spread, dtype=torch.float64)).item()
    assert null == pytest.approx(math.exp(-(spread**2)), rel=1e-12)
    assert null == pytest.approx(expected, abs=0.005)
    assert head_cosine(weights(4, 200, 4096, spread=spread)).mean().item() == pytest.approx(null, rel=0.01)


def test_null_of_heads_with_spreads_of_their_own():
    spreads = torch.tensor([[0.3], [0.9], [1.2]], dtype=torch.float64)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = sum(math.exp(-(spreads[a] ** 2 + spreads[b] ** 2).item() / 2) for a, b in pairs) / 3
    assert head_cosine_null(spreads).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("length", "uniform", "random"), [(64, 0.139, 0.240), (128, 0.1208, 0.214), (1024, 0.086, 0.158)]
)
def test_query_nmi_closed_forms(length, uniform, random):
    eye = torch.eye(length, dtype=torch.float64)
    assert query_nmi(eye).item() == pytest.approx(1, abs=1e-12)
    assert query_nmi(torch.full_like(eye, 1 / length)).item() == pytest.approx(0, abs=1e-12)
    one = torch.zeros_like(eye)
    one[:, 0] = 1
    assert query_nmi(one).item() == 0
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    assert query_nmi_null(mask).item() == pytest.approx(uniform, abs=6e-4)
    assert query_nmi(weights(length, length, causal=True)).item() == pytest.approx(random, abs=0.01)


def test_query_nmi_of_some_queries_is_that_of_these_alone():
    p = weights(2, 9, 9)
    counts = torch.arange(9) % 2 == 0
    torch.testing.assert_close(query_nmi(p, counts), query_nmi(p[:, counts]), rtol=1e-12, atol=0)
    assert query_nmi(p, torch.arange(9) == 4).isnan().all()


def test_query_nmi_is_information_over_entropies():
    p = weights(5, 6)
    keys = p.mean(dim=0)
    information = entropy(keys) - sum(map(entropy, p)) / 5
    assert query_nmi(p).item() == pytest.approx(information / math.sqrt(math.log(5) * entropy(keys)), rel=1e-12)
