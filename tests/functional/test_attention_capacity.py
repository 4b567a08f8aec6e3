"""Effective keys, leads, sinks and what keys fill, against the closed forms."""

import math

import pytest
import torch

from lightning_collapse.functional import (
    effective_keys,
    key_participation,
    key_participation_null,
    logit_lead,
    retrieval_lead,
    sink_weight,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_effective_keys_of_gaussian_logits():
    found = effective_keys(normal(400, 1024).softmax(dim=-1))
    assert found.simpson.mean().item() / 1024 == pytest.approx(math.exp(-1), rel=0.04)
    assert found.shannon.mean().item() / 1024 == pytest.approx(math.exp(-0.5), rel=0.01)
    assert (found.simpson <= found.shannon).all()


@pytest.mark.parametrize("keys", [1, 3, 64])
def test_equal_weights_on_some_keys(keys):
    row = torch.zeros(64, dtype=torch.float64)
    row[:keys] = 1 / keys
    assert [value.item() for value in effective_keys(row)] == pytest.approx([keys, keys], rel=1e-12)


@pytest.mark.parametrize(("keys", "lead"), [(256, 7.74), (1024, 9.13), (8192, 11.21)])
def test_retrieval_lead_is_what_a_weight_of_nine_tenths_takes(keys, lead):
    assert retrieval_lead(keys) == pytest.approx(lead, abs=0.005)
    logits = torch.zeros(keys, dtype=torch.float64)
    logits[3] = retrieval_lead(keys)
    row = logits.softmax(dim=-1)
    assert row[3].item() == pytest.approx(0.9, rel=1e-12)
    assert logit_lead(row, torch.tensor(float(keys), dtype=torch.float64)).item() == pytest.approx(1, rel=1e-12)


def test_lead_is_over_one_where_a_weight_is_over_nine_tenths_whatever_the_others():
    row = torch.tensor([[0.91, 0.08, 0.01, 0.0], [0.89, 0.08, 0.03, 0.0], [0.25] * 4], dtype=torch.float64)
    leads = logit_lead(row, torch.full((3,), 4.0, dtype=torch.float64))
    assert (leads >= 1).tolist() == [True, False, False]
    assert leads[2].item() == pytest.approx(0, abs=1e-12)
    assert logit_lead(torch.ones(1), torch.ones(())).isnan()


@pytest.mark.parametrize("bad", [(1, 0.1), (5, 0.0), (5, 1.0)])
def test_leads_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="`keys` must be at least 2"):
        retrieval_lead(*bad)


def test_sink_is_the_first_key_that_is_seen():
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    uniform = causal.double() / causal.sum(dim=-1, keepdim=True)
    assert sink_weight(uniform, causal).item() == pytest.approx(sum(1 / i for i in range(1, 9)) / 8, rel=1e-12)
    left = torch.ones(4, 6, dtype=torch.bool)
    left[:, :2] = False  # padding on the left
    row = torch.zeros(4, 6, dtype=torch.float64)
    row[:, 2] = 0.7
    row[:, 3] = 0.3
    assert sink_weight(row, left).item() == pytest.approx(0.7, rel=1e-12)
    assert sink_weight(row, left & False).isnan()


@pytest.mark.parametrize(("keys", "value"), [(1024, 0.941), (128, 0.667), (40, 0.385)])
def test_gaussian_keys_read_their_null(keys, value):
    assert key_participation_null(keys, 64) == pytest.approx(value, abs=1e-3)
    assert key_participation(normal(50, keys, 64)).mean().item() == pytest.approx(value, abs=0.01)


def test_keys_that_count():
    key = normal(20, 8)
    counts = torch.arange(20) < 13
    assert key_participation(key, counts).item() == pytest.approx(key_participation(key[:13]).item(), rel=1e-12)
    assert key_participation(torch.zeros(4, 3)).isnan()
    assert key_participation(normal(30, 1) @ normal(1, 5)).item() == pytest.approx(1 / 5, rel=1e-12)
