"""Max-norm projection in real fits: after each real step, on the weights of the optimizer that stepped alone."""

import copy
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_collapse import Constraint, MaxNorm
from tests.toys import QUIET, ManualToy, MemoryLogger, Toy, batches, fit


def toy(kind=Toy):
    torch.manual_seed(0)
    return kind()


def lengths(weight):
    return weight.detach().norm(dim=1)


def project(weight, radius):
    with torch.no_grad():
        norm = weight.norm(dim=1, keepdim=True)
        weight.copy_(torch.where(norm > radius, weight * (radius / norm), weight))


def published(weight):
    norm = lengths(weight)
    return norm.min() + 0.1 * (norm.max() - norm.min())


class Counter(MaxNorm):
    """Notes the batches after which weights were projected."""

    def __init__(self, **options):
        super().__init__(**options)
        self.names, self.seen = [], []

    def apply(self, name, weight):
        super().apply(name, weight)
        self.names.append(name)

    def on_train_batch_end(self, *_):
        self.seen.append(len(self.names))

    @property
    def moves(self):
        return [after - before for before, after in zip([0, *self.seen], self.seen, strict=False)]


@pytest.mark.parametrize("kind", [Toy, ManualToy])
@pytest.mark.parametrize("radius", [None, 0.3])
def test_a_fit_is_the_loop_by_hand(kind, radius):
    fitted, by_hand = toy(kind), toy(Toy)
    fit(fitted, [MaxNorm(radius)])
    optimizer = by_hand.configure_optimizers()
    weights = [by_hand.encoder[0].weight, by_hand.encoder[2].weight, by_hand.head.weight]
    radii = [published(w) if radius is None else radius for w in weights]
    for batch in batches():
        optimizer.zero_grad()
        by_hand.training_step(batch, 0).backward()
        optimizer.step()
        for weight, at in zip(weights, radii, strict=True):
            project(weight, at)
    for key, value in fitted.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[key], rtol=1e-5, atol=1e-7)


def test_rows_inside_keep_every_bit_and_rows_of_zeros_stay():
    class Still(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = toy(Still)
    with torch.no_grad():
        model.encoder[2].weight[0] = 0.0
    before, radius = copy.deepcopy(model), lengths(model.encoder[2].weight).median().item()
    fit(model, [MaxNorm(radius, layers=["encoder.2"])])
    after, old = model.encoder[2].weight, before.encoder[2].weight
    short = lengths(old) < radius
    assert 1 < short.sum() < 7
    assert torch.equal(after[short], old[short])
    assert (after[0] == 0).all()
    torch.testing.assert_close(lengths(after)[~short], torch.full((int((~short).sum()),), radius))
    assert torch.equal(model.encoder[0].weight, before.encoder[0].weight)


def test_one_projection_per_accumulation_window():
    counter = Counter()
    fit(toy(), [counter], accumulate_grad_batches=2)
    assert counter.moves == [0, 3, 0, 3, 0, 3]


class Overflows(Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.batch_idx == 3:
            pl_module.head.weight.grad.fill_(torch.inf)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_none_for_an_update_that_the_scaler_leaves_out():
    counter, scaler = Counter(layers=["head"]), torch.amp.GradScaler("cpu", init_scale=1.0)
    fit(toy(), [counter, Overflows()], plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert counter.moves == [1, 1, 1, 0, 1, 1]


class TwoOptimizers(Toy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.encoder, self.head)]


def test_only_what_an_optimizer_has_stepped():
    counter = Counter()
    fit(toy(TwoOptimizers), [counter])
    assert counter.moves == [2, 1, 2, 1, 2, 1]
    assert counter.names[:3] == ["encoder.0", "encoder.2", "head"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_resumed_fits_keep_the_radii_of_the_start(tmp_path):
    whole = toy()
    fit(whole, [MaxNorm(), MaxNorm(0.2, layers=["head"])], max_epochs=2)
    callbacks = [MaxNorm(), MaxNorm(0.2, layers=["head"])]
    trainer = fit(toy(), callbacks)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = toy()
    again = [MaxNorm(), MaxNorm(0.2, layers=["head"])]
    Trainer(**{**QUIET, "max_epochs": 2, "logger": False, "callbacks": again}).fit(
        resumed, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert again[0].state_dict() == callbacks[0].state_dict()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


class Odd(LightningModule):
    """Every kind of weight whose rows lie elsewhere, a shared one and some that have no rows."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)
        self.up = nn.ConvTranspose2d(3, 5, 2, bias=False)
        self.norm = nn.LayerNorm((5, 4, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.table = nn.Embedding(3, 4)
        self.tied = self.up

    def training_step(self, batch, batch_idx):
        x = self.norm(self.up(self.conv(batch.view(-1, 1, 4, 4)))).mean(dim=(1, 2)) + self.table.weight[0]
        return self.attention(x, x, x)[0].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_rows_are_what_leads_to_one_output():
    torch.manual_seed(0)
    model, counter = Odd(), Counter(radius=0.1)
    fit(model, [counter])
    assert set(counter.names) == {"conv", "up", "attention", "attention.out_proj"}
    torch.testing.assert_close(model.conv.weight.detach().flatten(1).norm(dim=1), torch.full((3,), 0.1))
    torch.testing.assert_close(model.up.weight.detach().transpose(0, 1).flatten(1).norm(dim=1), torch.full((5,), 0.1))
    assert lengths(model.attention.in_proj_weight).max() < 0.1 + 1e-6
    assert lengths(model.table.weight).min() > 0.2


def test_what_is_refused():
    with pytest.raises(ValueError, match="`radius` must be positive, got 0"):
        MaxNorm(0)
    with pytest.raises(ValueError, match=r"`layers` takes a list of names.*`layers=\['head'\]`"):
        MaxNorm(layers="head")
    with pytest.raises(MisconfigurationException, match=r"`MaxNorm\(layers=\['tail'\]\)`: 'tail' matches no submodule"):
        fit(toy(), [MaxNorm(layers=["tail"])])
    with pytest.raises(MisconfigurationException, match=r"`MaxNorm` finds no weight of a linear .* in encoder\.1"):
        fit(toy(), [MaxNorm(layers=["encoder.1"])])
    model = toy()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(MisconfigurationException, match=r"the rows of `head` are all zeros.*radius=1\.0"):
        fit(model, [MaxNorm()])


class Fails(Constraint):
    def choose(self, pl_module):
        return {"head": pl_module.head.weight}

    def apply(self, name, weight):
        raise RuntimeError("boom")


def test_one_that_fails_is_left_out_and_none_leaves_anything():
    with pytest.warns(UserWarning, match="`Fails`: acting on weights failed with .*boom.*left as they are"):
        trainer = fit(toy(), [Fails()])
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    constraint = MaxNorm()
    trainer = fit(toy(), [constraint])
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not pickle.loads(pickle.dumps(copy.deepcopy(constraint)))._weights
    with pytest.raises(ValueError, match="boom"):
        Trainer(**{**QUIET, "logger": MemoryLogger(), "callbacks": [constraint]}).fit(Toy(fail_at=2), batches())
    assert not constraint._removers
