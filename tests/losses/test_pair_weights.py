"""Weights of bad pairs: what the authors' bookkeeping gives, the normalized form, warm-up, gaps, checkpoints."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import AntiCollapseMixin
from lightning_collapse.losses import SDC, PairWeights
from tests.toys import QUIET

SAMPLES, EPOCHS = 40, 6


def history() -> Tensor:
    """Losses ``(epochs, samples)`` of which the first sample's are far below, and the last one's far above the rest."""
    generator = torch.Generator().manual_seed(0)
    losses = 2 + 0.1 * torch.randn(EPOCHS, SAMPLES, generator=generator)
    losses[:, 0] -= 1.5
    losses[:, -1] += 3
    return losses


def after(weights: PairWeights, losses: Tensor, epochs: int) -> PairWeights:
    for epoch in range(epochs):
        for part in torch.randperm(SAMPLES).split(7):
            weights(losses[epoch, part], part)
        weights.end_epoch()
    return weights


def test_released_form_is_the_authors_bookkeeping() -> None:
    losses = history()
    weights = after(PairWeights(SAMPLES, 2, epochs=EPOCHS, convention="released"), losses, 4)
    share = np.arange(1, 5) / EPOCHS
    means = np.array([np.mean(losses[:4, i].numpy() * share) for i in range(SAMPLES)])
    mu, sd = means.mean(), means.std()
    odd = (means <= mu - 2 * sd) | (means >= mu + 3 * sd)
    expected = np.where(odd, stats.norm(mu, sd).pdf(losses[4].numpy()), 1.0)
    assert odd.any()
    found = weights.eval()(losses[4], torch.arange(SAMPLES))
    assert found.numpy() == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_normalized_form() -> None:
    losses = history()
    weights = after(PairWeights(SAMPLES, 2, low=2.0, high=3.0), losses, 4)
    means = np.average(losses[:4].numpy(), axis=0, weights=np.arange(1, 5))
    mu, sd = means.mean(), means.std()
    odd = (means <= mu - 2 * sd) | (means >= mu + 3 * sd)
    assert odd.nonzero()[0].tolist() == [0, SAMPLES - 1]
    found = weights(losses[4], torch.arange(SAMPLES)).numpy()
    expected = np.where(odd, np.exp(-(((losses[4].numpy() - mu) / sd) ** 2) / 2), 1.0)
    assert found == pytest.approx(expected, rel=1e-3)
    assert (found <= 1).all()


@pytest.mark.parametrize(("sd", "density"), [(0.2, 1.99), (0.4, 0.997), (1.0, 0.40), (2.0, 0.20)])
def test_a_density_at_its_mean_is_above_one_where_the_spread_is_small(sd: float, density: float) -> None:
    for convention, expected in (("released", density), ("normalized", 1.0)):
        weights = PairWeights(2, 0, low=0.0, high=0.0, epochs=1, convention=convention).eval()
        weights.memory.copy_(torch.tensor([[0.0, 8.0], [1.0, 1.0]]))
        weights.population.copy_(torch.tensor([4.0, sd]))
        assert weights(torch.tensor([4.0]), torch.tensor([0])).item() == pytest.approx(expected, abs=5e-3)


def test_warm_up_and_evaluation() -> None:
    losses, everyone = history(), torch.arange(SAMPLES)
    weights = PairWeights(SAMPLES, 2)
    assert (after(weights, losses, 1)(losses[1], everyone) == 1).all()
    weights.eval()(100 + losses[1], everyone)
    weights.end_epoch()
    assert (weights(losses[2], everyone) < 1).sum() == 2
    assert weights.population[0] < 3  # what evaluation saw is not remembered


def test_samples_that_are_left_out_and_losses_that_are_no_numbers() -> None:
    weights = PairWeights(4, 0)
    index = torch.tensor([0, 1, 1, -1, 9, 2])
    first = weights(torch.tensor([1.0, 2.0, 4.0, 7.0, 7.0, math.nan]), index)
    assert (first == 1).all()
    weights.end_epoch()
    assert weights.memory.tolist() == [[1.0, 3.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]  # twice in one epoch: their mean
    weights(torch.tensor([4.0]), torch.tensor([0]))
    weights.end_epoch()
    assert weights.memory.tolist() == [[9.0, 3.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]]
    assert weights.population.tolist() == [3.0, 0.0]
    assert (weights(torch.rand(4), torch.arange(4)) == 1).all()  # no spread, nothing is odd


def test_state_goes_on_and_gradients_are_left_alone() -> None:
    losses, everyone = history(), torch.arange(SAMPLES)
    whole = after(PairWeights(SAMPLES, 1), losses, 3)
    half = after(PairWeights(SAMPLES, 1), losses, 2)
    half(losses[2, :20], everyone[:20])
    resumed = PairWeights(SAMPLES, 1)
    resumed.load_state_dict(half.state_dict())
    resumed(losses[2, 20:], everyone[20:])
    resumed.end_epoch()
    assert torch.equal(resumed(losses[3], everyone), whole(losses[3], everyone))
    leaf = losses[3].bfloat16().requires_grad_()
    weight = whole(leaf, everyone)
    assert weight.dtype == torch.float32
    assert not weight.requires_grad


def test_misuse_is_refused() -> None:
    weights = PairWeights(4, 0)
    with pytest.raises(ValueError, match=r"`losses` must be floating point of shape \(N,\), one per pair"):
        weights(torch.tensor(1.0), torch.tensor(0))
    with pytest.raises(ValueError, match="`index` must be integers, got torch"):
        weights(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="`epochs` must be given with `convention='released'`, got None"):
        PairWeights(4, 0, convention="released")
    with pytest.raises(ValueError, match="`convention` must be one of"):
        PairWeights(4, 0, convention="papr")
    with pytest.raises(ValueError, match="`samples` must be an integer of at least 1, got 0"):
        PairWeights(0, 0)
    with pytest.raises(ValueError, match="`high` must not be negative, got -1"):
        PairWeights(4, 0, high=-1.0)


class Paired(AntiCollapseMixin, LightningModule):
    """Pairs with a bad one among them, and hash codes of one view, in a fit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.hash = nn.Linear(6, 4), nn.Linear(4, 8)
        self.pairs = PairWeights(SAMPLES, 1)
        self.set_regularizers({"sdc": (0.1, SDC())})

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, index = batch
        first, second = self.net(x), self.net(x + 0.1)
        apart = (first - second).square().sum(dim=1) + 9.0 * (index == 3)
        sdc = self.anti_collapse_loss(first, self.hash(first))
        return (self.pairs(apart, index) * apart).mean() + sdc

    def on_train_epoch_end(self) -> None:
        self.pairs.end_epoch()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_in_a_fit_that_is_resumed(tmp_path: Path) -> None:
    rows = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(rows, torch.arange(SAMPLES)), batch_size=8)

    def fit(epochs: int, **kwargs: Any) -> tuple[Paired, Trainer]:
        with torch.random.fork_rng(devices=[]):
            model, trainer = Paired(), Trainer(**{**QUIET, "max_epochs": epochs, "log_every_n_steps": 1})
            trainer.fit(model, data, **kwargs)
        return model, trainer

    whole, trainer = fit(3)
    assert {"regularizer/sdc/similarity", "regularizer/sdc/quantization"} <= set(trainer.callback_metrics)
    assert whole.pairs.ended.item() == 3
    weights = whole.eval().pairs(torch.full((SAMPLES,), 9.0), torch.arange(SAMPLES))
    assert (weights < 1).nonzero().flatten().tolist() == [3]
    _, trainer = fit(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(3, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
