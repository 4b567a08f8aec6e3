"""Tokens that are one vector, tokens that are independent, and everything between, against plain float64 loops."""

import math

import pytest
import torch

from lightning_collapse.functional import (
    contraction_ratio,
    loudest_token_share,
    mean_mode_ratio,
    relative_residual,
    token_cosine,
    token_cosine_null_std,
    token_moments,
)


def naive(x):
    """Residual, cosine and the share of the longest of one sequence, and both mode norms, pair by pair."""
    x = x.double()
    mean, units, n = x.mean(dim=0), x / x.norm(dim=1, keepdim=True), len(x)
    cosines = [units[i] @ units[j] for i in range(n) for j in range(n) if i != j]
    centered = (x - mean).norm()
    share = (x.norm(dim=1) ** 2).max() / x.norm() ** 2
    return centered / x.norm(), torch.stack(cosines).mean(), share, math.sqrt(n) * mean.norm(), centered


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_reads(moments, sequences):
    expected = [naive(x) for x in sequences]
    for reading, i in ((relative_residual, 0), (token_cosine, 1), (loudest_token_share, 2)):
        assert reading(moments).tolist() == pytest.approx([float(of[i]) for of in expected], rel=1e-9), reading
    mean, centered = (sum(float(of[i]) for of in expected) for i in (3, 4))
    assert float(mean_mode_ratio(moments)) == pytest.approx(mean / centered, rel=1e-9)


def test_every_reading_is_that_of_plain_loops():
    x = drawn(3, 7, 5) + drawn(3, 1, 5, seed=1)
    assert_reads(token_moments(x), x)
    mask = torch.arange(7).expand(3, 7) < torch.tensor([[7], [4], [2]])
    x[1, 5], x[2, 3] = math.nan, math.inf  # padding may hold anything
    assert_reads(token_moments(x, mask), [x[0], x[1, :4], x[2, :2]])


def test_tokens_that_are_no_numbers_do_not_count_and_one_token_is_no_sequence():
    x = drawn(2, 5, 4)
    x[0, 2, 1] = math.nan
    assert_reads(token_moments(x[:1]), [x[0, [0, 1, 3, 4]]])
    assert relative_residual(x[:, :1]).isnan().all()
    assert mean_mode_ratio(x[:, :1]).isnan()


def test_parts_of_sequences_merge_to_the_whole_whatever_the_split():
    x = 1e3 + drawn(3, 12, 5)
    first, second, third = (token_moments(part) for part in x.split([1, 7, 4], dim=1))
    for merged in (first.merge(second).merge(third), third.merge(first.merge(second))):
        for part, whole in zip(merged, token_moments(x), strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)


def test_packed_documents_are_read_as_if_each_stood_alone():
    x, lengths = drawn(2, 12, 5), [[3, 5, 4], [6, 6]]
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    moments = token_moments(x, segments=segments)
    there = moments.n > 0
    documents = [part for row, n in zip(x, lengths, strict=True) for part in row.split(n)]
    assert_reads(type(moments)(*(field[there] for field in moments)), documents)
    beyond = token_moments(drawn(1, 70, 2), segments=torch.arange(70).unsqueeze(0))
    assert beyond.n.tolist() == [1] * 64


def test_a_large_mean_and_a_massive_token_cost_no_digits():
    x = (1000 + drawn(4, 64, 128)).bfloat16()
    exact = (x.double() - x.double().mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    torch.testing.assert_close(token_moments(x).scatter.double(), exact, rtol=1e-6, atol=0)
    sums, squares = x.float().sum(dim=1), x.float().square().sum(dim=(1, 2))
    unshifted = squares - sums.square().sum(dim=1) / 64
    assert ((unshifted / exact - 1).abs() > 0.03).any()
    residual = (exact / x.double().square().sum(dim=(1, 2))).sqrt()
    torch.testing.assert_close(relative_residual(x).double(), residual, rtol=1e-6, atol=0)
    sink = drawn(1, 4096, 16).float()
    sink[0, 0] *= 1000
    exact = (sink.double() - sink.double().mean(dim=1, keepdim=True)).square().sum()
    assert float(token_moments(sink).scatter) == pytest.approx(float(exact), rel=1e-6)
    assert float(loudest_token_share(sink)) > 0.99


def test_independent_tokens_read_the_nulls():
    x = drawn(400, 16, 64)
    assert float(mean_mode_ratio(x)) == pytest.approx(1 / math.sqrt(15), rel=0.02)
    assert float(relative_residual(x).mean()) == pytest.approx(math.sqrt(15 / 16), rel=0.01)
    cosines = token_cosine(x)
    assert float(cosines.std()) == pytest.approx(token_cosine_null_std(16, 64), rel=0.1)
    assert abs(float(cosines.mean())) < 4 * token_cosine_null_std(16, 64) / 20


def test_equal_tokens_are_one_vector_and_the_ratio_is_capped():
    x = drawn(2, 1, 5).expand(2, 9, 5)
    assert float(relative_residual(x).max()) < 1e-7
    assert token_cosine(x).tolist() == pytest.approx([1.0, 1.0])
    assert float(mean_mode_ratio(x)) == pytest.approx(1e6)


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_attention_without_skips_contracts_a_small_residual_by_its_square(mean):
    queries, values = drawn(8, 8, seed=2), drawn(8, 8, seed=3)
    residual = drawn(1, 16, 8, seed=4)
    residual -= residual.mean(dim=1, keepdim=True)
    common = mean * drawn(1, 1, 8, seed=5)

    def ratio(scale):
        x = scale * residual + (common if mean else 0)
        centered = x - x.mean(dim=1, keepdim=True)
        out = (centered @ queries @ centered.mT / math.sqrt(8)).softmax(dim=-1) @ x @ values
        return float(contraction_ratio(token_moments(out), token_moments(x)))

    laws = [ratio(scale) / scale**2 for scale in (0.1, 0.03, 0.01)]
    assert max(laws) / min(laws) < 1.03
