"""Keys that a mask hides do not count, whatever number hides them; position biases hide none, sinks are no keys."""

import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import attention_entropy, attention_rows
from lightning_collapse.metrics import AttentionEntropy
from lightning_collapse.utilities.attention_calls import is_visible, is_visible_logit, logits_of_softmax

B, H, L = 2, 3, 20
NUMBERS = {"-inf": -torch.inf, "-1e9": -1e9, "-1e4": -1e4, "lowest": torch.finfo(torch.float32).min}
NUMBERS |= {name: torch.finfo(getattr(torch, name)).min for name in ("float16", "bfloat16")}
HALF = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
CASES = [(torch.float32, name) for name in NUMBERS]
CASES += [(dtype, name) for dtype, lowest in HALF.items() for name in ("-inf", "-1e4", lowest)]

every_case = pytest.mark.parametrize(("dtype", "name"), CASES, ids=[f"{d}-{n}" for d, n in CASES])


def causal(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    return torch.zeros(L, L, dtype=dtype).masked_fill(later, NUMBERS[name])


def padding(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    hidden = torch.arange(L) >= torch.tensor([L, 7]).reshape(B, 1, 1, 1)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, NUMBERS[name])


def uniform(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.zeros(B, H, L, 4, dtype=dtype), torch.randn(B, H, L, 4).to(dtype)


@every_case
@pytest.mark.parametrize("make", [causal, padding])
def test_uniform_attention_over_the_keys_that_are_left_reads_one(make, dtype, name) -> None:
    query, key = uniform(dtype)
    mask = make(name, dtype)
    for rows in (None, 5, L):
        found = attention_entropy(query, key, attn_mask=mask, rows=rows)
        expected = attention_entropy(query, key, attn_mask=mask == 0, rows=rows)
        assert found.normalized.tolist() == pytest.approx([1.0] * H, abs=1e-6)
        assert found.bound.tolist() == pytest.approx([1.0] * H, abs=1e-6)
        assert found.max_logit.tolist() == [0.0] * H
        assert torch.equal(found.rows, expected.rows)
        metric = AttentionEntropy(H, rows=rows)
        metric.update(query, key, attn_mask=mask)
        assert metric.compute().tolist() == pytest.approx([1.0] * H, abs=1e-6)
        assert torch.equal(metric.count, expected.rows)


@every_case
def test_logits_that_hold_their_mask(dtype, name) -> None:
    query, key = uniform(dtype)
    query = query + torch.randn(B, H, L, 4).to(dtype)
    logits = query @ key.mT
    found = attention_rows.rows_of_masked_logits(logits + causal(name, dtype))
    expected = attention_rows.rows_of_logits(logits.float(), causal("-inf").isinf())
    assert torch.equal(found.visible, expected.visible)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logit_norm, expected.logit_norm, rtol=1e-4, atol=1e-5)


def test_a_position_bias_hides_nothing() -> None:
    distance = (torch.arange(1000) - torch.arange(1000).unsqueeze(1)).abs()
    biases = -distance * torch.tensor([0.5, 1.0, 4.0])[:, None, None]  # four times the steepest of ALiBi's slopes
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert is_visible(biases.to(dtype)).all()


def test_hidden_is_judged_by_the_largest_of_the_row() -> None:
    mask = causal("-1e4")
    shifts = 100 * torch.randn(L, 1)
    assert torch.equal(is_visible(mask + shifts), mask == 0)
    assert torch.equal(is_visible(mask + 2e4), mask == 0)
    query, key = (torch.randn(B, H, L, 4) for _ in range(2))
    found, expected = (attention_entropy(query, key, attn_mask=m) for m in (mask + shifts, mask == 0))
    torch.testing.assert_close(found.normalized, expected.normalized, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_row_that_sees_no_key_does_not_count(name: str) -> None:
    mask = causal(name)
    mask[-5:] = NUMBERS[name]
    query, key = (torch.randn(B, H, L, 4) for _ in range(2))
    found, expected = (attention_entropy(query, key, attn_mask=m) for m in (mask, mask == 0))
    assert torch.equal(found.rows, expected.rows)
    torch.testing.assert_close(found.normalized, expected.normalized)
    assert not attention_entropy(query, key, attn_mask=torch.full((L, L), NUMBERS[name])).rows.any()


def test_a_head_that_explodes_hides_no_key() -> None:
    logits = torch.randn(B, H, L, L)
    logits[:, 1] *= 1e5
    assert is_visible_logit(logits).all()
    logits[:, :, :, -1] -= 1e9
    assert torch.equal(is_visible_logit(logits).sum(dim=-1), torch.full((B, H, L), L - 1))


@pytest.mark.parametrize("subtract", [False, True], ids=["plain", "less the row's largest"])
@pytest.mark.parametrize("masked", [None, "-inf", "-1e9"])
def test_a_learned_sink_is_no_key(masked, subtract: bool) -> None:
    """Written as public models do: a column beside those of the keys, dropped after the softmax."""
    keys = torch.randn(B, H, L, L) if masked is None else torch.randn(B, H, L, L) + causal(masked)
    logits = torch.cat([keys, torch.tensor([3.0, -1.0, 9.0]).reshape(1, H, 1, 1).expand(B, H, L, 1)], dim=-1)
    logits = logits - logits.amax(dim=-1, keepdim=True) if subtract else logits
    found = attention_rows.rows_of_masked_logits(logits_of_softmax(logits, None, L, B * L))
    expected = attention_rows.rows_of_masked_logits(keys)
    assert torch.equal(found.visible, expected.visible)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-4, atol=1e-5)


def test_a_column_more_that_a_row_hides_is_a_key() -> None:
    logits = torch.cat([torch.zeros(B, H, L, 1), causal("-inf").expand(B, H, L, L)], dim=-1)  # a key before the first
    found = attention_rows.rows_of_masked_logits(logits_of_softmax(logits, None, L, B * L))
    assert torch.equal(found.visible, torch.arange(2.0, L + 2).expand(B, H, L))
