"""Two processes that whiten their own rows, as W-MSE is published, and count a mean over all of them."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_collapse.losses import WMSE, TooFewRowsError
from tests.distributed.launch import spawn

DIM = 4
SIZES = {"uneven": (10, 30), "one cannot": (3, 20), "neither can": (3, 4)}


def rows(case: str) -> list[Tensor]:
    """Two views of the rows of each process."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, size, DIM, generator=generator, dtype=torch.float64) for size in SIZES[case]]


def evaluate(views: Tensor) -> tuple[Tensor, Tensor]:
    views = views.clone().requires_grad_()
    loss = WMSE()(*views)
    loss.backward()
    assert views.grad is not None
    return loss.detach(), views.grad


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, object] = {case: evaluate(rows(case)[rank]) for case in ("uneven", "one cannot")}
    with pytest.raises(TooFewRowsError) as caught:
        evaluate(rows("neither can")[rank])
    found["neither can"] = str(caught.value)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("wmse")
    spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_mean_over_rows_and_not_over_processes(ranks: list[dict]) -> None:
    parts = [evaluate(views) for views in rows("uneven")]
    expected = sum(size * value for size, (value, _) in zip(SIZES["uneven"], parts, strict=True)) / 40
    for result, size, (_, grad) in zip(ranks, SIZES["uneven"], parts, strict=True):
        torch.testing.assert_close(result["uneven"][0], expected)
        # data-parallel training takes the mean over two processes
        torch.testing.assert_close(result["uneven"][1] / 2, grad * size / 40)


def test_a_process_with_too_few_rows_counts_none(ranks: list[dict]) -> None:
    value, grad = evaluate(rows("one cannot")[1])
    for result in ranks:
        torch.testing.assert_close(result["one cannot"][0], value)
    assert not ranks[0]["one cannot"][1].any()
    torch.testing.assert_close(ranks[1]["one cannot"][1] / 2, grad)


def test_all_raise_if_none_has_enough(ranks: list[dict]) -> None:
    for result, here in zip(ranks, SIZES["neither can"], strict=True):
        expected = rf"at least 5 rows on one process to whiten 4 features, got 7 over all processes ({here} here)"
        assert expected in result["neither can"]
