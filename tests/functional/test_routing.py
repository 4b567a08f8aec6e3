"""Routing: what a fair router reads, what a collapsed one does, and a slow float64 reference."""

import numpy as np
import pytest
import torch

from lightning_collapse.functional import (
    balance_loss,
    dead_experts_null,
    effective_experts_null,
    load_cv2,
    load_cv2_null,
    load_entropy,
    max_load_null,
    router_conditioning,
    router_similarity,
)
from lightning_collapse.functional.routing import routing_readings, routing_sums
from lightning_collapse.metrics import RouterLoad


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fair(tokens, experts, k, seed=0):
    z = torch.randn(tokens, experts, generator=generator(seed), dtype=torch.float64)
    return z, z.topk(k, dim=1).indices


@pytest.mark.parametrize(("k", "cv2", "largest"), [(8, 0.00684, 1.24), (1, 0.0615, 1.72)])
def test_a_fair_router_reads_its_null(k, cv2, largest):
    assert load_cv2_null(1024, 64, k) == pytest.approx(cv2, rel=2e-3)
    assert max_load_null(1024, 64, k) == pytest.approx(largest, rel=5e-3)
    found = [routing_readings(routing_sums(*fair(1024, 64, k, seed))) for seed in range(60)]
    mean = {name: torch.stack([each[name] for each in found]).mean().item() for name in found[0]}
    assert mean["load_cv2"] == pytest.approx(load_cv2_null(1024, 64, k), rel=0.03)
    assert mean["effective_experts"] == pytest.approx(effective_experts_null(1024, 64, k), rel=2e-3)
    assert 0.9 < mean["max_load"] / max_load_null(1024, 64, k) < 1
    assert mean["balance_loss"] == pytest.approx(1.0, abs=0.03)
    assert mean["dead"] == 0
    assert dead_experts_null(1024, 64, 1) == pytest.approx(6e-6, rel=0.1)


@pytest.mark.parametrize(("experts", "k", "loss"), [(8, 1, 8.0), (64, 8, 8.0)])
def test_all_tokens_to_the_same_experts(experts, k, loss):
    z = torch.full((256, experts), -60.0, dtype=torch.float64)
    z[:, :k] = 60.0
    found = routing_readings(routing_sums(z, z.topk(k, dim=1).indices))
    assert found["balance_loss"].item() == pytest.approx(loss)
    assert found["effective_experts"].item() == pytest.approx(k)
    assert found["max_load"].item() == pytest.approx(experts / k)
    assert found["load_cv2"].item() == pytest.approx(experts / k - 1)
    assert found["dead"].item() == experts - k
    if k == 1:
        assert found["load_entropy"].item() == 0


def test_zero_logits():
    found = routing_readings(routing_sums(torch.zeros(10, 16), torch.zeros(10, 2, dtype=torch.long)))
    assert found["z"].item() == pytest.approx(np.log(16) ** 2, rel=1e-6)
    assert found["token_entropy"].item() == pytest.approx(1.0, rel=1e-6)
    assert found["margin"].item() == 0


def test_rows_of_the_weight():
    assert router_similarity(torch.ones(64, 8)).item() == pytest.approx(1.0)
    assert router_conditioning(torch.ones(64, 8)).item() == 0
    drawn = [torch.randn(64, 1024, generator=generator(seed)) for seed in range(40)]
    similarity = torch.stack([router_similarity(weight) for weight in drawn])
    assert similarity.mean().abs() < 4 * 0.0007 / 40**0.5
    assert similarity.std().item() == pytest.approx(0.0007, rel=0.3)
    assert torch.stack([router_conditioning(weight) for weight in drawn]).mean().item() == pytest.approx(8.4, rel=0.02)
    units = torch.nn.functional.normalize(drawn[0].double(), dim=1)
    cosines = units @ units.T
    pairs = cosines[~torch.eye(64, dtype=torch.bool)].mean().item()
    assert router_similarity(drawn[0].double()).item() == pytest.approx(pairs, rel=1e-9)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_it_is_the_reference(scores):
    z, chosen = fair(50, 6, 2)
    z, kept = z * 2 + 1, np.arange(50) % 5 != 0
    found = routing_readings(routing_sums(z, chosen, scores, torch.from_numpy(kept)))
    x, picks = z.numpy()[kept], chosen.numpy()[kept]
    gates = np.exp(x) if scores == "softmax" else 1 / (1 + np.exp(-x))
    gates = gates / gates.sum(axis=1, keepdims=True)
    counts = np.array([(picks == e).sum() for e in range(6)], dtype=float)
    f = counts / counts.sum()
    ordered = -np.sort(-gates, axis=1)
    expected = {
        "load_cv2": counts.var() / counts.mean() ** 2,
        "load_entropy": -(f * np.log(f)).sum() / np.log(6),
        "max_load": counts.max() / counts.mean(),
        "balance_loss": 6 * (f * gates.mean(axis=0)).sum(),
        "z": (np.log(np.exp(x).sum(axis=1)) ** 2).mean(),
        "token_entropy": -(gates * np.log(gates)).sum(axis=1).mean() / np.log(6),
        "margin": (ordered[:, 1] - ordered[:, 2]).mean(),
        "n": 40,
        "k": 2,
    }
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, rel=1e-9)


def test_where_every_expert_gets_every_token_its_gates_are_the_load():
    z, _ = fair(30, 4, 1)
    found = routing_readings(routing_sums(z))
    mass = z.softmax(dim=1).sum(dim=0)
    assert found["load_cv2"].item() == pytest.approx(load_cv2(mass).item())
    assert found["effective_experts"].item() == pytest.approx(load_entropy(mass).exp().item())
    assert found["margin"].isnan()
    assert balance_loss(mass, mass).item() == pytest.approx(found["balance_loss"].item())


def test_tokens_that_are_no_numbers_are_left_out_and_counted():
    z, chosen = fair(20, 4, 2)
    spoiled = z.clone()
    spoiled[:3, 1] = torch.nan
    found, expected = (routing_readings(routing_sums(*each)) for each in ((spoiled, chosen), (z[3:], chosen[3:])))
    assert (found.pop("nonfinite").item(), expected.pop("nonfinite").item()) == (3, 0)
    assert {n: x.item() for n, x in found.items()} == pytest.approx({n: x.item() for n, x in expected.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_full(dtype):
    z, chosen = fair(500, 8, 2)
    z = z.to(dtype)
    found, expected = (routing_sums(each, chosen) for each in (z, z.double()))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_streams_are_the_whole_in_any_split():
    z, chosen = fair(90, 5, 2)
    expected = routing_readings(routing_sums(z, chosen))
    for split in ([1] * 90, [50, 0, 40]):
        metric = RouterLoad(5)
        for part in zip(z.split(split), chosen.split(split), strict=True):
            metric.update(*part)
        found = metric.compute()
        assert all(torch.allclose(value, expected[name], rtol=1e-12) for name, value in found.items())
        assert metric.nonfinite == 0
