"""Two processes, whole or sharded, skip the same steps, of a burst that only one of them has."""

from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_collapse import CollapseGuard, SkipStep, StabilityMonitor
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, batches

PLANTED = {0: float("nan"), 74: 1e3, 76: float("nan")}
STEPS = 80


class Whole(LightningModule):
    def __init__(self, by_hand, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(16, 8), nn.Linear(8, 2)
        self.by_hand, self.options = by_hand, options

    def training_step(self, batch, batch_idx):
        loss = self.head(self.encoder(batch).relu()).pow(2).mean()
        return loss * PLANTED.get(batch_idx, 1.0) if self.global_rank == 1 else loss

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if self.by_hand and batch_idx in PLANTED:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, **self.options)


class Sharded(Whole):
    def configure_model(self):
        for part in (self.encoder, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class States(Callback):
    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        parameters = list(pl_module.parameters())
        moments = [sorted(trainer.optimizers[0].state.get(parameter, {}).items()) for parameter in parameters]
        tensors = [*parameters, *(moment for found in moments for _, moment in found)]
        self.states.append([(x.to_local() if hasattr(x, "to_local") else x).detach().clone() for x in tensors])


def _run(rank, model, strategy, *callbacks):
    states = States()
    options = {**QUIET, "devices": 2, "strategy": strategy(), "logger": False, "use_distributed_sampler": False}
    trainer = Trainer(**{**options, "callbacks": [*callbacks, states]})
    trainer.fit(model, batches(STEPS, seed=rank))
    return states.states, trainer


def _check(rank, kind, strategy, **options):
    guard, monitor = CollapseGuard(action=SkipStep()), StabilityMonitor(every_n_steps=10)
    ours, trainer = _run(rank, kind(False, **options), strategy, guard, monitor)
    other, _ = _run(rank, kind(True, **options), strategy)
    for one, two in zip(ours, other, strict=True):
        assert len(one) == len(two)
        assert all(map(torch.equal, one, two))
    assert trainer.callback_metrics["stability/all/skipped"] == len(PLANTED)
    assert not all(map(torch.equal, ours[-1], ours[60]))


def _check_all(rank):
    whole = partial(DDPStrategy, process_group_backend="gloo")
    sharded = partial(ModelParallelStrategy, 2, 1, process_group_backend="gloo")
    for kind, strategy in ((Whole, whole), (Sharded, sharded)):
        for options in ({}, {"fused": True}):
            _check(rank, kind, strategy, **options)


def test_two_processes():
    on_two_processes(_check_all)
