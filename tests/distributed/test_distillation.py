"""Distillation on two processes with uneven batches is that of one process with all rows."""

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_collapse import Distillation
from lightning_collapse.losses import distillation_loss, feature_distillation_loss, squared_distillation_loss
from lightning_collapse.replay import ReplayBuffer
from lightning_collapse.utilities.distributed import process_rank, world_size
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, MemoryLogger, batches

LOSSES = {"logits": distillation_loss, "features": feature_distillation_loss, "squared": squared_distillation_loss}
PARTS = slice(0, 5), slice(5, 16)


def _generated(teacher, n):
    """On two processes the part of each."""
    rows = torch.randn(16, 16, generator=torch.Generator().manual_seed(7))
    return rows if world_size() == 1 else rows[PARTS[process_rank()]]


def _buffer():
    """Of which the second process has no rows."""
    buffer = ReplayBuffer(6)
    if process_rank() == 0:
        buffer.add(torch.randn(6, 16, generator=torch.Generator().manual_seed(8)))
    return buffer


CASES = {
    "logits": dict,
    "features": lambda: {"kind": "features"},
    "squared": lambda: {"kind": "squared", "replay": _generated},
    "buffer": lambda: {"replay": _buffer()},
}


class Lit(LightningModule):
    """Every process takes its part of each batch; nothing but the teacher moves it."""

    def __init__(self, norm=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x = batch if self.trainer.world_size == 1 else batch[PARTS[self.trainer.global_rank]]
        return 0 * self(x).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def _fit(callback, model, devices=1):
    logger = MemoryLogger()
    settings = {**QUIET, "logger": logger, "callbacks": [callback], "log_every_n_steps": 1, "devices": devices}
    if devices > 1:
        settings["strategy"] = DDPStrategy(process_group_backend="gloo")
    trainer = Trainer(**settings, use_distributed_sampler=False)
    trainer.fit(model, batches(n=4, size=16))
    return [value for _, value in logger.curve("regularizer/distillation/value")]


def _two_tasks(case, devices=1):
    torch.manual_seed(0)
    callback, model = Distillation(**CASES[case]()), Lit()
    _fit(callback, model, devices)
    torch.manual_seed(1)
    nn.init.normal_(model.net[2].weight)
    curve = _fit(callback, model, devices)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), curve


def _check(rank, alone, functions):
    for case, (weights, curve) in alone.items():
        found, values = _two_tasks(case, devices=2)
        torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(values), torch.tensor(curve), rtol=1e-4, atol=1e-6)
    student, teacher = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(2))
    for loss, (wanted, gradient) in functions.items():
        part = student[PARTS[rank]].clone().requires_grad_()
        value = LOSSES[loss](part, teacher[PARTS[rank]])
        value.backward()
        torch.testing.assert_close(value.detach(), wanted)
        torch.testing.assert_close(part.grad / 2, gradient[PARTS[rank]])  # data-parallel training takes the mean
    # BatchNorm has seen other rows on each process: the teacher's statistics are those of the first
    callback = Distillation()
    _fit(callback, Lit(norm=True), devices=2)
    states = [None, None]
    dist.all_gather_object(states, callback.state_dict()["teacher"])
    assert "net.1.running_mean" in states[0]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_two_processes():
    alone = {case: _two_tasks(case) for case in CASES}
    assert all(curve[-1] < curve[0] for _, curve in alone.values())
    functions = {}
    student, teacher = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(2))
    for name, loss in LOSSES.items():
        value = loss(student.requires_grad_(), teacher)
        functions[name] = value.detach(), torch.autograd.grad(value, student)[0]
    on_two_processes(_check, alone, functions)
