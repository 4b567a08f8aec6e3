"""LiDAR of two processes with uneven batches is that of the samples of both, and each keeps its own sums."""

import warnings

import pytest
import torch
import torch.distributed as dist

from lightning_collapse.functional import lidar
from lightning_collapse.metrics import LiDAR
from tests.distributed.launch import spawn

SIZES = {"uneven": ([5, 9], [40, 1, 31]), "empty": ([0], [25, 25]), "never updated": ([], [30])}
D = 4


def batches(case, rank):
    generator = torch.Generator().manual_seed(rank)
    for size in SIZES[case][rank]:
        samples = 1000 * rank + torch.randn(size, D, generator=generator, dtype=torch.float64)
        views = samples + 0.5 * torch.randn(2, size, D, generator=generator, dtype=torch.float64)
        views[:, :1] = torch.where(torch.tensor(case == "uneven" and size == 40), torch.nan, views[:, :1])
        yield views


def worker(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a process that saw nothing is told so by torchmetrics
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = {}
    for case in SIZES:
        metric = LiDAR(D)
        for views in batches(case, rank):
            metric.update(*views)
        before = {name: state.clone() for name, state in metric.metric_state.items()}
        value = metric.compute()
        kept = all(torch.equal(state, before[name]) for name, state in metric.metric_state.items())
        result[case] = {name: number.item() for name, number in value.items()}, kept
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second  # bit by bit
    for case in SIZES:
        everything = torch.cat([views for rank in range(2) for views in batches(case, rank)], dim=1)
        found, kept = first[case]
        assert kept
        assert list(found.values()) == pytest.approx([value.item() for value in lidar(*everything)], rel=1e-9)
