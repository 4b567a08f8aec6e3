"""Ratios of variances of values and gradients, of all rows of a step, whatever the model does on its way."""

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_collapse import VariancePropagationMonitor
from lightning_collapse.spectral.feature_moments import FeatureMoments
from lightning_collapse.utilities.points import Flag
from tests.attention import GPT, tokens
from tests.toys import ManualToy, PointKeeper, Toy, batches, fit

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
DEPTH, WIDTH = 8, 128


class Deep(Toy):
    """A chain of linear layers with weights of a given scale, and maybe rectifiers; it does not learn."""

    def __init__(self, scale=1.0, rectified=False, how="plain"):
        super().__init__()
        self.encoder, self.head = nn.Identity(), nn.Identity()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=(scale / WIDTH) ** 0.5)
        self.act, self.how = nn.ReLU(inplace=True) if rectified else nn.Identity(), how

    def forward(self, x, kept=None):
        for layer in self.layers:
            h = layer(x) if self.how == "plain" else checkpoint(layer, x, use_reentrant=self.how == "reentrant")
            if kept is not None:
                h.retain_grad()
                kept.append(h)
            x = self.act(h + 0 if kept is not None else h)
        return x

    def training_step(self, batch, batch_idx):
        x = self(batch.requires_grad_(self.how == "reentrant"))
        return (x * slopes(len(x)).to(x)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def slopes(rows):
    """The gradient at the last layer: that of a loss that knows nothing of the weights."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(2))


def data(n=4, size=64):
    return batches(n, size, WIDTH)


def ratios(keeper, measure, step=None):
    step = keeper.points[-1].step if step is None else step
    return [p.value for p in keeper.points if p.measure == measure and p.layer != "all" and p.step == step]


def run(model, loader=None, layers=("layers.*",), **kwargs):
    keeper = PointKeeper()
    monitor = VariancePropagationMonitor(list(layers) if layers else None, every_n_steps=2, first_steps=0)
    fit(model, [monitor, keeper], loader or data(), **kwargs)
    return keeper


@pytest.mark.filterwarnings("error:.*no gradient")
def test_a_rectifier_in_place_hides_no_gradient_of_sequences():
    class Sequences(Deep):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch.view(8, -1, WIDTH), batch_idx)

    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = Sequences(scale=2.0, rectified=True)
        for layer in model.layers:  # with a bias what the layer returns is a view
            layer.bias = nn.Parameter(torch.zeros(WIDTH))
        model.act = nn.ReLU(inplace=inplace)
        found.append(ratios(run(model), "backward_ratio"))
    assert len(found[0]) == DEPTH - 1
    assert found[0] == pytest.approx(found[1])


def reference(model, rows):
    """Variances of values and of gradients, from retained tensors, in double precision."""
    kept = []
    model = deepcopy(model).double()
    model.how = "plain"
    (model(torch.cat(rows).double(), kept) * torch.cat([slopes(len(part)) for part in rows])).sum().backward()
    flat = [(h.flatten(0, -2), h.grad.flatten(0, -2)) for h in kept]
    values, gradients = ([of.var(dim=0, correction=0).mean().item() for of in some] for some in zip(*flat, strict=True))
    return values, gradients


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rectified", [False, True])
def test_ratios_are_those_of_all_rows_of_the_step(accumulate, rectified):
    torch.manual_seed(0)
    model = Deep(rectified=rectified)
    keeper = run(model, accumulate_grad_batches=accumulate)
    values, gradients = reference(model, list(data())[-accumulate:])
    expected = [b / a for a, b in pairwise(values)]
    assert ratios(keeper, "forward_ratio") == pytest.approx(expected, rel=1e-5)
    expected = [a / b for a, b in pairwise(gradients)]
    assert ratios(keeper, "backward_ratio") == pytest.approx(expected, rel=1e-4)
    ends = {p.measure: p.value for p in keeper.points if p.layer == "all"}
    assert ends["forward_product"] == pytest.approx(values[-1] / values[0], rel=1e-5)
    assert ends["backward_product"] == pytest.approx(gradients[0] / gradients[-1], rel=1e-4)
    assert {p.n for p in keeper.points if p.layer != "all"} == {64 * accumulate}


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_vanishing_and_exploding_are_told_from_healthy(scale):
    torch.manual_seed(0)
    keeper = run(Deep(scale))
    for product in ("forward_product", "backward_product"):
        (value,) = [p.value for p in keeper.points if p.measure == product and p.step == 3]
        assert math.log(value) / (DEPTH - 1) == pytest.approx(math.log(scale), abs=0.25)


@pytest.mark.parametrize("how", ["reentrant", "other"])
def test_activation_checkpointing_changes_nothing(how):
    found = []
    for way in ("plain", how):
        torch.manual_seed(0)
        found.append(run(Deep(how=way)))
    plain, other = ([(p.key, p.step, p.value) for p in keeper.points] for keeper in found)
    assert [point[:2] for point in plain] == [point[:2] for point in other]
    assert [point[2] for point in plain] == pytest.approx([point[2] for point in other], rel=1e-6)


def test_a_loss_scale_does_not_move_it_and_small_numbers_are_not_lost():
    class Faint(Deep):
        factor = 1.0

        def training_step(self, batch, batch_idx):
            return self.factor * super().training_step(batch, batch_idx)

    found = []
    for factor in (1.0, 1e-30):
        torch.manual_seed(0)
        model = Faint()
        model.factor = factor
        found.append(run(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    torch.manual_seed(0)
    found.append(run(Deep(), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], accelerator="cpu"))
    first, faint, scaled = (ratios(keeper, "backward_ratio") for keeper in found)
    assert faint == pytest.approx(first, rel=1e-3)
    assert scaled == pytest.approx(first, rel=0.05)


def test_the_first_steps_are_read_one_by_one_and_layers_in_the_order_in_which_they_run():
    class Backwards(Deep):
        def forward(self, x, kept=None):
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    keeper = PointKeeper()
    fit(Backwards(), [VariancePropagationMonitor(every_n_steps=5, first_steps=3), keeper], data(12))
    assert sorted({p.step for p in keeper.points}) == [0, 1, 2, 4, 9]
    layers = [p.layer for p in keeper.points if p.measure == "n" and p.step == 9]
    assert layers == [f"layers.{i}" for i in reversed(range(DEPTH))]


def test_maps_blocks_padding_and_manual_optimization():
    class Maps(Toy):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(*(nn.Conv2d(1 if i == 0 else 4, 4, 3, padding=1) for i in range(3)))
            self.head = nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            return self.head(self.encoder(batch.view(-1, 1, 4, 4)).mean((2, 3))).square().mean()

    keeper = run(Maps(), batches(), layers=("encoder.*",))
    assert {p.n for p in keeper.points if p.layer != "all"} == {32 * 16}  # every position is a row
    assert len(ratios(keeper, "forward_ratio")) == len(ratios(keeper, "backward_ratio")) == 2
    keeper = run(ManualToy(), batches(), layers=None)
    assert len(ratios(keeper, "backward_ratio")) == 2
    mask = torch.ones(24).long()
    mask[20:] = 0
    keeper = run(GPT(), tokens(4, attention_mask=mask), layers=None)
    assert {p.n for p in keeper.points if p.layer != "all"} == {8 * 20}
    assert [p.layer for p in keeper.points if p.measure == "n" and p.step == 3][:2] == ["blocks.0", "blocks.1"]


def test_bad_constant_and_silent_layers_are_flagged():
    class Odd(Deep):
        def forward(self, x, kept=None):
            x = self.layers[0](x)
            x = self.layers[1](x.index_fill(0, torch.tensor([0]), torch.nan))
            return self.layers[2](x.nan_to_num()) * 0 + 1

    model = Odd()
    nn.init.zeros_(model.layers[2].weight)
    with pytest.warns(UserWarning, match="`layers.3` did not run before every point"):
        keeper = run(model, layers=("layers.[0-3]",))
    flags = {p.layer: p.value for p in keeper.points if p.measure == "flag" and p.step == 0}
    expected = [Flag.OK, Flag.NONFINITE, Flag.CONSTANT, Flag.NOT_CALLED]
    assert list(flags.values()) == expected
    last = {p.measure: p for p in keeper.points if p.layer == "layers.1" and p.step == 0}
    assert last["forward_ratio"].n == 63


@pytest.mark.parametrize("inside", [False, True])
def test_of_layers_inside_compiled_code_values_alone_are_read(inside):
    torch.manual_seed(0)
    model = Deep()
    plain = run(deepcopy(model), layers=("layers.[01]",))
    if inside:
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        for layer in model.layers[:2]:
            layer.compile(backend="eager")
    keeper = run(model, layers=("layers.[01]",))
    assert ratios(keeper, "forward_ratio") == pytest.approx(ratios(plain, "forward_ratio"), rel=1e-5)
    expected = [] if inside else ratios(plain, "backward_ratio")
    assert ratios(keeper, "backward_ratio") == pytest.approx(expected, rel=1e-5)
    assert ratios(plain, "backward_ratio")
    torch.compiler.reset()


def test_moments_at_a_large_offset_in_any_split_are_those_of_all_rows():
    torch.manual_seed(0)
    rows = 1000 + torch.randn(90, 5)
    moments = FeatureMoments(5)
    for part in rows.split([7, 50, 33]):
        moments.update(part)
    expected = rows.double().var(dim=0, correction=0).mean().item()
    assert moments.variance.item() == pytest.approx(expected, rel=1e-6)
    tiny = FeatureMoments(5)
    tiny.update(1e-25 * (rows - 1000))
    assert tiny.variance.item() == pytest.approx(expected * 1e-50, rel=1e-5)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="`first_steps`"):
        VariancePropagationMonitor(first_steps=-1)
    with pytest.raises(MisconfigurationException, match=r"`VariancePropagationMonitor\(layers=\['nothing'\]\)`"):
        fit(Toy(), [VariancePropagationMonitor(["nothing"])], DataLoader(torch.ones(4, 16)))
