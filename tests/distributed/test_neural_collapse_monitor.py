"""Two processes with uneven batches and different classes draw the neural collapse of all their rows."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_collapse import LabelledGeometryMonitor, NeuralCollapseMonitor
from lightning_collapse.metrics.neural_collapse import measures
from lightning_collapse.monitoring.class_readings import label_readings
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.spectral.seen_classes import SeenClasses
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.body(x)
        self.seen.append((features.detach().clone(), y))
        return nn.functional.cross_entropy(self.head(features), y)

    def forward(self, x):
        return self.head(self.body(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Sharded(Classifier):
    def configure_model(self):
        for part in (self.body, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _check(rank, model, strategy):
    torch.manual_seed(0)
    keeper = PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
    far = {"far": lambda batch: 10**9 * batch[1]}  # on one process other labels, and other places, than on the other
    others = [LabelledGeometryMonitor(["head:input"], far, 4, rows=60)] if model is Classifier else []
    trainer = Trainer(**options, callbacks=[NeuralCollapseMonitor(every_n_steps=4, rows=60), *others, keeper])
    generator = torch.Generator().manual_seed(rank)
    size = 20 if rank else 30
    labels = [torch.randint(2 * rank, 3 + rank, (size,), generator=generator) for _ in range(4)]  # 0 to 2, and 2 and 3
    batches = [(torch.randn(size, 6, generator=generator) + y[:, None], y) for y in labels]
    lit = model()
    weight = lit.head.weight.detach().clone()
    trainer.fit(lit, DataLoader(batches, batch_size=None))
    window = 60 // size
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, (repr(keeper.points), lit.seen[-window:]))
    assert everyone[0][0] == everyone[1][0]
    whole = ClassMoments(4, 12)
    for _, seen in everyone:
        for features, y in seen:
            whole.update(features, y)
    expected = measures(whole, weight)
    points = {point.measure: point.value for point in keeper.points if point.family == "neural_collapse"}
    labelled = {point.measure: point.value for point in keeper.points if point.family == "labelled_geometry"}
    if others:
        found = SeenClasses(torch.arange(4), whole, None, torch.zeros(()))
        reference = label_readings(found)
        assert labelled.pop("flag") == 0
        assert labelled == pytest.approx({name: reference[name].item() for name in labelled}, rel=1e-6)
    assert points["n"] == 120
    assert points["classes"] == 4
    for name in ("nc1", "nc2_equinorm", "nc2_etf", "nc3", "cdnv", "log_cdnv", "gnc2", "unc3", "gof_error", "vci"):
        assert points[name] == pytest.approx(expected[name].item(), rel=1e-6), name


def _clean(rank, model, strategy, loader, points):
    """Values of the pass over a loader, the same on both processes; ``None`` for no points."""
    keeper = PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
    monitor = NeuralCollapseMonitor(every_n_steps=1000, loader=loader)
    trainer = Trainer(**options, callbacks=[monitor, keeper])
    torch.manual_seed(0)
    lit = model()
    start = {name: value.clone() for name, value in lit.state_dict().items()}
    trainer.fit(lit, DataLoader([(torch.randn(8, 6), torch.arange(8) % 4)], batch_size=None))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, repr(keeper.points))
    assert everyone[0] == everyone[1]
    found = {point.measure: point.value for point in keeper.points if point.layer.endswith(".eval")}
    if not points:
        assert not found
        return
    whole = Classifier()
    whole.load_state_dict(start)
    moments = ClassMoments(4, 12)
    rows = [(whole.body(x).detach(), y) for r in (0, 1) for x, y in _uneven(r)]
    for features, y in rows:
        moments.update(features, y)
    expected = measures(moments, whole.head.weight.detach())
    assert found["n"] == 3 * 20 + 30
    for name in ("nc1", "nc2_equinorm", "nc2_etf", "nc3", "cdnv", "vci"):
        assert found[name] == pytest.approx(expected[name].item(), rel=1e-6), name
    features, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    nearest = torch.cdist(features.double(), moments.means).argmin(dim=1)
    mismatch = (nearest != whole.head(features).argmax(dim=1)).double().mean().item()
    assert 0 < mismatch == pytest.approx(found["nc4"], abs=1e-12)


def _uneven(rank):
    """Three batches on the first process, a larger one on the second."""
    generator = torch.Generator().manual_seed(10 + rank)
    labels = [torch.randint(4, (30 if rank else 20,), generator=generator) for _ in range(1 if rank else 3)]
    return [(torch.randn(len(y), 6, generator=generator) + y[:, None], y) for y in labels]


class Breaking:
    """A loader that breaks off in one process only."""

    def __init__(self, rank, when):
        self.rank, self.when, self.passes = rank, when, 0

    def __iter__(self):
        self.passes += 1
        yield from _uneven(self.rank)
        if self.rank == 1 and self.passes >= self.when:
            raise OSError("no disk")


def _check_clean(rank):
    for model in (Classifier, Sharded):

        def strategy(model=model):
            if model is Classifier:
                return DDPStrategy(process_group_backend="gloo")
            return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")

        _clean(rank, model, strategy(), _uneven(rank), points=True)
        _clean(rank, model, strategy(), Breaking(rank, 1), points=False)


def _check_all(rank):
    _check(rank, Classifier, DDPStrategy(process_group_backend="gloo"))
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    _check(rank, Sharded, sharded)


def test_two_processes():
    on_two_processes(_check_all)


def test_pass_over_clean_data_on_two_processes():
    on_two_processes(_check_clean)
