"""Both processes draw the same fresh network, tune and average the same weights; shards are refused, rows are one."""

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_collapse import FPF, ConsolidateUpdate, Distillation, DynamicEMA, Replay, ShrinkAndPerturb
from lightning_collapse.losses import focal_preference_loss
from lightning_collapse.replay import ReplayBuffer
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper, Toy, batches


class Sharded(Toy):
    def configure_model(self):
        for part in (self.encoder, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, batch):
        return self.head(self.encoder(batch))


class Gathering(Toy):
    """All processes must take its step."""

    def training_step(self, batch, batch_idx):
        dist.barrier()
        return super().training_step(batch, batch_idx)


def _fit(rank, model, callback, strategy):
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
    Trainer(**options, callbacks=[callback]).fit(model, batches(seed=rank))


def _same_everywhere(model):
    weights = [None, None]
    dist.all_gather_object(weights, {name: p.detach() for name, p in model.named_parameters()})
    return all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def _tune(rank):
    """Unequal shares of a batch on two processes move weights as the whole batch on one would."""
    data = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    model, expected = Gathering(), Gathering()
    fpf = FPF(list, fraction=1.0, iterations=4, lr=0.5)
    expected.load_state_dict(model.state_dict())
    _fit(rank, expected, DynamicEMA(), DDPStrategy(process_group_backend="gloo"))
    assert _same_everywhere(expected)
    model.load_state_dict(expected.state_dict())
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    for shares in ([data[:3], data[3:]], [None, data]):  # and none at all on the first
        fpf.data = [] if shares[rank] is None else [shares[rank]]
        _fit(rank, model, fpf, DDPStrategy(process_group_backend="gloo"))
        for _ in range(4):
            gradients = torch.autograd.grad(expected.training_step(data, 0), list(expected.parameters()))
            for weight, gradient in zip(expected.parameters(), gradients, strict=True):
                weight.data -= 0.5 * gradient
        for weight, value in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(weight, value)
        assert _same_everywhere(model)
    before = [p.detach().clone() for p in model.parameters()]
    fpf.data = []  # of none
    _fit(rank, model, fpf, DDPStrategy(process_group_backend="gloo"))
    assert all(map(torch.equal, before, model.parameters()))


def _prefer(rank):
    whole = torch.randn(4, 7, generator=torch.Generator().manual_seed(5)).requires_grad_()
    (expected,) = torch.autograd.grad(-(_focal(whole)).mean(), whole)
    mine = slice(0, 2) if rank == 0 else slice(2, 7)
    here = whole.detach()[:, mine].requires_grad_()
    loss = focal_preference_loss(*here)
    torch.testing.assert_close(loss.item(), -_focal(whole).mean().item())
    (gradient,) = torch.autograd.grad(loss, here)
    torch.testing.assert_close(gradient / 2, expected[:, mine])  # a mean over processes follows


def _focal(rows):
    logits = 0.1 * ((rows[0] - rows[1]) - (rows[2] - rows[3]).detach())
    p = torch.sigmoid(logits)
    return (1 - p) ** 2 * p.log()


class Saver(Callback):
    """Saves in the middle of a task."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            trainer.save_checkpoint(self.path)


def _replay(rank, path):
    """Four times as many rows on the second process: what is kept is one sample, and a resumed fit goes on."""

    def fit(model, *callbacks, first=0, **kwargs):
        torch.manual_seed(0)
        data = list(batches(n=4, size=4 + 12 * rank, seed=rank))[first:]
        options = {**QUIET, "devices": 2, "strategy": DDPStrategy(process_group_backend="gloo"), "logger": False}
        trainer = Trainer(**options, use_distributed_sampler=False, callbacks=list(callbacks))
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=None), **kwargs)

    def gathered(value):
        found = [None, None]
        dist.all_gather_object(found, value)
        return found

    torch.manual_seed(0)
    whole, replay, points = Toy(), Replay(ReplayBuffer(20)), PointKeeper()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    fit(whole, replay, points)
    kept = gathered(len(replay.buffer))
    assert sum(kept) == 20
    assert min(kept) > 0
    assert gathered([point.value for point in points.points]) == [[20.0], [20.0]]
    fit(whole, replay, Saver(path))
    resumed, again = Toy(), Replay(ReplayBuffer(20))
    resumed.load_state_dict(start)
    fit(resumed, again, first=2, ckpt_path=path)
    for first, second in (
        (whole.state_dict(), resumed.state_dict()),
        *[(r.buffer.state_dict() for r in (replay, again))],
    ):
        for name, value in first.items():
            same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
            assert same, name


def _check(rank, path):
    _replay(rank, path)
    torch.manual_seed(rank)  # a run whose processes draw different numbers
    model, callback = Toy(), ShrinkAndPerturb()
    for _ in range(2):
        _fit(rank, model, callback, DDPStrategy(process_group_backend="gloo"))
    assert callback.state_dict()["times"] == 1
    assert _same_everywhere(model)
    _tune(rank)
    _prefer(rank)
    for callback in (ShrinkAndPerturb(), Distillation(), DynamicEMA(), ConsolidateUpdate(), FPF([torch.zeros(1, 16)])):
        sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        with pytest.raises(MisconfigurationException, match="no process holds the whole of a sharded one"):
            _fit(rank, Sharded(), callback, sharded)


def test_two_processes(tmp_path):
    path = tmp_path / "mid.ckpt"
    on_two_processes(_check, path)
    # on one process, those of both
    (state,) = [s for key, s in torch.load(path, weights_only=True)["callbacks"].items() if key.startswith("Replay")]
    replay = Replay(ReplayBuffer(100))
    replay.load_state_dict(state)
    assert len(replay.buffer) == sum(int(b["keys"].isfinite().sum()) for b in state["buffers"].values()) > 20
    assert replay.buffer.seen == 6 * (4 + 16)
