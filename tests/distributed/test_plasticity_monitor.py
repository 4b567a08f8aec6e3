"""Two processes with uneven batches draw the units of all their rows, and shards the whole weights."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_collapse import PlasticityMonitor
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper, Toy


class Half(Toy):
    """Some units of the first layer are off, some only see what the second process has."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.encoder[0].weight[:9] = 0
            self.encoder[0].bias[:9] = -1
            self.encoder[0].bias[9:12] = -100
            self.encoder[0].weight[9:12] = 0
            self.encoder[0].weight[9:12, 0] = 1


class Sharded(Half):
    def configure_model(self):
        for part in (self.encoder[0], self.encoder[2], self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _rows(rank):
    rows = torch.randn(5 if rank else 12, 16, generator=torch.Generator().manual_seed(rank))
    rows[:, 0] = 200 * rank
    return rows


def _check(rank):
    for model in (Half, Sharded):
        if model is Half:
            strategy = DDPStrategy(process_group_backend="gloo")
        else:
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        keeper, monitor = PointKeeper(), PlasticityMonitor(every_n_steps=1)
        options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
        torch.manual_seed(0)
        lit = model()
        before = {name: value.detach().clone() for name, value in lit.named_parameters()}
        twin = Half()
        twin.load_state_dict(before)
        Trainer(**options, callbacks=[monitor, keeper]).fit(lit, DataLoader([_rows(rank)], batch_size=None))
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, repr(keeper.points))
        assert everyone[0] == everyone[1]
        found = {point.key.removeprefix("plasticity/"): point for point in keeper.points}
        with torch.no_grad():
            features = twin.encoder[:2](torch.cat([_rows(0), _rows(1)]))
        active = (features > 0).any(dim=0)
        assert not active[:9].any()
        assert active[9:12].all()
        assert found["encoder.1/dead_fraction"].value == pytest.approx((~active).float().mean().item())
        assert found["encoder.1/mean_activation"].value == pytest.approx(features.mean().item(), rel=1e-5)
        assert found["encoder.1/srank"].n == 17
        assert found["encoder.1/std_ratio"].value == found["encoder.1/magnitude_ratio"].value == 1
        likeness = torch.nan_to_num(features.double().T.corrcoef()).fill_diagonal_(0).abs().amax(dim=0)
        assert found["encoder.1/cloned_fraction"].value == pytest.approx((likeness > 0.95).double().mean().item())
        after = torch.cat([_full(value).flatten() for _, value in sorted(lit.named_parameters())])
        then = torch.cat([value.flatten() for _, value in sorted(before.items())])
        assert found["all/mean_weight"].value == pytest.approx(after.abs().mean().item(), rel=1e-5)
        assert 0 < found["all/init_distance"].value == pytest.approx((after - then).norm().item(), rel=1e-4)
        state = monitor.state_dict()["state"]["start"]
        assert all(torch.equal(state[name], before[name]) for name in before)
        torch.distributed.barrier()


def _full(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()


def test_two_processes():
    on_two_processes(_check)
