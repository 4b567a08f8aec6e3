"""The streaming metric: the functional of all rows, however they arrive."""

import pickle

import pytest
import torch
from torch import nn

from lightning_collapse.functional import attention_entropy
from lightning_collapse.metrics import AttentionEntropy


def batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(2 * torch.randn(n, 4, 20, 8, generator=generator) for _ in range(2)) for n in sizes]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_any_split_reads_the_same_as_all_at_once(options):
    parts = batches([5, 1, 3])
    metric = AttentionEntropy(num_heads=4)
    for query, key in parts:
        metric.update(query, key, **options)
    query, key = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    expected = attention_entropy(query.double(), key.double(), **options)
    torch.testing.assert_close(metric.compute(), expected.normalized, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metric.lowest, expected.lowest, rtol=1e-4, atol=1e-5)
    assert torch.equal(metric.count, expected.rows)
    assert torch.equal(metric.histogram.sum(dim=1), metric.count)
    copy = pickle.loads(pickle.dumps(metric))
    assert torch.equal(copy.compute(), metric.compute())
    metric.reset()
    assert not metric.count.any()


def test_histogram_and_squares():
    metric = AttentionEntropy(num_heads=1, bins=4)
    keys = torch.eye(4).reshape(1, 1, 4, 4)
    rows = torch.tensor([[0.0, 0, 0, 0], [1e4, 0, 0, 0], [1e4, 1e4, 0, 0]])
    metric.update(rows.reshape(1, 1, 3, 4), keys)
    assert metric.histogram.tolist() == [[1, 0, 1, 1]]  # 0, 1/2 and 1
    assert metric.squares.item() == pytest.approx(1.25, abs=1e-3)
    assert metric.compute().item() == pytest.approx(0.5, abs=1e-3)


def test_rows_with_nan_are_left_out_and_counted():
    (query, key), *_ = batches([2])
    clean = AttentionEntropy(num_heads=4)
    clean.update(query[:1], key[:1])
    query[1] = torch.nan
    metric = AttentionEntropy(num_heads=4)
    metric.update(query, key)
    torch.testing.assert_close(metric.compute(), clean.compute())
    assert metric.nonfinite.tolist() == [20] * 4


def test_merging_is_seeing_both():
    first, second = batches([3, 4])
    metric, other, both = (AttentionEntropy(num_heads=4, rows=8) for _ in range(3))
    metric.update(*first)
    other.update(*second)
    both.update(*first)
    both.update(*second)
    metric.merge_state(other)
    for state in ("count", "total", "squares", "lowest", "histogram"):
        torch.testing.assert_close(getattr(metric, state), getattr(both, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    (query, key), *_ = batches([2])
    metric, full = AttentionEntropy(num_heads=4), AttentionEntropy(num_heads=4)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(query.to(dtype), key.to(dtype))
    full.update(query.to(dtype).double(), key.to(dtype).double())
    torch.testing.assert_close(metric.compute(), full.compute(), rtol=1e-5, atol=1e-6)


def test_wrong_arguments():
    for options, match in (({"num_heads": 0}, "`num_heads`"), ({"num_heads": 1, "bins": 0}, "`bins`")):
        with pytest.raises(ValueError, match=match):
            AttentionEntropy(**options)
    with pytest.raises(ValueError, match="has 4 heads, but `num_heads` is 2"):
        AttentionEntropy(num_heads=2).update(*batches([1])[0])


def test_sums_keep_their_precision_when_the_model_is_converted():
    query, key = torch.randn(4, 2, 300, 8), torch.randn(4, 2, 300, 8)
    metric, held = AttentionEntropy(2), nn.Module()
    held.metric = AttentionEntropy(2)
    held.to(torch.bfloat16)  # as `Trainer(precision="bf16-true")` does
    for _ in range(3):
        metric.update(query, key)
        held.metric.update(query, key)
    assert torch.equal(held.metric.compute(), metric.compute())
