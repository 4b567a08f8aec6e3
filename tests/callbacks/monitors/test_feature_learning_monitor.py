"""The feature learning monitor against readings by hand: whole gradients, Gram matrices and weights of a second run."""

import logging
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import FeatureLearningMonitor
from lightning_collapse.functional.feature_learning import (
    critical_temperature,
    kernel_alignment,
    null_space_share,
    relative_weight_change,
    sign_similarity,
)
from lightning_collapse.layers import CosineClassifier
from tests.toys import ManualToy, PointKeeper, Toy, batches, fit


def readings(keeper, step):
    return {(p.layer, p.measure): p for p in keeper.points if p.step == step}


class Net(LightningModule):
    """Layers that are called twice, on tokens, with something done in place behind one, dropout and a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.norm = nn.Linear(6, 10), nn.Dropout(0.5), nn.BatchNorm1d(10)
        self.second, self.head = nn.Linear(10, 10), nn.Linear(10, 4)
        self.seen, self.counts = [], 0

    def features(self, x):
        x = self.drop(self.first(x).relu_())
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.second(self.second(x).tanh())

    def forward(self, x):
        return self.head(self.features(x).mean(dim=1))

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        self.counts += 1
        loss = self(batch + 0.1 * torch.rand_like(batch)).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def data(count=6, size=12, length=3, seed=0):
    rows = torch.randn(count * size, length, 6, generator=torch.Generator().manual_seed(seed))
    return DataLoader(rows, batch_size=size)


def gram_by_hand(net, x, name):
    """Gram matrix of whole gradients of the head's output along the direction, sample by sample, and the features."""
    layer, outputs = getattr(net, name), []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    direction = torch.randn(4, generator=torch.Generator().manual_seed(0))
    values = net(x) @ direction
    handle.remove()
    gradients = [torch.autograd.grad(v, layer.weight, retain_graph=True)[0].flatten() for v in values]
    gradients = torch.stack(gradients).double()
    features = torch.cat([o.unsqueeze(1) if o.ndim == 2 else o for o in outputs], dim=1)
    return gradients @ gradients.T, features


def test_readings_are_those_of_whole_gradients_on_the_first_batch():
    torch.manual_seed(0)
    net, keeper = Net(), PointKeeper()
    first = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    fit(net, [FeatureLearningMonitor(every_n_steps=6), keeper], data())
    assert net.counts == 6
    probe = next(iter(data()))
    torch.manual_seed(0)
    noisy = probe + 0.1 * torch.rand(12, 3, 6)
    torch.manual_seed(0)
    twin = Net().eval()
    before = {name: gram_by_hand(twin, noisy, name) for name in ("first", "second", "head")}
    for (name, start), parameter in zip(first.items(), twin.parameters(), strict=True):
        assert torch.equal(start, parameter), name
    net.eval()  # statistics of its norm are those of the fit
    found = readings(keeper, 5)
    for name, (kernel, features) in before.items():
        now_kernel, now_features = gram_by_hand(net, noisy, name)
        weight = getattr(net, name).weight.detach()
        grams = [x.flatten(1).double() @ x.flatten(1).double().T for x in (now_features, features)]
        expected = {
            "weight_change": relative_weight_change(weight, first[f"{name}.weight"]),
            "kernel_alignment": kernel_alignment(now_kernel, kernel).debiased,
            "representation_alignment": kernel_alignment(*grams).debiased,
            "sign_similarity": sign_similarity(now_features.flatten(0, 1), features.flatten(0, 1)).share,
        }
        for measure, value in expected.items():
            assert found[name, measure].value == pytest.approx(value.item(), rel=1e-4), (name, measure)
            assert found[name, measure].n == 12
    inputs = noisy.flatten(0, 1)
    update = net.first.weight.detach() - first["first.weight"]
    share, null = null_space_share(update, inputs).tolist()
    assert found["first", "null_space_share"].value == pytest.approx(share, abs=1e-6)
    assert found["first", "null_space_share"].null == pytest.approx(null)


def test_a_learning_rate_of_nothing_is_lazy():
    net, keeper = Toy(), PointKeeper()
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=0.0)
    fit(net, [FeatureLearningMonitor(every_n_steps=3), keeper])
    found = readings(keeper, 5)
    for layer in ("encoder.0", "encoder.2", "head"):
        assert found[layer, "weight_change"].value == 0
        for measure in ("representation_alignment", "sign_similarity"):
            assert found[layer, measure].value == pytest.approx(1.0)
            assert found[layer, measure].null < 0.95
        assert (layer, "null_space_share") not in found  # there is no update
    for layer in ("encoder.0", "encoder.2", "head"):
        assert found[layer, "kernel_alignment"].value == pytest.approx(1.0)


def test_nulls_are_near_what_a_network_made_anew_reads():
    class Replaced(Toy):
        def on_train_batch_end(self, *args):
            torch.manual_seed(self.global_step)
            for layer in (self.encoder[0], self.encoder[2], self.head):
                layer.reset_parameters()

    keeper, values = PointKeeper(), {}
    fit(Replaced(), [FeatureLearningMonitor(every_n_steps=1), keeper], batches(10))
    for point in keeper.points:
        values.setdefault((point.layer, point.measure), []).append((point.value, point.null))
    for measure in ("representation_alignment", "sign_similarity"):
        found, null = torch.tensor(values["encoder.0", measure][1:]).mean(dim=0)
        assert found == pytest.approx(null.item(), abs=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_layers_may_be_convolutions_and_wide_ones_are_projected(monkeypatch):
    class Maps(Toy):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 8))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch.view(-1, 1, 8, 8), batch_idx)

    keeper = PointKeeper()
    fit(Maps(), [FeatureLearningMonitor(every_n_steps=3), keeper], batches(width=64))
    found = readings(keeper, 5)
    assert {measure for layer, measure in found if layer == "encoder.0"} == {
        "weight_change",
        "representation_alignment",
        "sign_similarity",
    }
    # behind it all is linear: whatever gradients are dealt, the kernel is that of the inputs, and the null says so
    assert found["encoder.3", "kernel_alignment"].null == pytest.approx(1.0)
    exact, sketched = PointKeeper(), PointKeeper()
    for kept, most in ((exact, 2**22), (sketched, 1)):
        monkeypatch.setattr("lightning_collapse.monitoring.feature_learning.MOST_NUMBERS", most)
        torch.manual_seed(1)
        fit(Net(), [FeatureLearningMonitor(["first"], every_n_steps=6), kept], data(size=40))
    pair = [readings(kept, 5)["first", "kernel_alignment"].value for kept in (exact, sketched)]
    assert pair[1] == pytest.approx(pair[0], abs=0.15)
    assert pair[1] != pair[0]


def test_heads_with_a_temperature_are_beside_their_critical_one():
    class Cosine(Toy):
        def __init__(self):
            super().__init__()
            self.head = CosineClassifier(8, 5)

    torch.manual_seed(0)
    net, keeper = Cosine(), PointKeeper()
    fit(net, [FeatureLearningMonitor(every_n_steps=6, temperatures={"encoder.2": 0.5}), keeper])
    found, x = readings(keeper, 5), next(iter(batches()))
    for layer, rows, temperature in (
        ("head", net.encoder(x), 1 / net.head.log_scale.exp()),
        ("encoder.2", net.encoder[:2](x), 0.5),
    ):
        critical = critical_temperature(rows.detach())
        assert found[layer, "beta_ratio"].value == pytest.approx((critical.temperature / temperature).item(), rel=1e-4)
        assert found[layer, "beta_ratio"].null == pytest.approx((critical.null / temperature).item(), rel=1e-4)
        assert found[layer, "mean_norm"].value == pytest.approx(critical.mean_norm.item(), rel=1e-4)


def test_a_probe_of_the_user_is_what_is_read():
    probe, keeper = torch.randn(5, 16, generator=torch.Generator().manual_seed(3)), PointKeeper()
    net = Toy()
    start = [layer.weight.detach().clone() for layer in (net.encoder[0],)]
    fit(net, [FeatureLearningMonitor(probe=probe, every_n_steps=6), keeper])
    expected = null_space_share(net.encoder[0].weight.detach() - start[0], probe)
    found = readings(keeper, 5)["encoder.0", "null_space_share"]
    assert (found.value, found.null, found.n) == (pytest.approx(expected[0].item()), pytest.approx(11 / 16), 5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"probe": torch.zeros(4, 15)}, MisconfigurationException, r"probe=\.\.\..*cannot be called on it.*15"),
        ({"probe": "x"}, ValueError, "`probe` takes a batch"),
        ({"probe": torch.zeros(257, 16)}, ValueError, "`probe` may have 256 samples, got 257"),
        ({"inputs": 3}, ValueError, "`inputs` takes a function"),
        ({"temperatures": {"head": -1}}, ValueError, "`temperatures` takes positive numbers"),
        ({"temperatures": {"tail": 1.0}}, MisconfigurationException, "'tail' matches no submodule"),
        ({"layers": ["tail"]}, MisconfigurationException, "'tail' matches no submodule"),
        ({"layers": ["encoder.1"]}, MisconfigurationException, "no linear layer or convolution of Toy can be trained"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(arguments, error, match):
    with pytest.raises(error, match=match):
        fit(Toy(), [FeatureLearningMonitor(**arguments)])


def test_a_model_that_is_frozen_is_refused():
    net = Toy()
    net.encoder.requires_grad_(False)
    net.head.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="can be trained there"):
        fit(net, [FeatureLearningMonitor()])


def test_under_manual_optimization_weights_are_read_or_the_model_is_called_as_said():
    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="only weights are read"):
        fit(ManualToy(), [FeatureLearningMonitor(every_n_steps=2), keeper])
    assert {point.measure for point in keeper.points} == {"weight_change"}
    keeper = PointKeeper()
    call = lambda module, batch: module.head(module.encoder(batch))  # noqa: E731
    fit(ManualToy(), [FeatureLearningMonitor(every_n_steps=2, inputs=call), keeper])
    assert "kernel_alignment" in {point.measure for point in keeper.points}


def test_points_are_as_rare_as_passes_are_dear_and_the_size_is_said(caplog):
    keeper = PointKeeper()
    with caplog.at_level(logging.INFO):
        fit(Toy(), [FeatureLearningMonitor(), keeper], batches(40, size=400), log_every_n_steps=20)
    assert sorted({point.step for point in keeper.points}) == [0, 39]  # 250 * 64 / 400 = 40
    assert "keeps 0.1 MiB of the beginning" in caplog.text
    assert "every 40 steps" in caplog.text


def test_a_batch_too_small_has_no_alignment():
    keeper = PointKeeper()
    fit(Toy(), [FeatureLearningMonitor(every_n_steps=3), keeper], batches(size=3))
    found = readings(keeper, 5)["head", "representation_alignment"]
    assert math.isnan(found.value)
    assert found.flag.name == "FEW_ROWS"
