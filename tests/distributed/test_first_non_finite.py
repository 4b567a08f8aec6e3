"""Two processes: the one that made the first NaN is found, and both say the same."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, FirstNonFinite
from lightning_collapse.functional import Cause
from tests.callbacks.monitors.test_first_non_finite import Faulty, causes
from tests.distributed.launch import on_two_processes
from tests.toys import PointKeeper, fit, weights


class Later(Faulty):
    """The batches of the second process are bad in their own layer, those of both in the data."""

    def training_step(self, batch, batch_idx):
        if self.global_rank and self.fault == "rank 1" and batch_idx == 5:
            batch = self.square(batch * 1e30)
        return super().training_step(batch, batch_idx)


def _data(rank, fault):
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randn(8, 4, generator=generator) for _ in range(8)]
    if fault == "data" and rank:
        batches[5][0, 0] = torch.nan
    return DataLoader(batches, batch_size=None)


def _fit(rank, fault, callbacks):
    options = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)}
    lit = Later(fault)
    trainer = fit(lit, callbacks, _data(rank, fault), use_distributed_sampler=False, logger=False, **options)
    return lit, trainer


class Sharded(Faulty):
    def configure_model(self):
        for part in (*self.layers, self.attention.project):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _check_shards(rank):
    fits = []
    for watched in (False, True):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        keeper, lit = PointKeeper(), Sharded("data")
        callbacks = [FirstNonFinite(every_n_steps=2), keeper] if watched else []
        options = {"use_distributed_sampler": False, "logger": False, "devices": 2, "strategy": strategy}
        fit(lit, callbacks, _data(rank, "data"), **options)
        fits.append([parameter.to_local().nan_to_num(7) for parameter in lit.layers.parameters()])
    assert causes(keeper) == {"batch": (Cause.DATA, 5)}
    assert all(map(torch.equal, *fits))
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    with pytest.raises(MisconfigurationException, match=r"`FirstNonFinite\(replay=True\)`.*none holds all"):
        fit(Sharded(), [FirstNonFinite(replay=True)], _data(rank, "data"), devices=2, strategy=strategy, logger=False)


def test_shards():
    on_two_processes(_check_shards)


def _check(rank, fault, layer, cause):
    plain, _ = _fit(rank, fault, [])
    for every, replay in ((2, False), (4, True)):
        keeper, guard = PointKeeper(), CollapseGuard(action="log")
        monitor = FirstNonFinite(replay, every)
        told = []
        take = monitor._take
        monitor._take = lambda origin, told=told, take=take: (told.append(origin), take(origin))
        lit, _ = _fit(rank, fault, [monitor, guard, keeper])
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, (repr(keeper.points), repr(told)))
        assert everyone[0] == everyone[1]
        assert causes(keeper) == {layer: (cause, 5)}
        assert told[0].rank == 1
        assert [verdict.kind for verdict in guard.verdicts] == ["non_finite_origin"]
        for name, value in weights(plain).items():
            assert torch.equal(value.nan_to_num(7), weights(lit)[name].nan_to_num(7)), name
        torch.distributed.barrier()


@pytest.mark.parametrize(
    ("fault", "layer", "cause"), [("data", "batch", Cause.DATA), ("rank 1", "square", Cause.OVERFLOW)]
)
def test_the_process_that_made_it_is_named(fault, layer, cause):
    on_two_processes(_check, fault, layer, cause)


class Hurt(Callback):
    """On the second process alone something of the monitor has failed."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank:
            trainer.callbacks[0].contained.catch("looking at a batch", "no matter", ValueError("a batch of its own"))


def _check_hurt(rank):
    _fit(rank, "", [FirstNonFinite(every_n_steps=2), Hurt()])
    value = torch.full((), float(rank))
    torch.distributed.all_reduce(value)  # whoever had waited for the other would take this for the answer
    assert value == 1


def test_processes_end_alike_if_something_failed_on_one():
    on_two_processes(_check_hurt)
