"""LiDAR, streaming: the functional of all samples, however they arrive."""

import pytest
import torch

from lightning_collapse.functional import lidar
from lightning_collapse.metrics import LiDAR

D = 6


def draw(n, q=3, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    signal, noise = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, D), (q, n, D)))
    return offset + signal * torch.linspace(3, 0.1, D, dtype=torch.float64) + noise


def read(metric, *batches):
    for views in batches:
        metric.update(*views)
    return {name: value.item() for name, value in metric.compute().items()}


def expected(views, **kwargs):
    return dict(zip(("lidar", "excess", "n"), map(float, lidar(*views, **kwargs)), strict=True))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("split", [[60], [1, 2, 40, 17], [0, 30, 0, 30], [1] * 60])
def test_any_split(offset, split):
    views = draw(60, offset=offset)
    for kwargs in ({}, {"relative": True}, {"delta": 0.1, "eps": 1e-3}):
        assert read(LiDAR(D, **kwargs), *views.split(split, dim=1)) == pytest.approx(
            expected(views, **kwargs), rel=1e-9
        )


def test_forward_returns_the_batch_and_accumulates():
    metric, views = LiDAR(D), draw(60)
    for batch in views.split(30, dim=1):
        found = {name: value.item() for name, value in metric(*batch).items()}
        assert found == pytest.approx(expected(batch), rel=1e-9)
    assert read(metric) == pytest.approx(expected(views), rel=1e-9)


def test_merged_streams_are_one_stream():
    views, others = draw(20), draw(40, offset=50.0, seed=1)
    for form in (lambda m: m, lambda m: m.metric_state):
        metric, other = LiDAR(D), LiDAR(D)
        metric.update(*views)
        metric.compute()
        other.update(*others)
        metric.merge_state(form(other))
        assert read(metric) == pytest.approx(expected(torch.cat([views, others], dim=1)), rel=1e-9)
    with pytest.raises(ValueError, match="of `dim=6`"):
        LiDAR(D).merge_state(LiDAR(D + 1))


def test_half_views_are_summed_in_double():
    views = draw(60).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read(LiDAR(D).half(), *views.split(13, dim=1))
    assert found == pytest.approx(expected(views.double()), rel=1e-9)


def test_numbers_that_overflow_read_nan():
    assert torch.tensor(read(LiDAR(D), draw(60) * 1e200)["lidar"]).isnan()


def test_bad_arguments():
    with pytest.raises(ValueError, match="`dim` must be positive, got 0"):
        LiDAR(0)
    with pytest.raises(ValueError, match="`delta` must be positive, got 0"):
        LiDAR(D, delta=0)
    with pytest.raises(ValueError, match=r"`views` must have shape \(Q, N, 6\)"):
        LiDAR(D).update(torch.ones(3, 5), torch.ones(3, 5))
    with pytest.raises(ValueError, match="two or more"):
        LiDAR(D).update(torch.ones(3, 6))
