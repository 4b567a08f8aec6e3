"""Two processes draw the curves of one, and training on two is the same with and without us."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_collapse import CollapseGuard, CollapseMonitor, SpectralAlignmentMonitor
from lightning_collapse.functional import direction_spread, effective_rank, feature_std, mean_cosine
from lightning_collapse.spectral import singular_values
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.trainer import save_checkpoint
from tests.distributed.launch import forkserver_ddp, on_two_processes
from tests.toys import QUIET, MemoryLogger, PointKeeper, Toy, batches, weights

MEASURES = ["effective_rank", "eigenvalue_effective_rank", "feature_std", "relative_spread", "direction_spread"]
MEASURES += ["mean_cosine", "rankme"]


class Shared(Toy):
    """Every process sees its own uneven batches; far apart."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        batch = batch[: 20 if self.global_rank else 32] + 10 * self.global_rank
        features = self.encoder(batch)
        self.seen.append(features.detach().clone())
        return self.head(features).pow(2).mean()


class Sharded(Toy):
    def configure_model(self):
        fully_shard(self.encoder, mesh=self.device_mesh["data_parallel"])


def _trainer(callbacks, strategy):
    keeper = PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": MemoryLogger(), "use_distributed_sampler": False}
    return Trainer(**{**options, "callbacks": [*callbacks, keeper]}), keeper


def _ddp(rank, callbacks):
    torch.manual_seed(0)
    model = Shared()
    trainer, keeper = _trainer(callbacks, DDPStrategy(process_group_backend="gloo"))
    trainer.fit(model, batches(6, seed=rank))
    return model, trainer, keeper


def _check_ddp(rank):
    # fewer rows than features: gathered; more: moments and sums, and rows only where a measure needs them
    for rows, without in ((12, ""), (104, ""), (104, "mean_cosine")):
        measures = [name for name in MEASURES if name != without]
        callbacks = [CollapseMonitor(["encoder"], measures, every_n_steps=6, rows=rows), CollapseGuard(action="stop")]
        callbacks.append(EarlyStopping("collapse/encoder/effective_rank", check_on_train_epoch_end=True))
        model, trainer, keeper = _ddp(rank, callbacks)
        points = {point.key.rpartition("/")[2]: point for point in keeper.points if point.key.startswith("collapse")}
        everyone = [None, None]
        metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
        torch.distributed.all_gather_object(everyone, (repr((points, metrics)), model.seen))
        assert everyone[0][0] == everyone[1][0]  # the same numbers on both, bit by bit
        if rows == 104:
            # 52 of each: both batches of process 0 hold 64, of process 1 40, taken down to the rows_per_batch of 26
            taken = [evenly(part, 26) for _, seen in everyone for part in seen[-2:]]
            pool = torch.cat(taken).double()
            assert points["n"].value == len(pool) == 92
            expected = {
                "effective_rank": effective_rank(singular_values(pool)),
                "rankme": effective_rank(singular_values(pool, center=False)),
                "feature_std": feature_std(pool),
                "mean_cosine": mean_cosine(pool),
                "direction_spread": direction_spread(pool),
            }
            expected.pop(without, None)
            for name, value in expected.items():
                assert points[name].value == pytest.approx(value.item(), rel=1e-5), name
    watched, plain = weights(model), weights(_ddp(rank, [])[0])
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def _check_fsdp(rank):
    def run(callbacks):
        torch.manual_seed(0)
        model = Sharded()
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        trainer, keeper = _trainer(callbacks, strategy)
        trainer.fit(model, batches(4, seed=rank))
        shards = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        return [shard.detach().clone() for shard in shards], keeper

    watched, keeper = run([CollapseMonitor(every_n_steps=2), CollapseGuard()])
    plain, _ = run([])
    assert all(map(torch.equal, watched, plain))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, keeper.points)
    assert repr(everyone[0]) == repr(everyone[1])
    ranks = keeper.curve("collapse/encoder.2/effective_rank")
    assert [point.step for point in ranks] == [0, 1, 3]
    assert all(1 < point.value <= 8 for point in ranks)


def _check_all(rank):
    _check_ddp(rank)
    _check_fsdp(rank)


def test_two_processes():
    on_two_processes(_check_all)


@pytest.mark.filterwarnings("ignore")
def test_spawned_by_the_trainer():
    """A monitor travels to processes that the trainer starts."""
    trainer = Trainer(**{**QUIET, "devices": 2, "strategy": "ddp_spawn", "logger": False})
    trainer.callbacks.append(CollapseMonitor(["encoder"], every_n_steps=2))
    trainer.fit(Toy(), batches(4))
    assert 1 < trainer.callback_metrics["collapse/encoder/effective_rank"] <= 8


class Wide(Toy):
    """Sixty layers: more curves than a pipe holds."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(*(nn.Linear(16, 16) for _ in range(60)))
        self.head = nn.Linear(16, 2)


@pytest.mark.filterwarnings("ignore")
def test_many_curves_do_not_block_spawned_processes():
    trainer = Trainer(**{**QUIET, "devices": 2, "strategy": forkserver_ddp(), "logger": False})
    trainer.callbacks.append(SpectralAlignmentMonitor(every_n_steps=2))
    trainer.fit(Wide(), batches(4))
    assert trainer.callback_metrics["spectral_alignment/all/spectral_norm"] > 0
    assert not [name for name in trainer.callback_metrics if name.startswith("spectral_alignment/encoder")]


class OneSided(Toy):
    """A layer that runs on one process only."""

    def training_step(self, batch, batch_idx):
        features = self.encoder(batch)
        if self.global_rank:
            return nn.functional.linear(features, self.head.weight, self.head.bias).pow(2).mean()
        return self.head(features).pow(2).mean()


class Unwritable(Callback):
    """A disk that is full where the first process writes."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert not save_checkpoint(trainer, __file__ + "/no/folder.ckpt", "A test")


@pytest.mark.filterwarnings("ignore")
def test_what_happens_on_one_process_only_does_not_block_the_others():
    options = {**QUIET, "devices": 2, "strategy": forkserver_ddp(), "logger": False}
    trainer = Trainer(**options, precision="bf16-true")
    trainer.callbacks += [CollapseMonitor(["head"], every_n_steps=2, rows=2), Unwritable()]
    trainer.fit(OneSided(), batches(4))
    assert trainer.callback_metrics["collapse/head/n"] > 0
