"""Output usage: a slow float64 reference, any layout, and labels that are none of the head's."""

import numpy as np
import pytest
import torch

from lightning_collapse.monitoring.output_usage import GROUPS, NUMBERS, ROWS, usage_sums, usages


def reference(logits, labels, counted):
    """Row after row, in double precision."""
    groups, given = np.zeros(GROUPS), np.zeros(GROUPS)
    for row, label, kept in zip(logits.double().numpy(), labels.tolist(), counted.tolist(), strict=True):
        if kept and label >= 0 and np.isfinite(row).all():
            p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            for v, share in enumerate(p):
                groups[v % GROUPS] += share
            given[label % GROUPS] += 1
    shares = [x[x > 0] / x.sum() for x in (groups, given)]
    return [*(np.exp(-(p * np.log(p)).sum()) for p in shares), given.sum()]


@pytest.mark.parametrize("size", [3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_reference_in_any_layout(size, dtype):
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(4, 6, size, generator=draw)).to(dtype)
    logits[0, 0, 1], labels = torch.nan, torch.randint(-1, size, (4, 6), generator=draw)
    counted = torch.rand(4, 6, generator=draw) > 0.3
    expected = reference(logits.flatten(0, 1), labels.flatten(), counted.flatten())
    for z in (logits, logits.transpose(0, 1).contiguous().transpose(0, 1)):
        np.testing.assert_allclose(usages(usage_sums(z, labels, counted)), expected, rtol=1e-5)


def test_closed_forms_and_labels_of_others():
    counted, labels = torch.ones(8, dtype=torch.bool), torch.arange(8) % 4
    one, all_alike = torch.zeros(8, 4), torch.zeros(8, 4)
    one[:, 2] = 200.0
    assert usages(usage_sums(one, labels, counted)).tolist() == pytest.approx([1, 4, 8])
    assert usages(usage_sums(all_alike, labels, counted)).tolist() == pytest.approx([4, 4, 8])
    for given in (None, labels + 1):  # no head with four outputs has a fifth class
        used, label_usage, labelled = usages(usage_sums(all_alike, given, counted)).tolist()
        assert (used, labelled) == (pytest.approx(4), 0)
        assert np.isnan(label_usage)
    assert usages(usage_sums(one, labels, ~counted)).isnan().tolist() == [True, True, False]


def test_what_is_read_of_a_large_batch_is_spread_over_it():
    half = torch.zeros(4 * ROWS, 4)
    half[: 2 * ROWS, 0] = half[2 * ROWS :, 3] = 200.0
    counted = torch.ones(len(half), dtype=torch.bool)
    used, label_usage, labelled = usages(usage_sums(half, half.argmax(1), counted)).tolist()
    assert (used, label_usage, labelled) == (pytest.approx(2, rel=1e-4), pytest.approx(2, rel=1e-4), ROWS)
    wide, labels = torch.zeros(100, 1).expand(100, NUMBERS // 70), torch.zeros(100, dtype=torch.long)
    assert usage_sums(wide, labels, counted[:100])[1].sum() == 70  # a vocabulary is not copied for all rows
