"""Two processes, whole or sharded, return to the same healthy weights together."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_collapse import CollapseGuard, Rollback
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from tests.distributed.launch import on_two_processes
from tests.toys import HEALTHY, QUIET, Claims, Toy, batches

SCRIPT = [1.0] * 4 + [1e-4] * 2 + [1.0]


class Whole(Toy):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Sharded(Whole):
    def configure_model(self):
        for part in (self.encoder, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Script(Callback):
    """Planted readings, and the weights before and after each of them."""

    def __init__(self):
        self.before, self.after = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.before.append(_state(trainer))
        values = {**HEALTHY, "feature_std": SCRIPT[batch_idx]}
        publish(
            trainer, pl_module, [Point("collapse", "z", name, batch_idx, v, 64, 60.0) for name, v in values.items()]
        )
        self.after.append(_state(trainer))


def _state(trainer):
    parameters = list(trainer.lightning_module.parameters())
    tensors = [*parameters]
    for parameter in parameters:
        tensors += [moment for _, moment in sorted(trainer.optimizers[0].state[parameter].items())]
    return [(x.to_local() if hasattr(x, "to_local") else x).detach().clone() for x in tensors]


def _check(rank, model, strategy, folder):
    torch.manual_seed(0)
    script = Script()
    guard = CollapseGuard(action=Rollback(0.5, every_n_steps=1, margin=1), dirpath=folder)
    callbacks = [Claims(), guard, script]
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
    trainer = Trainer(**{**options, "callbacks": callbacks})
    trainer.fit(model(), batches(len(SCRIPT), seed=rank))
    healthy, returned = script.before[3], script.after[5]
    assert len(returned) == len(healthy) > 6
    assert all(map(torch.equal, returned, healthy))
    assert not all(map(torch.equal, script.before[5], healthy))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
    assert not all(map(torch.equal, script.before[6], returned))  # and trains on


def _check_all(rank, folder):
    _check(rank, Whole, DDPStrategy(process_group_backend="gloo"), f"{folder}/whole")
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    _check(rank, Sharded, sharded, f"{folder}/sharded")


def test_two_processes(tmp_path):
    on_two_processes(_check_all, str(tmp_path))
