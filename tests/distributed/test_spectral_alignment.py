"""Two processes draw the curves of all their rows, on replicated and on sharded weights."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_collapse import SpectralAlignmentMonitor
from lightning_collapse.functional import mean_energy_share, sign_diversity, spectral_alignment
from lightning_collapse.metrics import SpectralAlignment
from lightning_collapse.spectral import top_singular_pair
from lightning_collapse.utilities import Flag
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, MemoryLogger, PointKeeper, Toy, batches, weights


class Shared(Toy):
    """Every process sees its own uneven batches, far apart; one layer runs on the first process only."""

    def __init__(self):
        super().__init__()
        self.only_first = torch.nn.Linear(16, 4).requires_grad_(False)
        self.seen = []

    def training_step(self, batch, batch_idx):
        batch = batch[: 20 if self.global_rank else 32] + 0.1 * self.global_rank
        self.seen.append((batch.clone(), self.encoder[0].weight.detach().clone()))
        if not self.global_rank:
            self.only_first(batch)
        return self.head(self.encoder(batch)).pow(2).mean()


class Sharded(Toy):
    def configure_model(self):
        fully_shard(self.encoder, mesh=self.device_mesh["data_parallel"])


def _fit(model, rank, callbacks, strategy):
    keeper = PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": MemoryLogger(), "use_distributed_sampler": False}
    Trainer(**{**options, "callbacks": [*callbacks, keeper]}).fit(model, batches(4, seed=rank))
    return keeper


def _everyone(item):
    items = [None, None]
    torch.distributed.all_gather_object(items, item)
    return items


def _check_ddp(rank):
    def run(callbacks):
        torch.manual_seed(0)
        model = Shared()
        return model, _fit(model, rank, callbacks, DDPStrategy(process_group_backend="gloo"))

    model, keeper = run([SpectralAlignmentMonitor(every_n_steps=2)])
    first, second = _everyone((repr(keeper.points), model.seen))
    assert first[0] == second[0]  # the same numbers on both, bit by bit
    for step in (1, 3):
        (rows, weight), (others, same) = first[1][step], second[1][step]
        assert torch.equal(weight, same)
        pool = torch.cat([rows, others])
        points = {p.key.removeprefix("spectral_alignment/"): p for p in keeper.points if p.step == step}
        assert points["encoder.0/sign_diversity"].n == len(pool) == 52
        for name, value in {
            "sign_diversity": sign_diversity(spectral_alignment(pool, weight)),
            "sign_diversity_centered": sign_diversity(spectral_alignment(pool, weight, center=True)),
            "mean_energy_share": mean_energy_share(pool),
            "spectral_norm": torch.linalg.matrix_norm(weight, 2),
        }.items():
            assert points[f"encoder.0/{name}"].value == pytest.approx(value.item(), rel=1e-5), name
        assert points["only_first/sign_diversity"].n == 32
        assert points["only_first/flag"].value == Flag.OK
    plain, watched = weights(run([])[0]), weights(model)
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def _check_fsdp(rank):
    def run(callbacks):
        torch.manual_seed(0)
        model = Sharded()
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        keeper = _fit(model, rank, callbacks, strategy)
        return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()], keeper

    watched, keeper = run([SpectralAlignmentMonitor(every_n_steps=4)])
    plain, _ = run([])
    assert all(map(torch.equal, watched, plain))
    first, second = _everyone(repr(keeper.points))
    assert first == second
    norm = keeper.curve("spectral_alignment/encoder.0/spectral_norm")[0]
    diversity = keeper.curve("spectral_alignment/encoder.0/sign_diversity")[0]
    # the last of four small steps is not in it: close to that of the whole weight, and far from that of a half of it
    assert norm.value == pytest.approx(torch.linalg.matrix_norm(watched[0], 2).item(), rel=0.01)
    assert norm.value > 1.1 * torch.linalg.matrix_norm(watched[0][:16], 2).item()
    assert (diversity.n, diversity.flag) == (64, Flag.OK)


def _check_metric(rank):
    inputs = torch.randn(30, 6, generator=torch.Generator().manual_seed(5))
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(6))
    direction = top_singular_pair(weight).direction
    metric = SpectralAlignment(dim=6)
    metric.update(inputs[:10] if rank else inputs[10:], direction)
    assert metric.compute() == sign_diversity(spectral_alignment(inputs, weight))


def _check_all(rank):
    _check_ddp(rank)
    _check_metric(rank)
    _check_fsdp(rank)


def test_two_processes():
    on_two_processes(_check_all)
