"""Two processes with uneven shares of the test data read the accuracy on all of it."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

from lightning_collapse import ContinualMetrics, CurveJump, PrototypeMemory
from tests.continual import Learner, task
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper


class Sharded(Learner):
    def configure_model(self):
        for part in (self.body[0], self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _share(seed, rank):
    """Three batches of 10 on the first process, one of 18 on the second."""
    x, y = task(seed).tensors
    part = slice(30, 48) if rank else slice(0, 30)
    return DataLoader(TensorDataset(x[part], y[part]), batch_size=18 if rank else 10)


class _Jumps(Callback):
    """Each process has a curve of its own, that jumps on the second alone."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        jump, self.found = CurveJump("loss"), []
        for step in range(30):
            number = 1.0 + 0.01 * (step * 7 % 5) + trainer.global_rank + 90 * (step == 25) * trainer.global_rank
            trainer.callback_metrics["loss"] = torch.tensor(number)
            self.found.append(jump(trainer))
        self.state = jump.state_dict()


class _Streamed(ContinualMetrics):
    pass


class _Classes(ContinualMetrics):
    pass


class _Accuracy(Metric):
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("sums", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, outputs, labels):
        self.sums += torch.stack([(outputs.argmax(dim=1) == labels).float().sum(), torch.tensor(float(len(labels)))])

    def compute(self):
        return self.sums[0] / self.sums[1]


def _whole(model, seed):
    x, y = task(seed).tensors
    with torch.no_grad():
        return (model.eval()(x).argmax(dim=1) == y).float().mean().item()


class _Broken:
    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        yield from _share(1, self.rank)
        if self.rank:
            raise OSError("no disk")


def _check(rank):
    for model in (Learner, Sharded):
        if model is Learner:
            strategy = DDPStrategy(process_group_backend="gloo")
        else:
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        keeper = PointKeeper()
        metrics = ContinualMetrics([_share(1, rank), _share(2, rank), _Broken(rank)], every_n_steps=1)
        metrics.task_index = 1  # as if one had been learned: the cadence is at work
        memory, lost = PrototypeMemory("body", lambda: _share(1, rank)), PrototypeMemory("body", _Broken(rank), seed=1)
        lonely = PrototypeMemory("body", [] if rank else _share(1, 0), seed=2)  # no rows on the second process
        options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
        torch.manual_seed(0)
        lit = model()
        start = {name: value.clone() for name, value in lit.state_dict().items()}
        streamed = _Streamed([_share(1, rank), _share(2, rank)], metric=_Accuracy())
        classes = _Classes([_share(1, rank), _share(2, rank)], num_classes=3)
        jumps = _Jumps()
        watchers = [metrics, streamed, classes, keeper, jumps, memory, lost, lonely]
        Trainer(**options, callbacks=watchers).fit(lit, _share(2, 1))
        torch.distributed.all_gather_object(same := [None, None], (jumps.found, jumps.state))
        assert same[0] == same[1]
        assert jumps.found == [step == 25 for step in range(30)]
        assert streamed.values[0].tolist() == pytest.approx(metrics.values[1, :2].tolist())
        assert classes.values[0].tolist() == pytest.approx(metrics.values[1, :2].tolist())
        seen = classes.class_values[0].tolist()
        torch.distributed.all_gather_object(everyone := [None, None], seen)
        assert everyone[0] == everyone[1]
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, repr(keeper.points))
        assert everyone[0] == everyone[1]
        values = {point.key: point for point in keeper.points}
        assert values["continual/task0/accuracy"].n == 48
        assert metrics.values[1, 2].isnan()
        twin = Learner()
        if model is Sharded:
            state = {name: _full(value) for name, value in lit.state_dict().items()}
        else:
            state = lit.state_dict()
        assert any(not torch.equal(state[name], start[name]) for name in state)
        twin.load_state_dict(state)
        x, y = task(1).tensors
        with torch.no_grad():
            features = torch.nn.functional.normalize(twin.body.eval()(x).double(), dim=1)
        means = torch.stack([features[y == c].mean(dim=0) for c in range(3)])
        expected = torch.nn.functional.normalize(means, dim=1).float()
        torch.testing.assert_close(memory.prototypes, expected)
        assert lost.prototypes is None
        if model is Learner:  # where weights are sharded every process needs a batch
            means = torch.stack([features[:30][y[:30] == c].mean(dim=0) for c in range(3)])
            torch.testing.assert_close(lonely.prototypes, torch.nn.functional.normalize(means, dim=1).float())
        drawn, prototypes = [None, None], [None, None]
        torch.distributed.all_gather_object(drawn, memory.sample(4)[0])
        torch.distributed.all_gather_object(prototypes, memory.prototypes)
        assert torch.equal(*prototypes)
        assert not torch.equal(*drawn)  # of the two processes together eight
        for number in (0, 1):
            assert metrics.values[1, number].item() == pytest.approx(_whole(twin, number + 1))
        torch.distributed.barrier()


def _full(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def test_two_processes():
    on_two_processes(_check)
