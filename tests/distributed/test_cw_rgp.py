"""Two processes that whiten their own rows, as CW-RGP and Shuffled-DBN are published: a mean over all rows."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_collapse.losses import CWRGP, TooFewRowsError
from tests.distributed.launch import spawn

DIM = 12
LOSSES = {
    "samples": {"sub_batch": 5, "groups": 2, "iterations": 2},
    "features": {"sub_batch": 9, "groups": 3, "axis": "features"},
}
SIZES = {"uneven": (7, 23), "one cannot": (0, 8), "neither can": (0, 0)}
NEEDED = {
    "samples": "at least 1 row, got 0 over",
    "features": "at least 5 rows on one process to whiten 4 features, got 0",
}
each_axis = pytest.mark.parametrize("axis", LOSSES)


def rows(case: str) -> list[Tensor]:
    """Two views of the rows of each process."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, size, DIM, generator=generator, dtype=torch.float64) for size in SIZES[case]]


def evaluate(axis: str, views: Tensor) -> tuple[Tensor, Tensor]:
    views = views.clone().requires_grad_()
    loss = CWRGP(**LOSSES[axis])(*views)
    loss.backward()
    assert views.grad is not None
    return loss.detach(), views.grad


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[tuple[str, str], object] = {}
    for axis in LOSSES:
        for case in ("uneven", "one cannot"):
            found[axis, case] = evaluate(axis, rows(case)[rank])
        with pytest.raises(TooFewRowsError) as caught:
            evaluate(axis, rows("neither can")[rank])
        found[axis, "neither can"] = str(caught.value)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("cw_rgp")
    spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@each_axis
def test_mean_over_rows_and_not_over_processes(axis: str, ranks: list[dict]) -> None:
    sizes = SIZES["uneven"]
    parts = [evaluate(axis, views) for views in rows("uneven")]
    expected = sum(size * value for size, (value, _) in zip(sizes, parts, strict=True)) / sum(sizes)
    for result, size, (_, grad) in zip(ranks, sizes, parts, strict=True):
        torch.testing.assert_close(result[axis, "uneven"][0], expected)
        # data-parallel training takes the mean over two processes
        torch.testing.assert_close(result[axis, "uneven"][1] / 2, grad * size / sum(sizes))


@each_axis
def test_a_process_without_rows_counts_none(axis: str, ranks: list[dict]) -> None:
    value, grad = evaluate(axis, rows("one cannot")[1])
    for result in ranks:
        torch.testing.assert_close(result[axis, "one cannot"][0], value)
    assert ranks[0][axis, "one cannot"][1].shape == (2, 0, DIM)
    torch.testing.assert_close(ranks[1][axis, "one cannot"][1] / 2, grad)


@each_axis
def test_all_raise_if_none_has_enough(axis: str, ranks: list[dict]) -> None:
    for result in ranks:
        assert NEEDED[axis] in result[axis, "neither can"]
