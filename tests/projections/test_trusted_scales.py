"""TRGP in a module of its own, beside a projection: the old task stays, the new one scales what is protected."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import Projection
from lightning_collapse.functional.projection import input_directions, scaled_weight, trust_region
from lightning_collapse.projections import GPM
from tests.toys import QUIET


class Scaled(LightningModule):
    """As on the page of projection: the input's part in a trusted subspace is scaled, by task."""

    def __init__(self):
        super().__init__()
        self.linear, self.scales, self.bases, self.task = nn.Linear(6, 4), nn.ParameterDict(), nn.ParameterDict(), "0"
        nn.init.orthogonal_(self.linear.weight)

    def trust(self, basis):
        self.bases[self.task] = nn.Parameter(basis, requires_grad=False)
        self.scales[self.task] = nn.Parameter(torch.zeros(basis.shape[1], basis.shape[1]).to(basis))

    def forward(self, x):
        if self.task in self.scales:
            basis = self.bases[self.task]
            x = x + x @ basis @ self.scales[self.task].T @ basis.T
        return self.linear(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.01)


def fit(model, projection, x, y, steps):
    trainer = Trainer(**QUIET, logger=False, callbacks=[projection])
    trainer.fit(model, DataLoader(TensorDataset(x.repeat(steps, 1), y.repeat(steps, 1)), len(x)))


@pytest.fixture
def learned():
    """A model after a task in a plane of three directions, and what it was."""
    torch.manual_seed(0)
    model, projection = Scaled().double(), Projection(GPM(1.0), layers=["linear"])
    x = torch.randn(64, 3, dtype=torch.float64) @ torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))[0].T
    fit(model, projection, x, torch.randn(64, 4, dtype=torch.float64), 5)
    return model, projection, x


def test_a_scaled_input_is_a_scaled_weight(learned):
    model, _, x = learned
    model.task = "1"
    model.trust(input_directions(x.T @ x, threshold=1.0))
    scale = torch.randn(3, 3, dtype=torch.float64)
    with torch.no_grad():
        model.scales["1"] += scale
    every = torch.randn(9, 6, dtype=torch.float64)
    weight = scaled_weight(model.linear.weight, model.bases["1"], scale + torch.eye(3))
    torch.testing.assert_close(model(every), every @ weight.T + model.linear.bias)


@pytest.mark.parametrize("trusts", [False, True])
def test_the_old_task_stays_and_the_new_one_learns_inside_the_trust_region(learned, trusts):
    model, projection, x = learned
    basis, old = input_directions(x.T @ x, threshold=1.0), model(x).detach()
    scale = torch.eye(3, dtype=torch.float64) + 0.5 * torch.randn(3, 3, dtype=torch.float64)
    target = (x @ scaled_weight(model.linear.weight, basis, scale).T + model.linear.bias).detach()
    model.task = "1"
    before = nn.functional.mse_loss(model(x), target).item()
    [gradient] = torch.autograd.grad(nn.functional.mse_loss(model(x), target), model.linear.weight)
    outside = torch.linalg.qr(torch.cat([basis, torch.randn(6, 3).to(basis)], dim=1))[0][:, 3:]
    assert trust_region(gradient, [outside, basis]) == [1]
    if trusts:
        model.trust(basis)
    fit(model, projection, x, target, 250 if trusts else 20)
    after = nn.functional.mse_loss(model(x), target).item()
    if trusts:
        assert after < 1e-3 * before
        torch.testing.assert_close(model.scales["1"] + torch.eye(3), scale, rtol=0, atol=0.05)
    else:
        assert after == pytest.approx(before, rel=1e-9)  # every input is an old one
    model.task = "0"
    torch.testing.assert_close(model(x), old, rtol=0, atol=1e-12)
    again = Scaled().double()
    if trusts:
        again.task = "1"
        again.trust(torch.zeros_like(basis))
    again.load_state_dict(model.state_dict())
    model.task = again.task
    assert torch.equal(again(x), model(x))
