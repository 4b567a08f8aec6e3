"""Stability of steps on two processes: both read the same, of the whole loss and the whole gradient, sharded or not."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_collapse import StabilityMonitor
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper

COUNT, BATCH, OUTLIER = 60, 4, 50


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.head(self.body(x).tanh()) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-5)


class Sharded(Model):
    def configure_model(self):
        for part in (self.body, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def batches(rank=None):
    """All of the samples, or the part of a process; a label far out is in that of the second one."""
    x = torch.randn(COUNT, 2 * BATCH, 6, generator=torch.Generator().manual_seed(0))
    y = x.sum(dim=2, keepdim=True)
    y[OUTLIER, -1] = 1e3
    mine = slice(None) if rank is None else slice(rank * BATCH, (rank + 1) * BATCH)
    return DataLoader(list(zip(x[:, mine], y[:, mine], strict=True)), batch_size=None)


def fit(model, rank=None, **kwargs):
    """Points by curve and step, and the flags of the steps."""
    torch.manual_seed(0)
    keeper, flags, monitor = PointKeeper(), [], StabilityMonitor(every_n_steps=5)
    monitor.on_flag.append(lambda trainer, optimizer, flag: flags.append(flag.item()))
    options = {**QUIET, "max_epochs": 2, "logger": False, "use_distributed_sampler": False}
    Trainer(**options, callbacks=[monitor, keeper], **kwargs).fit(model(), batches(rank))
    return {f"{point.key} {point.step}": point.value for point in keeper.points}, flags


class Hurt(StabilityMonitor):
    """One of its parts fails on the second process alone, from the twentieth step on."""

    def __init__(self, part):
        super().__init__(every_n_steps=5)
        self.part = part
        self.on_flag.append(self.act)

    def _fail(self, part):
        if self.part == part and self.trainer.global_step >= 20 and self.trainer.global_rank:
            raise ValueError("on one process")

    def start(self, trainer, pl_module):
        self.trainer = trainer
        super().start(trainer, pl_module)

    def read(self, trainer, pl_module):
        self._fail("read")
        return super().read(trainer, pl_module)

    def _norms(self, pl_module, optimizer):
        self._fail("gradients")
        return super()._norms(pl_module, optimizer)

    def act(self, trainer, optimizer, flag):
        self._fail("action")
        assert not flag or self.part == "read"  # steps that are not known are left alone


def _check_hurt(rank):
    for part in ("read", "gradients", "action"):
        keeper = PointKeeper()
        options = {**QUIET, "logger": False, "use_distributed_sampler": False, "devices": 2}
        strategy = DDPStrategy(process_group_backend="gloo")
        Trainer(**options, callbacks=[Hurt(part), keeper], strategy=strategy).fit(Model(), batches(rank))
        value, everyone = torch.full((), float(rank)), [None, None]
        torch.distributed.all_reduce(value)  # whoever had waited for the other would take this for the answer
        assert value == 1
        torch.distributed.all_gather_object(everyone, repr(keeper.points))
        assert everyone[0] == everyone[1]
        assert max(point.step for point in keeper.points) < 25


def _check(rank, folder):
    _check_hurt(rank)
    strategies = {
        "ddp": (Model, DDPStrategy(process_group_backend="gloo")),
        "sharded": (Sharded, ModelParallelStrategy(2, 1, process_group_backend="gloo")),
    }
    for name, (model, strategy) in strategies.items():
        torch.save(fit(model, rank, strategy=strategy, devices=2), f"{folder}/{name}{rank}")


def test_two_processes_read_what_one_does(tmp_path):
    on_two_processes(_check, str(tmp_path))
    expected, flags = fit(Model)
    assert [i for i, flag in enumerate(flags) if flag] == [COUNT + OUTLIER]
    for name in ("ddp", "sharded"):
        first, second = (torch.load(tmp_path / f"{name}{rank}") for rank in (0, 1))
        assert repr(first) == repr(second)  # NaN is unlike itself
        found, found_flags = first
        assert found_flags == flags
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4, nan_ok=True)
