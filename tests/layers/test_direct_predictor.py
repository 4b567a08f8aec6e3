"""A predictor in closed form: its weight, its statistics over steps and processes, and what it does to a spectrum."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_collapse.layers import DirectPredictor
from tests.distributed.launch import spawn

DIM = 6
FORMS = [(method, form) for method in ("direct_pred", "direct_copy") for form in ("code", "paper")]
every_form = pytest.mark.parametrize(("method", "convention"), FORMS)


def batch(seed: int = 0, rows: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=generator) / DIM
    return torch.randn(rows, DIM, generator=generator) @ mix + 0.2


def naive_weight(f: np.ndarray, method: str, convention: str, eps: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(f)
    top = values.max()
    if method == "direct_copy":
        return f / (top if convention == "paper" else 1.0) + eps * np.eye(len(f))
    w = np.zeros_like(f)
    for s, u in zip(values, vectors.T, strict=True):
        p = np.sqrt(s) + eps * top if convention == "paper" else max(np.sqrt(s / top) + eps, 1e-4)
        w += p * np.outer(u, u)
    return w


def naive_correlation(*views: Tensor) -> np.ndarray:
    rows = np.concatenate([view.double().numpy() for view in views])
    return sum(np.outer(row, row) for row in rows) / len(rows)


@every_form
@pytest.mark.parametrize("eps", [0.0, 0.01, 0.3])
def test_weight_is_the_reference(method: str, convention: str, eps: float) -> None:
    predictor = DirectPredictor(DIM, method, convention, decay=0.3, eps=eps).double()
    steps = [(batch(seed).double(), batch(seed + 10).double()) for seed in range(3)]
    running = None
    for views in steps:
        predictor.update(*views)
        now = naive_correlation(*views)
        running = now if running is None else 0.3 * running + 0.7 * now
    np.testing.assert_allclose(predictor.correlation.numpy(), running, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(predictor.weight.numpy(), naive_weight(running, method, convention, eps), atol=1e-10)
    assert predictor.updates == 3
    z = torch.randn(4, 3, DIM, dtype=torch.float64)
    torch.testing.assert_close(predictor(z), z @ predictor.weight)


def test_the_weight_is_of_no_optimizer_and_of_no_graph() -> None:
    predictor = DirectPredictor(DIM)
    assert not list(predictor.parameters())
    assert torch.equal(predictor.weight, torch.eye(DIM))
    features = batch().requires_grad_()
    prediction = predictor(features)
    before = predictor.weight.clone()
    predictor.update(features)  # between forward and backward
    assert not torch.equal(predictor.weight, before)
    assert not any(buffer.requires_grad for buffer in predictor.buffers())
    prediction.sum().backward()
    torch.testing.assert_close(features.grad, before.sum(dim=0).expand(20, -1))


def test_weight_may_be_set_seldom() -> None:
    seldom, always = DirectPredictor(DIM), DirectPredictor(DIM)
    for seed in range(4):
        seldom.update(batch(seed), refresh=seed == 3)
        always.update(batch(seed))
        if seed < 3:
            assert torch.equal(seldom.weight, torch.eye(DIM))
    assert torch.equal(seldom.weight, always.weight)


@every_form
def test_rows_that_cannot_count(method: str, convention: str) -> None:
    predictor, reference = (DirectPredictor(DIM, method, convention) for _ in range(2))
    spoiled = torch.cat([batch(), torch.full((1, DIM), torch.nan), torch.full((1, DIM), torch.inf)])
    for rows in (torch.zeros(0, DIM), torch.full((3, DIM), torch.nan)):
        predictor.update(rows)
        assert torch.equal(predictor.weight, torch.eye(DIM))
        assert predictor.updates == 0
    predictor.update(spoiled)
    reference.update(batch())
    torch.testing.assert_close(predictor.weight, reference.weight)
    predictor.update(torch.full((3, DIM), torch.nan))
    torch.testing.assert_close(predictor.weight, reference.weight)


@every_form
@pytest.mark.parametrize("rows", [torch.zeros(4, DIM), torch.ones(4, DIM), 1e-30 * torch.ones(1, DIM), batch()[:1]])
def test_finite_on_degenerate_batches(method: str, convention: str, rows: Tensor) -> None:
    predictor = DirectPredictor(DIM, method, convention)
    predictor.update(rows)
    assert predictor.weight.isfinite().all()
    assert predictor.updates == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_and_without_autocast(dtype: torch.dtype) -> None:
    off, on, exact = DirectPredictor(DIM), DirectPredictor(DIM), DirectPredictor(DIM)
    features = (16 * batch()).to(dtype)
    off.update(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        on.update(features)
    exact.update(features.float())
    assert torch.equal(on.weight, off.weight)
    torch.testing.assert_close(off.weight, exact.weight)
    assert off(features).dtype == dtype
    cast = DirectPredictor(DIM).to(dtype)
    cast.update(features)
    assert cast.weight.dtype == dtype
    assert cast.correlation.dtype == torch.float32
    torch.testing.assert_close(cast.correlation, exact.correlation)
    torch.testing.assert_close(cast.weight, exact.weight.to(dtype))


def test_compiles_and_follows_the_update() -> None:
    predictor = DirectPredictor(DIM)
    compiled = torch.compile(predictor, backend="aot_eager", fullgraph=True)
    features = batch()
    torch.testing.assert_close(compiled(features), features)
    predictor.update(features)
    torch.testing.assert_close(compiled(features), features @ predictor.weight)


def test_state_is_resumed() -> None:
    first, resumed = DirectPredictor(DIM), DirectPredictor(DIM)
    first.update(batch(0))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for predictor in (first, resumed):
        predictor.update(batch(1))
    assert torch.equal(first.weight, resumed.weight)


def test_is_filled_after_the_meta_device() -> None:
    with torch.device("meta"):
        predictor = DirectPredictor(4)
    predictor.to_empty(device="cpu")
    for buffer in predictor.buffers():
        buffer.fill_(7)  # what was in memory
    predictor.reset_parameters()
    expected = DirectPredictor(4).state_dict()
    torch.testing.assert_close(predictor.state_dict(), expected, rtol=0, atol=0)
    predictor.update(torch.randn(8, 4))
    predictor.reset_parameters()
    torch.testing.assert_close(predictor.state_dict(), expected, rtol=0, atol=0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`method` must be one of \('direct_pred', 'direct_copy'\), got 'rot'"):
        DirectPredictor(4, "rot")
    with pytest.raises(ValueError, match=r"`convention` must be one of \('code', 'paper'\), got 'x'"):
        DirectPredictor(4, convention="x")
    with pytest.raises(ValueError, match="`dim` must be an integer of at least 1, got -1"):
        DirectPredictor(-1)
    with pytest.raises(ValueError, match=r"`eps` must not be negative, got -0\.1"):
        DirectPredictor(4, eps=-0.1)
    with pytest.raises(ValueError, match="`decay` must be from 0 to below 1, got 1"):
        DirectPredictor(4, decay=1)
    with pytest.raises(ValueError, match="needs at least one view, got none"):
        DirectPredictor(4).update()
    for wrong in (torch.randn(3, 5), torch.randn(2, 3, 4), torch.ones(3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"must be floating point of shape \(N, 4\), got"):
            DirectPredictor(4).update(wrong)
    assert repr(DirectPredictor(4)) == (
        "DirectPredictor(dim=4, method='direct_pred', convention='code', decay=0.3, eps=0.01)"
    )


def condition_after_training(make: Callable[[], nn.Module]) -> float:
    """Condition number of the features of a linear encoder that is to agree with its own moving average on views."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spread = torch.linspace(1.5, 0.3, 32).sqrt()
        encoder, target = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)
        target.load_state_dict(encoder.state_dict())
        predictor = make()
        parameters = [*encoder.parameters(), *predictor.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
        for _ in range(700):
            rows = torch.randn(128, 32) * spread
            first, second = (rows + 0.3 * torch.randn(128, 32) for _ in range(2))
            a, b = encoder(first), encoder(second)
            with torch.no_grad():
                target_a, target_b = target(first), target(second)
            loss = -torch.cosine_similarity(predictor(a), target_b).mean()
            loss = loss - torch.cosine_similarity(predictor(b), target_a).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if isinstance(predictor, DirectPredictor):
                predictor.update(a, b)
            with torch.no_grad():
                target.weight.lerp_(encoder.weight, 0.01)
        values = torch.linalg.eigvalsh(torch.cov(encoder(torch.randn(4096, 32) * spread).detach().T))
    return (values[-1] / values[0].clamp_min(1e-9)).item()


def test_a_trained_predictor_lets_the_spectrum_decay() -> None:
    assert condition_after_training(lambda: nn.Linear(16, 16, bias=False)) > 1e3


@pytest.mark.parametrize("method", ["direct_pred", "direct_copy"])
def test_a_direct_one_evens_it_out(method: str) -> None:
    assert condition_after_training(lambda: DirectPredictor(16, method)) < 2


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result: dict[str, Any] = {}
    for method, convention in FORMS:
        predictor = DirectPredictor(DIM, method, convention)
        for first in (7, 0):  # uneven, and all on one process
            part = slice(0, first) if rank == 0 else slice(first, None)
            predictor.update(batch(first)[part], batch(first + 1)[part])
        predictor.update(torch.zeros(0, DIM))
        result[f"{method}-{convention}"] = predictor.state_dict()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    spawn(worker, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for method, convention in FORMS:
        predictor = DirectPredictor(DIM, method, convention)
        for first in (7, 0):
            predictor.update(batch(first), batch(first + 1))
        for name, expected in predictor.state_dict().items():
            one, other = (rank[f"{method}-{convention}"][name] for rank in ranks)
            assert torch.equal(one, other)
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
