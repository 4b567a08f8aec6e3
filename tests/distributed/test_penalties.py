"""Penalties on two processes: replicated they are those of one, sharded they remember the same."""

import io

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import ContinualMixin, Projection, WeightPenalty
from lightning_collapse.penalties import (
    EWC,
    KFACEWC,
    L2SP,
    MAS,
    L2Init,
    RankOneEWC,
    RWalk,
    SoftOrthogonality,
    SynapticIntelligence,
)
from lightning_collapse.projections import GPM, OGD, SGP
from lightning_collapse.utilities.registry import PENALTIES
from tests.distributed.launch import on_two_processes
from tests.penalties.references import task
from tests.penalties.toys import Classifier
from tests.toys import QUIET, MemoryLogger

N = 47
MAKE = {
    "EWC": lambda: EWC(5.0, n_samples=None),
    "KFACEWC": lambda: KFACEWC(5.0, n_samples=None),
    "L2Init": lambda: L2Init(0.05),
    "L2SP": lambda: L2SP(0.1, new=["head.*"]),
    "MAS": lambda: MAS(0.02),
    "RankOneEWC": lambda: RankOneEWC(0.5),
    "RWalk": lambda: RWalk(0.1, every_n_steps=2),
    "SoftOrthogonality": lambda: SoftOrthogonality(0.02, "SRIP"),
    "SynapticIntelligence": lambda: SynapticIntelligence(1.0),
}
SHARDED = [name for name in MAKE if name != "KFACEWC"]


class Sharded(Classifier):
    def configure_model(self):
        for part in (self.encoder, self.head):
            if not isinstance(part, FSDPModule):  # it stays so from one trainer to the next
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class TensorParallel(Classifier):
    """Nothing knows how to gather its head for a while."""

    def configure_model(self):
        parallelize_module(self.head, self.device_mesh["data_parallel"], RowwiseParallel())


class NoMomentum(Sharded):
    """A trainer that fits again begins with new optimizers."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Mixed(ContinualMixin, NoMomentum):
    def __init__(self, name):
        super().__init__()
        self.set_penalties({"it": MAKE[name]()})


def data(index, batch_size):
    """One sample more than two processes can share."""
    x, y = task(index, N, torch.float32)
    return DataLoader(TensorDataset(x, y), batch_size)


def both(index):
    """What two processes get in their batches of four."""
    x, y = task(index, N, torch.float32)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))  # as a `DistributedSampler` draws it
    padded = torch.cat([order, order[:1]])
    return DataLoader(TensorDataset(x[padded], y[padded]), 8)


def fit_two(model, callbacks, strategy, devices, batch_size, tasks=(0, 1), **kwargs):
    for index in tasks:
        options = {
            **QUIET,
            "devices": devices,
            "strategy": strategy(),
            "logger": MemoryLogger(),
            "log_every_n_steps": 1,
        }
        trainer = Trainer(**{**options, **kwargs}, callbacks=callbacks)
        trainer.fit(model, data(index, batch_size))
    return trainer


def whole(parameter):
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def flat(model):
    return torch.cat([whole(parameter).flatten() for parameter in model.parameters()])


def ddp():
    return DDPStrategy(process_group_backend="gloo")


def shards():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def projected(model, method, strategy):
    """Weights after two tasks, what is taken out of the updates of each layer, and the state."""
    torch.manual_seed(0)
    projection, model = Projection(method), model()
    fit_two(model, [projection], strategy, 2, 4)
    spaces = getattr(method, "subspaces", {})
    taken = {name: space.directions * space.importance @ space.directions.T for name, space in spaces.items()}
    return flat(model), taken, projection.state_dict()


def _check_ddp(rank, folder):
    for name, make in MAKE.items():
        torch.manual_seed(0)
        model, penalty = Classifier(), make()
        trainer = fit_two(model, [WeightPenalty(penalty, name="it")], ddp, 2, 4)
        torch.save((flat(model), penalty.state_dict(), trainer.logger.rows), f"{folder}/{name}.{rank}")
    for method in (SGP(0.9), OGD()):
        torch.save(projected(Classifier, method, ddp), f"{folder}/{type(method).__name__}.{rank}")
        broken = type(method)()
        loader = [data(0, 4), [None]][rank]  # one process cannot read its data: neither learns, and none waits
        fit_two(Classifier(), [Projection(broken, loader=loader)], ddp, 2, 4, tasks=(0,))
        assert broken.learned == 0


def _one_projected(method):
    """As :func:`_one`, of a projection."""
    torch.manual_seed(0)
    model = Classifier()
    for index in (0, 1):
        projection = Projection(method, loader=data(index, 16))
        Trainer(**QUIET, logger=False, callbacks=[projection]).fit(model, both(index))
    return flat(model)


def _one(name):
    """On one process, with batches that are those of two together: theirs take turns over the samples."""
    torch.manual_seed(0)
    model, penalty = Classifier(), MAKE[name]()
    for index in (0, 1):
        loader = both(index)
        callback = WeightPenalty(penalty, name="it", loader=data(index, 16))
        trainer = Trainer(**{**QUIET, "logger": MemoryLogger(), "log_every_n_steps": 1}, callbacks=[callback])
        trainer.fit(model, loader)
    return flat(model), penalty.state_dict(), trainer.logger.rows


def test_replicated_they_are_those_of_one_process(tmp_path):
    on_two_processes(_check_ddp, str(tmp_path))
    assert set(MAKE) == set(PENALTIES)
    for name in MAKE:
        weights, state, rows = torch.load(tmp_path / f"{name}.0", weights_only=True)
        others = torch.load(tmp_path / f"{name}.1", weights_only=True)
        torch.testing.assert_close(others[:2], (weights, state), rtol=0, atol=0)
        expected_weights, expected_state, expected_rows = _one(name)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)
        assert rows[-1][1] == pytest.approx(expected_rows[-1][1], rel=1e-4)
    for method in (SGP(0.9), OGD()):
        name = type(method).__name__
        found, other = (torch.load(tmp_path / f"{name}.{rank}", weights_only=True) for rank in (0, 1))
        torch.testing.assert_close(found, other, rtol=0, atol=0)  # the very same directions on every process
        torch.testing.assert_close(found[0], _one_projected(method), rtol=1e-4, atol=1e-5)


def _check_sharded(rank, folder):
    for name in SHARDED:
        found = []
        for model_class, strategy in ((Sharded, shards), (Classifier, ddp)):
            torch.manual_seed(0)
            model, penalty = model_class(), MAKE[name]()
            trainer = fit_two(model, [WeightPenalty(penalty, name="it")], strategy, 2, 4)
            found.append((flat(model), penalty.state_dict(), trainer.logger.rows[-1][1]))
            parts = {n: parameter.to_local() for n, parameter in model.named_parameters() if model_class is Sharded}
            for table in penalty.state.tables.values():  # no process keeps more than its own part
                assert all(table[n].shape == part.shape for n, part in parts.items() if n in table)
        (weights, state, row), (expected, expected_state, expected_row) = found
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(state, expected_state, rtol=1e-3, atol=1e-5)  # whole, whatever the shards
        assert row == pytest.approx(expected_row, rel=1e-3)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    (weights, taken, _), (expected, expected_taken, _) = (
        projected(kind, GPM(0.9), strategy) for kind, strategy in ((Sharded, shards), (Classifier, ddp))
    )
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(taken, expected_taken, rtol=1e-4, atol=1e-5)
    with pytest.raises(MisconfigurationException, match="is sharded, and `OGD` needs whole gradients"):
        projected(Sharded, OGD(), shards)
    with pytest.raises(MisconfigurationException, match=r"`head.weight` is sharded along its inputs"):
        projected(TensorParallel, GPM(), shards)
    with pytest.raises(MisconfigurationException, match=r"`head.weight` is a DTensor that `fully_shard` has not made"):
        fit_two(TensorParallel(), [Projection(layers=["encoder"])], shards, 2, 4)
    doors = [
        lambda name: (NoMomentum(), [WeightPenalty(MAKE[name](), name="it")]),
        lambda name: (Mixed(name), []),
    ]
    kinds = [("SynapticIntelligence", 0), ("SynapticIntelligence", 1), ("EWC", 1), ("RankOneEWC", 0)]
    for name, door in [*kinds, ("SoftOrthogonality", 0)]:
        torch.manual_seed(0)
        model, callbacks = doors[door](name)
        trainer = fit_two(model, callbacks, shards, 2, 4)
        path = f"{folder}/{name}{door}"
        trainer.save_checkpoint(path)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, data(1, 4))  # goes on where it was
        resumed, more = doors[door](name)
        options = {**QUIET, "devices": 2, "logger": False, "max_epochs": 2}
        Trainer(**options, strategy=shards(), callbacks=more).fit(resumed, data(1, 4), ckpt_path=path)
        assert torch.equal(flat(resumed), flat(model))
        states = [
            (c or list(m.weight_penalties.values()))[0].state_dict() for m, c in ((resumed, more), (model, callbacks))
        ]
        assert states[0]["task"] == 3
        torch.testing.assert_close(*states, rtol=0, atol=0)
    with pytest.raises(MisconfigurationException, match=r"`KFACEWC` multiplies whole weights .* is sharded"):
        fit_two(Sharded(), [WeightPenalty(KFACEWC())], shards, 2, 4)
    with pytest.raises(MisconfigurationException, match="DTensor that `fully_shard` has not made"):
        fit_two(TensorParallel(), [WeightPenalty(EWC())], shards, 2, 4)


def test_sharded_they_are_those_of_replicas(tmp_path):
    on_two_processes(_check_sharded, str(tmp_path))
