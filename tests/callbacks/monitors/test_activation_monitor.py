"""What layers return is read whole, once a point, whatever the model does with it."""

from math import isnan, log2

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import ActivationMonitor
from lightning_collapse.functional import activation_outliers, outlier_nulls
from lightning_collapse.utilities.points import Flag
from tests.toys import PointKeeper, Toy, batches, fit

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
READ = (
    "abs_max",
    "rms",
    "crest_factor",
    "kurtosis",
    "neuron_kurtosis",
    "max_median_ratio",
    "outlier_fraction",
    "massive",
    "flushed_fraction",
)


class Still(Toy):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def values_of(keeper, layer, step=None):
    step = keeper.points[-1].step if step is None else step
    return {p.measure: p for p in keeper.points if p.layer == layer and p.step == step}


def assert_reads(found, rows):
    expected = activation_outliers(rows)
    for name in READ:
        assert found[name].value == pytest.approx(getattr(expected, name).item(), rel=1e-5, nan_ok=True), name
    assert {point.n for point in found.values()} == {len(rows)}
    nulls = outlier_nulls(*rows.shape)
    assert all(found[name].null == nulls[name] for name in nulls)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_number_of_the_step_counts(accumulate):
    keeper, model, loader = PointKeeper(), Still(), batches(6, 300)  # more rows than monitors sample
    fit(model, [ActivationMonitor(every_n_steps=2), keeper], loader, accumulate_grad_batches=accumulate)
    of_step = torch.cat(list(loader)[-accumulate:])
    for name, layer in (("encoder.0", model.encoder[:1]), ("head.input", model.encoder), ("head", None)):
        rows = layer(of_step) if layer is not None else model.head(model.encoder(of_step))
        assert_reads(values_of(keeper, name), rows.detach())
    together, alone = values_of(keeper, "all"), [values_of(keeper, n) for n in ("encoder.0", "encoder.2", "head")]
    assert together["crest_factor"].value >= max(of["crest_factor"].value for of in alone)
    assert together["abs_max"].value >= max(of["abs_max"].value for of in alone)
    assert together["headroom_bits"].value <= min(of["headroom_bits"].value for of in alone)


def test_the_one_largest_number_is_found_wherever_it_is():
    class Spike(Still):
        def training_step(self, batch, batch_idx):
            batch = batch.clone()
            batch[batch_idx * 37 + 11, 5] = 5000.0
            return super().training_step(batch, batch_idx)

    keeper = PointKeeper()
    fit(Spike(), [ActivationMonitor(["encoder.0:input"], every_n_steps=1), keeper], batches(6, 2000))
    peaks = [point.value for point in keeper.curve("activations/encoder.0.input/abs_max")]
    assert peaks == [5000.0] * 6
    assert values_of(keeper, "encoder.0.input")["massive"].value == 1


class Tokens(LightningModule):
    """Two calls of an embedding of tokens, with padding; and maps."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.out = nn.Linear(3, 8), nn.Conv2d(1, 4, 3), nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        self.first, self.second = self.embed(batch["x"]), self.embed(batch["x"] * 2)
        self.maps = self.conv(batch["image"])
        return (self.out(self.first + self.second).mean() + self.maps.mean()).square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_tokens_without_padding_all_calls_and_every_position_of_maps():
    torch.manual_seed(0)
    mask = torch.arange(7).expand(5, 7) < torch.tensor([[7], [3], [1], [5], [2]])
    x = torch.randn(5, 7, 3)
    x[~mask] = 1e4
    batch = {"x": x, "attention_mask": mask.long(), "image": torch.randn(5, 1, 9, 9)}
    keeper, model = PointKeeper(), Tokens()
    layers = ["embed", "conv"]
    fit(model, [ActivationMonitor(layers, every_n_steps=1), keeper], DataLoader([batch], batch_size=None))
    rows = torch.cat([model.first[mask], model.second[mask]]).detach()
    assert_reads(values_of(keeper, "embed"), rows)
    assert_reads(values_of(keeper, "conv"), model.maps.detach().movedim(1, -1).flatten(0, 2))


@pytest.mark.parametrize(
    ("precision", "largest"), [("32-true", 3.4028e38), ("bf16-true", 3.3895e38), ("16-true", 65504)]
)
def test_headroom_is_of_the_format_in_use(precision, largest):
    keeper = PointKeeper()
    fit(Still(), [ActivationMonitor(every_n_steps=1), keeper], precision=precision)
    found = values_of(keeper, "encoder.2")
    assert found["headroom_bits"].value == pytest.approx(log2(largest / found["abs_max"].value), abs=1e-3)


def test_bad_numbers_silent_layers_and_constants_are_flagged():
    class Odd(Still):
        def __init__(self):
            super().__init__()
            self.never, self.zero = nn.ReLU(), nn.Identity()

        def training_step(self, batch, batch_idx):
            self.encoder[0](torch.where(torch.arange(len(batch)).unsqueeze(1) == 0, torch.inf, batch))
            self.zero(torch.zeros(4, 3))
            return super().training_step(batch, batch_idx)

    keeper, model = PointKeeper(), Odd()
    with pytest.warns(UserWarning, match="`never` did not run"):
        fit(model, [ActivationMonitor(["encoder.0", "never", "zero"], every_n_steps=6), keeper])
    found = values_of(keeper, "encoder.0", 5)
    assert found["flag"].value == Flag.NONFINITE
    assert found["n"].value == 63
    assert not isnan(found["abs_max"].value)
    assert values_of(keeper, "never")["flag"].value == Flag.NOT_CALLED
    assert isnan(values_of(keeper, "never")["abs_max"].value)
    assert values_of(keeper, "zero")["flag"].value == Flag.CONSTANT
    assert isnan(values_of(keeper, "zero")["headroom_bits"].value)


def test_default_layers_follow_the_order_of_execution_from_the_second_point_on():
    class More(Toy):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 2)

    keeper = PointKeeper()
    fit(More(), [ActivationMonitor(every_n_steps=1), keeper])
    layers = [{point.layer for point in keeper.points if point.step == step} for step in (0, 1, 5)]
    plain = PointKeeper()
    fit(Toy(), [ActivationMonitor(every_n_steps=1), plain])
    assert layers[1] == layers[2] == {point.layer for point in plain.points}  # and nothing is said of the other one
    assert layers[0] < layers[1]


def test_a_compiled_model_is_read_too():
    keeper, model = PointKeeper(), Still()
    model.encoder = torch.compile(model.encoder, backend="eager", fullgraph=True)
    loader = batches(4, 300)
    fit(model, [ActivationMonitor(["encoder"], every_n_steps=2), keeper], loader)
    torch.compiler.reset()
    assert_reads(values_of(keeper, "encoder"), model.encoder(list(loader)[-1]).detach())


def test_arguments():
    with pytest.raises(ValueError, match="`layers`"):
        ActivationMonitor(layers="encoder")
    with pytest.raises(MisconfigurationException, match="matches no submodule"):
        fit(Toy(), [ActivationMonitor(["nothing"])])
