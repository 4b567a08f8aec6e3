"""Query-key increments by cores, against the dense product in double precision."""

import pytest
import torch

from lightning_collapse.functional import qk_increments


def weights(*shape, scale=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    steps = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (*before, *steps)]


def read(query, key, query_step, key_step):
    return qk_increments(query, key, query + query_step, key + key_step)


def dense(matrix):
    values = torch.linalg.svdvals(matrix)
    shares = values.square() / values.square().sum(dim=-1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(dim=-1)
    return values.norm(dim=-1), values.square().sum(dim=-1) / values[..., 0].square(), entropy.exp()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("shape", [(3, 40, 8), (2, 2, 16, 4), (12, 20)])
def test_cores_read_what_dense_products_do(shape, scale):
    query, key, query_step, key_step = weights(*shape, scale=scale)
    found = read(query, key, query_step, key_step)
    # the differences of stored weights, not the steps: they round
    query_step, key_step = query + query_step - query, key + key_step - key
    first, second = query_step @ key.mT + query @ key_step.mT, query_step @ key_step.mT
    total = (query + query_step) @ (key + key_step).mT - query @ key.mT
    torch.testing.assert_close(first + second, total, rtol=0, atol=1e-12)
    for increment, matrix in zip(found, (first, second), strict=True):
        for value, expected in zip(increment, dense(matrix), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_orders():
    query, key, query_step, key_step = weights(64, 16, scale=1e-3)
    small, large = read(query, key, query_step, key_step), read(query, key, 10 * query_step, 10 * key_step)
    assert (large.delta2.norm / small.delta2.norm).item() == pytest.approx(10, rel=1e-9)
    assert (large.delta3.norm / small.delta3.norm).item() == pytest.approx(100, rel=1e-9)


def test_gaussian_weights_and_steps_read_the_null():
    found = read(*weights(8, 256, 64, scale=1e-2))
    assert found.delta2.effective_rank.mean().item() == pytest.approx(81, abs=1.5)
    assert found.delta2.stable_rank.mean().item() == pytest.approx(30, abs=1.5)
    assert found.delta3.effective_rank.mean().item() == pytest.approx(50, abs=1)


def rank_one(scale=1e-2):
    query, key, *_ = weights(8, 256, 64)
    a, b, c, d = torch.randn(4, 8, 256, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return query, key, scale * a @ b[:, :64].mT, scale * c @ d[:, :64].mT


def test_steps_of_rank_one():
    found = read(*rank_one())
    assert found.delta2.effective_rank.mean().item() == pytest.approx(1.98, abs=0.02)
    torch.testing.assert_close(found.delta3.effective_rank, torch.ones(8, dtype=torch.float64), rtol=1e-9, atol=0)


def test_half_precision_reads_the_spectrum_of_rounding():
    query, key, query_step, key_step = rank_one()
    norm = query.norm() / query_step.norm() * 1e-3
    stored = [x.bfloat16() for x in (query, key, query + norm * query_step, key + norm * key_step)]
    assert qk_increments(*stored).delta2.effective_rank.mean().item() > 30


def test_nothing_that_moved_and_nothing_that_is_finite():
    query, key, query_step, key_step = weights(2, 12, 3)
    for increment in qk_increments(query, key, query, key):
        assert [value.tolist() for value in increment] == [[0, 0]] * 3
    query_step[0, 1, 1] = torch.inf
    found = read(query, key, query_step, key_step)
    assert found.delta2.norm.isnan().tolist() == [True, False]
    assert found.delta2.norm[1].isfinite()


def test_shapes_that_differ():
    with pytest.raises(ValueError, match=r"one shape \(..., d, d_k\)"):
        qk_increments(*[torch.zeros(4, 2)] * 3, torch.zeros(4, 3))
