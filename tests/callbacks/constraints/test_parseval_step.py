"""Parseval steps in real fits: after each real step, on whole weights or some of their rows."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_collapse import ParsevalStep
from lightning_collapse.functional.regularization import parseval_step, soft_orthogonality
from tests.toys import QUIET, ManualToy, Toy, batches, fit


class Still(Toy):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def toy(kind=Toy):
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("kind", [Toy, ManualToy])
def test_a_fit_is_the_loop_by_hand(kind):
    fitted, by_hand = toy(kind), toy(Toy)
    fit(fitted, [ParsevalStep(0.01)])
    optimizer = by_hand.configure_optimizers()
    for batch in batches():
        optimizer.zero_grad()
        by_hand.training_step(batch, 0).backward()
        optimizer.step()
        with torch.no_grad():
            for weight in (by_hand.encoder[0].weight, by_hand.encoder[2].weight, by_hand.head.weight):
                weight.copy_(1.01 * weight - 0.01 * weight @ weight.T @ weight)
    for key, value in fitted.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [1.0, 0.5])
def test_rows_end_orthonormal(rows):
    model = toy(Still)
    before = soft_orthogonality(model.encoder[2].weight)
    fit(model, [ParsevalStep(0.3, layers=["encoder.2"], rows=rows)], max_epochs=15)
    assert soft_orthogonality(model.encoder[2].weight) < 1e-3 * before
    assert torch.equal(model.head.weight, toy(Still).head.weight)


class Odd(LightningModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)
        self.up = nn.ConvTranspose2d(3, 5, 2, bias=False)

    def training_step(self, batch, batch_idx):
        return self.up(self.conv(batch.view(-1, 1, 4, 4))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_kernels_are_flattened_with_outputs_first():
    model = toy(Odd)
    before = copy.deepcopy(model)
    fit(model, [ParsevalStep(0.1)], limit_train_batches=1)
    conv, up = (module.weight.detach() for module in (before.conv, before.up))
    torch.testing.assert_close(model.conv.weight.detach(), parseval_step(conv.flatten(1), 0.1).view_as(conv))
    turned = parseval_step(up.transpose(0, 1).flatten(1), 0.1).view(5, 3, 2, 2).transpose(0, 1)
    torch.testing.assert_close(model.up.weight.detach(), turned)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_resumed_fits_draw_the_rows_they_would_have_drawn(tmp_path):
    fit(toy(), [], max_epochs=2)
    state = torch.get_rng_state()
    whole = toy()
    fit(whole, [ParsevalStep(0.1, rows=0.5)], max_epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    trainer = fit(toy(), [ParsevalStep(0.1, rows=0.5)])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = toy()
    Trainer(**{**QUIET, "max_epochs": 2, "logger": False, "callbacks": [ParsevalStep(0.1, rows=0.5)]}).fit(
        resumed, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_what_is_refused():
    for arguments, message in (
        ({"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ({"beta": 1.0}, "`beta` must be below 1, .* diverge, got 1.0"),
        ({"rows": 2}, "`rows` must be a share between 0 and 1, got 2"),
        ({"layers": "head"}, r"`layers` takes a list of names.*`layers=\['head'\]`"),
    ):
        with pytest.raises(ValueError, match=message):
            ParsevalStep(**arguments)
    with pytest.raises(MisconfigurationException, match=r"`ParsevalStep\(layers=\['tail'\]\)`: 'tail' matches no"):
        fit(toy(), [ParsevalStep(layers=["tail"])])
    with pytest.raises(MisconfigurationException, match=r"`encoder\.0` is kept in torch\.bfloat16.*bf16-mixed"):
        fit(toy(), [ParsevalStep()], precision="bf16-true")


def test_weights_that_a_step_would_lead_away_are_refused():
    model = toy(Still)
    weight = model.encoder[2].weight
    with torch.no_grad():
        weight.mul_(2.2 / torch.linalg.matrix_norm(weight, 2))  # steps of 0.5 lead away above the root of 5
    fit(model, [ParsevalStep(0.5, layers=["encoder.2"])], max_epochs=1)
    assert torch.linalg.matrix_norm(weight, 2) < 2.2
    with torch.no_grad():
        weight.mul_(2.3 / torch.linalg.matrix_norm(weight, 2))
    message = r"`encoder\.2` has a singular value of 2\.3, and .* above 2\.24"
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, [ParsevalStep(0.5, layers=["encoder.2"])])
