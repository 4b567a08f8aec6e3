"""Largest and smallest attention logits and their bound, against the whole matrix in double precision."""

import pytest
import torch

from lightning_collapse.functional import attention_logits, logit_bound, logit_extremes

BATCH, HEADS, LENGTH, KEYS, WIDTH = 3, 4, 11, 11, 8


def queries_and_keys(kv_heads=HEADS, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(BATCH, HEADS, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    key = torch.randn(BATCH, kv_heads, KEYS, WIDTH, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def reference(query, key, hidden, scale=None):
    """From all logits at once."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.einsum("bhie,bhje->bhij", query, key) * (WIDTH**-0.5 if scale is None else scale)
    hidden = hidden.expand_as(logits)
    upper = logits.masked_fill(hidden, -torch.inf).amax(dim=(0, 2, 3))
    return upper, logits.masked_fill(hidden, torch.inf).amin(dim=(0, 2, 3))


LATER = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
PADDED = torch.arange(KEYS) >= torch.tensor([11, 7, 4]).view(3, 1, 1, 1)
BIAS = torch.linspace(-9, 9, KEYS).expand(1, HEADS, LENGTH, KEYS)
FORMS = {
    "all": ({}, torch.zeros(1, dtype=torch.bool)),
    "causal": ({"is_causal": True}, LATER),
    "boolean": ({"attn_mask": ~LATER}, LATER),
    "padding": ({"attn_mask": ~PADDED}, PADDED),
    "added": ({"attn_mask": torch.zeros(LENGTH, KEYS).masked_fill(LATER, -1e4)}, LATER),
    "bias that hides nothing": (
        {"attn_mask": torch.linspace(-9, 9, KEYS).expand(1, HEADS, LENGTH, KEYS)},
        LATER & False,
    ),
    "queries": ({"query_mask": ~PADDED[:, 0, 0]}, PADDED.mT),
    "scale": ({"scale": 0.3}, torch.zeros(1, dtype=torch.bool)),
}


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("block", [1, 50, 10**6])
@pytest.mark.parametrize("form", FORMS)
def test_all_pairs_that_are_seen_in_blocks_of_any_size(form, block, kv_heads, monkeypatch):
    monkeypatch.setattr(attention_logits, "BLOCK_ON_CPU", block)
    query, key = queries_and_keys(kv_heads)
    options, hidden = FORMS[form]
    found = logit_extremes(query, key, **options)
    for value, expected in zip(found, reference(query, key, hidden, options.get("scale")), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_no_logit_exceeds_the_bound_and_one_pair_attains_it(kv_heads):
    query, key = queries_and_keys(kv_heads)
    highest, lowest = logit_extremes(query, key)
    bound = logit_bound(query, key)
    assert (torch.maximum(highest, -lowest) <= bound).all()
    longest = query.flatten(2, 3)[..., :WIDTH]
    same = torch.nn.functional.normalize(longest, dim=-1).unsqueeze(2)
    torch.testing.assert_close(logit_bound(same, same), logit_extremes(same, same).highest, rtol=1e-12, atol=0)


def test_half_precision_is_read_in_single():
    query, key = queries_and_keys(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, bound = logit_extremes(query, key), logit_bound(query, key)
    assert found.highest.dtype == bound.dtype == torch.float32
    expected = reference(query.double(), key.double(), torch.zeros(1, dtype=torch.bool))[0].float()
    torch.testing.assert_close(found.highest, expected)


def test_what_no_query_sees_has_no_extremes_and_nan_is_told():
    query, key = queries_and_keys()
    found = logit_extremes(query, key, query_mask=torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    assert found.highest.tolist() == [-torch.inf] * HEADS
    assert found.lowest.tolist() == [torch.inf] * HEADS
    query[1, 2, 3] = torch.nan
    assert logit_extremes(query, key).highest.isnan().tolist() == [False, False, True, False]


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        logit_extremes(torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4))
