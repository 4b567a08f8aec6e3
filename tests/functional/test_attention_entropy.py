"""Entropy of attention against the dense definition in double precision, closed forms and the bound's equality case."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lightning_collapse.functional import attention_entropy, attention_rows, entropy_bound

B, H, L, S, E = 3, 4, 70, 70, 16
LOWEST = torch.finfo(torch.float32).min


def dense(query, key, is_causal=False, attn_mask=None, scale=None):
    """Entropy of every row and the number of keys it sees, from the definition."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask.double()
    p = logits.softmax(dim=-1)
    return -torch.xlogy(p, p).sum(dim=-1), (logits > LOWEST / 2).sum(dim=-1), logits


def make(length=L, keys=S, heads=H, key_heads=H, sharpness=3.0):
    generator = torch.Generator().manual_seed(1)
    query = sharpness * torch.randn(B, heads, length, E, generator=generator)
    return query, torch.randn(B, key_heads, keys, E, generator=generator)


def a_mask(kind):
    shown = torch.rand(B, 1, L, S, generator=torch.Generator().manual_seed(2)) > 0.3
    if kind == "padding":
        shown = (torch.arange(S) < torch.tensor([70, 40, 10]).unsqueeze(1))[:, None, None]
    if kind == "bias":
        return torch.randn(1, H, L, S, generator=torch.Generator().manual_seed(3))
    if kind in ("-inf", "lowest"):
        return torch.zeros(shown.shape).masked_fill(~shown, -torch.inf if kind == "-inf" else LOWEST)
    return shown if kind in ("bool", "padding") else shown[0, 0]


CASES = {
    "none": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7},
    **{kind: {"attn_mask": a_mask(kind)} for kind in ("bool", "padding", "bias", "-inf", "lowest", "two dimensions")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_heads", [H, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_exact_is_the_definition(case, key_heads, dtype):
    query, key = (tensor.to(dtype) for tensor in make(key_heads=key_heads))
    found = attention_entropy(query, key, **CASES[case])
    entropy, visible, _ = dense(query, key, **CASES[case])
    normalized = entropy / visible.clamp_min(2).log()
    counts = (visible > 1).expand_as(entropy)
    assert found.normalized.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.entropy.double(), entropy.mean(dim=(0, 2)), rtol=1e-5, atol=1e-6)
    mean = normalized.where(counts, 0).sum(dim=(0, 2)) / counts.sum(dim=(0, 2))
    torch.testing.assert_close(found.normalized.double(), mean, rtol=1e-5, atol=1e-6)
    lowest = normalized.where(counts, 9).amin(dim=(0, 2))
    torch.testing.assert_close(found.lowest.double(), lowest, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.rows, counts.sum(dim=(0, 2)))
    assert torch.equal(found.standard_error, torch.zeros_like(found.standard_error))


@pytest.mark.parametrize("keys", [30, 100])
def test_causal_attention_of_unequal_lengths_starts_top_left_like_torch(keys):
    query, key = make(keys=keys)
    value = torch.eye(keys).expand(B, H, keys, keys)
    weights = F.scaled_dot_product_attention(query, key, value, is_causal=True).double()
    entropy = -torch.xlogy(weights, weights).sum(dim=-1)
    torch.testing.assert_close(
        attention_entropy(query, key, is_causal=True).entropy.double(), entropy.mean(dim=(0, 2)), rtol=1e-4, atol=1e-5
    )
    few = attention_entropy(query, key, is_causal=True, rows=L)
    torch.testing.assert_close(few.entropy.double(), entropy.mean(dim=(0, 2)), rtol=1e-4, atol=1e-5)


def test_closed_forms():
    key = torch.eye(8).reshape(1, 1, 8, 8)
    rows = torch.zeros(3, 8)
    rows[1, 0], rows[2, :2] = 1e4, 1e4  # all keys alike; one; two
    for i, (nats, keys) in enumerate([(math.log(8), 8), (0.0, 8), (math.log(2), 8)]):
        for options in ({}, {"rows": 1}):
            found = attention_entropy(rows[i].reshape(1, 1, 1, 8).repeat(1, 1, 20, 1), key, **options)
            assert found.entropy.item() == pytest.approx(nats, abs=2e-3 if i == 2 else 1e-6)
            assert found.normalized.item() == pytest.approx(nats / math.log(keys), abs=1e-3)


def test_uniform_causal_attention():
    query = torch.zeros(1, 1, 128, 4)
    found = attention_entropy(query, torch.randn(1, 1, 128, 4), is_causal=True)
    assert found.entropy.item() == pytest.approx(math.lgamma(129) / 128, rel=1e-6)
    assert found.entropy.item() == pytest.approx(3.8782, abs=5e-5)
    assert found.normalized.item() == pytest.approx(1.0, abs=1e-6)  # not the 0.80 of dividing by log 128
    assert found.rows.item() == 127  # the first query has nothing to choose from


@pytest.mark.parametrize("case", ["none", "causal", "padding", "bias"])
def test_a_sample_lies_within_its_standard_error(case):
    length = 600
    query, key = make(length=length, keys=length, sharpness=2.0)
    query = query * torch.linspace(0.3, 2.0, length).unsqueeze(1)  # a trend along the sequence
    options = {
        "none": {},
        "causal": {"is_causal": True},
        "padding": {"attn_mask": (torch.arange(length) < 400).reshape(1, 1, 1, length)},
        "bias": {"attn_mask": torch.randn(1, H, 1, length)},
    }[case]
    exact, few = attention_entropy(query, key, **options), attention_entropy(query, key, **options, rows=16)
    assert ((few.normalized - exact.normalized).abs() < 3 * few.standard_error).all()
    assert (few.standard_error < 0.05 * few.normalized).all()
    assert (few.rows <= 16 * B).all()


def test_standard_error_tells_how_far_samples_lie():
    """Over many data sets the error of the estimate has the size that is stated."""
    ratios = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        query, key = (2 * torch.randn(2, 4, 256, 8, generator=generator) for _ in range(2))
        exact, few = attention_entropy(query, key), attention_entropy(query, key, rows=16)
        ratios.append((few.normalized - exact.normalized) / few.standard_error)
    ratios = torch.cat(ratios)
    assert 0.8 < ratios.square().mean().sqrt() < 1.25
    assert ratios.mean().abs() < 0.3


@pytest.mark.parametrize("size", [1, 7 * S, 3 * L * S, 2**20])
def test_fused_and_in_blocks_agree(monkeypatch, size):
    query, key = make()
    for options in ({}, {"is_causal": True}, {"attn_mask": a_mask("bool")}):
        fused = attention_entropy(query, key, **options)
        with monkeypatch.context() as patch:
            patch.setattr(attention_rows, "_fused", lambda call: None)
            patch.setattr(attention_rows, "BLOCK_ON_CPU", size)
            blocks = attention_entropy(query, key, **options)
        for name in ("entropy", "normalized", "rows"):
            torch.testing.assert_close(getattr(fused, name), getattr(blocks, name), rtol=1e-5, atol=1e-6)


def test_peaked_heads_in_half_precision():
    """Where fused attention in bfloat16 is ten percent off."""
    query, key = make(sharpness=64.0)
    query, key = query.bfloat16(), key.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_entropy(query, key)
    torch.testing.assert_close(found.entropy.double(), dense(query, key)[0].mean(dim=(0, 2)), rtol=1e-3, atol=1e-6)


def test_entropy_falls_with_the_scale_of_the_logits():
    query, key = make()
    for options in ({}, {"rows": 16}):
        entropies = [attention_entropy(query, key, scale=k, **options).normalized for k in (0.0, 0.1, 0.3, 1.0, 3.0)]
        assert torch.allclose(entropies[0], torch.ones(H))
        assert all((after < before).all() for before, after in pairwise(entropies))


def test_padding_does_not_count():
    query, key = (tensor.double() for tensor in make())
    real = torch.arange(L) < 40
    for options in ({}, {"rows": L}):
        padded = attention_entropy(
            query, key, attn_mask=real.expand(B, 1, 1, L), query_mask=real.expand(B, L), **options
        )
        cut = attention_entropy(query[:, :, :40], key[:, :, :40], **options)
        for name in ("entropy", "normalized", "lowest", "rows"):
            torch.testing.assert_close(getattr(padded, name), getattr(cut, name), rtol=1e-5, atol=1e-6)


def test_logits_and_bound_of_what_was_read():
    query, key = make()
    for options in ({}, {"is_causal": True}, {"attn_mask": a_mask("bias")}):
        found = attention_entropy(query, key, **options, rows=L)
        _, visible, logits = dense(query, key, **options)
        torch.testing.assert_close(found.max_logit.double(), logits.amax(dim=(0, 2, 3)), rtol=1e-5, atol=1e-5)
        seen = logits.where(logits.isfinite(), 0.0)
        mean = (seen.sum(dim=-1) / visible).unsqueeze(-1)
        norm = (seen - mean).where(logits.isfinite(), 0.0).norm(dim=-1)
        counts = (visible > 1).expand_as(norm)
        bound = (entropy_bound(norm, visible.expand_as(norm)) / visible.log()).where(counts, 0.0)
        expected = bound.sum(dim=(0, 2)) / counts.sum(dim=(0, 2))
        torch.testing.assert_close(found.bound.double(), expected, rtol=1e-4, atol=1e-6)
        assert (found.bound <= found.normalized).all()


@pytest.mark.parametrize("keys", [2, 3, 10, 1000])
def test_bound_is_attained_and_never_passed(keys):
    norm = torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 40.0], dtype=torch.float64)
    count = torch.full_like(norm, keys)
    bound = entropy_bound(norm, count)
    logits = (-norm / math.sqrt(keys * (keys - 1))).unsqueeze(1).repeat(1, keys)
    logits[:, 0] = norm * math.sqrt((keys - 1) / keys)
    assert torch.allclose(logits.norm(dim=1), norm)
    p = logits.softmax(dim=1)
    torch.testing.assert_close(-torch.xlogy(p, p).sum(dim=1), bound, rtol=1e-9, atol=1e-12)
    others = torch.randn(2000, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sinh()
    others = others - others.mean(dim=1, keepdim=True)
    others = others / others.norm(dim=1, keepdim=True)
    for sigma, least in zip(norm, bound, strict=True):
        p = (sigma * others).softmax(dim=1)
        assert (-torch.xlogy(p, p).sum(dim=1) >= least - 1e-9).all()
    assert entropy_bound(torch.ones(1), torch.ones(1)).isnan()


def test_nan_goes_through_and_to_its_own_head_only():
    query, key = make()
    query[0, 1] = torch.nan
    for options in ({}, {"rows": 16}, {"is_causal": True}, {"attn_mask": a_mask("bias")}):
        found = attention_entropy(query, key, **options)
        for name in ("entropy", "normalized", "lowest"):
            assert getattr(found, name).isnan().tolist() == [False, True, False, False], (options, name)


def test_nothing_to_see_reads_nan():
    query, key = make()
    found = attention_entropy(query, key, attn_mask=torch.zeros(L, S, dtype=torch.bool))
    assert found.entropy.isnan().all()
    assert found.normalized.isnan().all()
    assert not found.rows.any()
    assert attention_entropy(query, key[:, :, :1]).normalized.isnan().all()


def test_no_random_number_no_graph_and_the_same_every_time():
    query, key = (tensor.requires_grad_() for tensor in make())
    before = torch.random.get_rng_state()
    first, second = attention_entropy(query, key, rows=16), attention_entropy(query, key, rows=16)
    assert all(map(torch.equal, first, second))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not any(value.requires_grad for value in (*first, *attention_entropy(query, key)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"query": torch.zeros(2, 3, 4)}, r"`query` and `key` must have shape \(B, H, L, E\), got \(2, 3, 4\)"),
        ({"key": torch.zeros(B, 3, S, E)}, "heads of `query` be a multiple"),
        ({"key": torch.zeros(B, H, S, 8)}, "does not fit"),
        ({"is_causal": True, "attn_mask": torch.zeros(L, S)}, "not both"),
        ({"query_mask": torch.ones(B, 3, dtype=torch.bool)}, r"`query_mask` must have shape \(3, 70\), got \(3, 3\)"),
        ({"rows": 0}, "`rows` must be at least 1, or None to read all, got 0"),
    ],
)
def test_wrong_arguments(change, match):
    query, key = make()
    with pytest.raises(ValueError, match=match):
        attention_entropy(**{"query": query, "key": key, **change})


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": a_mask("bool")}])
def test_on_cuda(options):
    query, key = make()
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    found = attention_entropy(query.cuda(), key.cuda(), **moved)
    expected = dense(query, key, **options)[0].mean(dim=(0, 2))
    torch.testing.assert_close(found.entropy.cpu().double(), expected, rtol=1e-3, atol=1e-5)
