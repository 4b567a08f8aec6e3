"""The head that no one has named is the one that a forward pass ends with, in whatever order layers are registered."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import GeometryPhaseMonitor, NeuralCollapseMonitor, RegressionCollapseMonitor
from tests.toys import QUIET, MemoryLogger, PointKeeper, fit

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


class Adapted(nn.Module):
    """A frozen Linear with a low-rank adapter beside it, as PEFT makes them."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base_layer, self.scaling = nn.Linear(inputs, outputs).requires_grad_(False), 1.0
        self.lora_A, self.lora_B = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x))


class HeadFirst(LightningModule):
    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.head = nn.Linear(12, 3)
        self.first, self.last = layer(8, 24), layer(24, 12)

    def forward(self, x):
        return self.head(torch.relu(self.last(torch.relu(self.first(x)))))

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        return nn.functional.cross_entropy(out, y) if y.ndim == 1 else (out - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def data(classes):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(192, 8, generator=draw)
    y = torch.randint(3, (192,), generator=draw) if classes else torch.randn(192, 3, generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=16)


MONITORS = {
    "neural_collapse": lambda **kwargs: NeuralCollapseMonitor(every_n_steps=3, **kwargs),
    "neural_collapse with a pass": lambda **kwargs: NeuralCollapseMonitor(every_n_steps=3, loader=data(True), **kwargs),
    "geometry": lambda **kwargs: GeometryPhaseMonitor(every_n_steps=3, **kwargs),
    "regression_collapse": lambda **kwargs: RegressionCollapseMonitor(every_n_steps=3, **kwargs),
}
each = pytest.mark.parametrize("name", MONITORS)


def named(name):
    if "neural" in name:
        return {"layer": "head"}
    return {"head": "head"} if "regression" in name else {"layer": "head:input"}


def points_of(name, body=nn.Linear, trainer=None, **kwargs):
    torch.manual_seed(0)
    keeper, monitor = PointKeeper(), MONITORS[name](**kwargs)
    options = {"max_epochs": 2, **(trainer or {})}
    ended = fit(HeadFirst(body), [monitor, keeper], data(name.startswith("neural")), **options)
    return keeper.points, ended


@each
@pytest.mark.parametrize("body", [nn.Linear, Adapted])
def test_it_is_the_last_that_runs(name, body):
    found, _ = points_of(name, body)
    wanted, _ = points_of(name, body, **named(name))
    assert {point.layer.split(".")[0] for point in found} == {"head"}
    assert {point.step for point in wanted} - {point.step for point in found} == {min(p.step for p in wanted)}
    last = max(point.step for point in wanted)
    curves = {p.key: p.value for p in found if p.step == last and p.measure not in ("phase", "minority_cosine")}
    assert curves.keys() <= {p.key for p in wanted}
    for point in wanted:
        if point.step == last and point.key in curves:
            assert curves[point.key] == pytest.approx(point.value, rel=1e-6, abs=1e-9, nan_ok=True)


@each
def test_a_resumed_run_knows_it(name, tmp_path):
    whole, _ = points_of(name)
    _, trainer = points_of(name, trainer={"max_epochs": 1})
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    keeper = PointKeeper()
    torch.manual_seed(0)
    options = {**QUIET, "max_epochs": 2, "logger": MemoryLogger(), "callbacks": [MONITORS[name](), keeper]}
    Trainer(**options).fit(HeadFirst(), data(name.startswith("neural")), ckpt_path=tmp_path / "half.ckpt")
    half = min(point.step for point in keeper.points)
    rest = [point for point in whole if point.step >= half]
    assert repr([p for p in keeper.points if p.step > half]) == repr([p for p in rest if p.step > half])
