"""Posteriors are found however a model returns them, and read whole: each group, every row, by its own prior."""

import math
import statistics
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributions import Independent, Normal
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, LatentMonitor
from lightning_collapse.functional import latent_readings, latent_sums, whitened_posterior
from tests.toys import PointKeeper, fit


class Net(LightningModule):
    """Keeps the posteriors of every step."""

    def __init__(self, encoder=None, names=("fc_mu", "fc_logvar"), units=3):
        super().__init__()
        torch.manual_seed(0)
        self.names, self.encoder, self.seen = names, encoder or nn.Linear(6, 2 * units), []
        for name in names:
            self.add_module(name, nn.Linear(2 * units, units))
        self.decoder = nn.ModuleDict({"mean": nn.Linear(units, 6), "log_var": nn.Linear(units, 6)})

    def encode(self, x):
        features = self.encoder(x)
        return [getattr(self, name)(features) for name in self.names]

    def training_step(self, batch, batch_idx):
        mu, logvar = self.encode(batch)
        self.seen.append((mu.detach(), logvar.detach()))
        z = mu + (logvar / 2).exp() * 0.5
        return (self.decoder["mean"](z) - batch).square().mean() + self.decoder["log_var"](z).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Encoder(nn.Module):
    """Returns its posterior in one of the forms that are in use."""

    def __init__(self, form):
        super().__init__()
        self.form, self.out = form, nn.Linear(6, 6)

    def forward(self, x):
        features = self.out(x)
        mu, logvar = features.chunk(2, dim=-1)
        forms = {
            "dict": lambda: {"hidden": features, "mu": mu, "logvar": logvar},
            "deviation": lambda: {"loc": mu, "log_std": logvar / 2},
            "simple": lambda: SimpleNamespace(mean=mu, logvar=logvar, sample=lambda: mu),
            "inside": lambda: {"posterior": SimpleNamespace(mean=mu, logvar=logvar)},
            "normal": lambda: Normal(mu, (logvar / 2).exp()),
            "independent": lambda: Independent(Normal(mu, (logvar / 2).exp()), 1),
        }
        if self.form in forms:
            return forms[self.form]()
        return mu, mu, logvar  # names of a tuple are those of its return


class Returns(Net):
    def __init__(self, form):
        super().__init__(Encoder(form), ())

    def encode(self, x):
        self.encoder(x)
        return nn.functional.linear(x, self.encoder.out.weight, self.encoder.out.bias).chunk(2, dim=-1)


def data(*sizes):
    generator = torch.Generator().manual_seed(1)
    return DataLoader([torch.randn(size, 6, generator=generator) for size in sizes], batch_size=None)


def watch(net, monitor=None, loader=None, **options):
    keeper = PointKeeper()
    monitor = monitor or LatentMonitor(every_n_steps=2)
    fit(net, [monitor, keeper], loader or data(5, 3, 4, 6), **options)
    assert not any(part._forward_hooks for part in net.modules())
    assert monitor.contained.failed == {}
    last = keeper.points[-1].step if keeper.points else -1
    return {(p.layer, p.measure): p.value for p in keeper.points if p.step == last}


def assert_reads(found, layer, mean, log_variance, rel=1e-6):
    expected = latent_readings(latent_sums(mean, log_variance))
    for name in ("kl", "information_ceiling", "active_units", "at_prior", "mean_variance", "n"):
        assert found[layer, name] == pytest.approx(expected[name].item(), rel=rel), name


def last(net, batches=1):
    return [torch.cat([seen[i] for seen in net.seen[-batches:]]) for i in range(2)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("names", [("fc_mu", "fc_logvar"), ("zMean", "zLogVar"), ("hidden2mean", "hidden2logv")])
def test_layers_side_by_side_and_no_decoder(names, accumulate):
    net = Net(names=names)
    found = watch(net, accumulate_grad_batches=accumulate)
    assert {layer for layer, _ in found} == {names[0]}
    assert_reads(found, names[0], *last(net, accumulate))


@pytest.mark.parametrize("form", ["dict", "deviation", "simple", "inside", "normal", "independent", "tuple"])
def test_what_a_module_returns(form):
    net = Returns(form)
    found = watch(net)
    assert {layer for layer, _ in found} == {"encoder"}
    assert_reads(found, "encoder", *last(net), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
def test_in_every_precision(precision):
    net = Net()
    loader = data(40, 40)
    kind = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(precision)
    loader = DataLoader([x.to(kind) if kind else x for x in loader.dataset], batch_size=None)
    assert_reads(watch(net, loader=loader, precision=precision), "fc_mu", *last(net))


def groups(output):
    mean, log_variance = output.chunk(2, dim=1)
    prior = torch.full_like(mean, 0.5), torch.full_like(mean, -1.0)
    return {"top": Normal(mean, (log_variance / 2).exp()), "bottom": ((mean, log_variance), prior)}


def test_groups_have_curves_of_their_own_and_a_conditional_prior_counts():
    net = Net()
    found = watch(net, LatentMonitor(["encoder"], read=groups, every_n_steps=2))
    assert {layer for layer, _ in found} == {"encoder.top", "encoder.bottom"}
    outputs = nn.functional.linear(data(5, 3, 4, 6).dataset[-1], net.encoder.weight, net.encoder.bias)
    assert found["encoder.top", "n"] == len(outputs) == 6
    assert found["encoder.top", "information_ceiling"] == pytest.approx(found["encoder.bottom", "information_ceiling"])
    assert found["encoder.top", "kl"] != pytest.approx(found["encoder.bottom", "kl"])


def test_a_prior_is_whitened_away():
    mean, log_variance = torch.randn(6, 3), torch.randn(6, 3)
    net = Net()
    net.encoder.requires_grad_(False)
    found = watch(net, LatentMonitor(["encoder"], read=groups, every_n_steps=2))
    mean, log_variance = net.encoder(data(5, 3, 4, 6).dataset[-1]).chunk(2, dim=1)
    white = whitened_posterior(mean, log_variance, torch.tensor(0.5), torch.tensor(-1.0))
    assert_reads(found, "encoder.top", mean, log_variance, rel=1e-5)
    assert_reads(found, "encoder.bottom", *white, rel=1e-5)


def test_maps_and_padded_tokens_are_read_by_place():
    class Conv(Net):
        def __init__(self):
            super().__init__(nn.Conv2d(1, 4, 1), ())
            self.mu, self.logvar = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def training_step(self, batch, batch_idx):
            features = self.encoder(batch["x"].view(-1, 1, 2, 3))
            return self.mu(features).square().mean() + self.logvar(features).square().mean()

    found = watch(Conv(), loader=DataLoader([{"x": x} for x in data(5, 4).dataset], batch_size=None))
    assert found["mu", "n"] == 4 * 6

    class Tokens(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["x"], batch_idx)

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    net = Tokens()
    rows = {"x": torch.randn(2, 3, 6), "attention_mask": mask}
    found = watch(net, loader=DataLoader([rows, rows], batch_size=None))
    assert_reads(found, "fc_mu", *(x[mask.bool()] for x in last(net)))
    assert found["fc_mu", "information_limit"] == pytest.approx(math.log(3))


def test_units_of_half_a_map_are_where_the_channels_of_all_of_it_are():
    class Conv(Net):
        def __init__(self):
            super().__init__(nn.Conv2d(1, 8, 1), ())

        def training_step(self, batch, batch_idx):
            self.maps = self.encoder(batch.view(-1, 1, 8, 8))
            return self.maps.square().mean()

    net = Conv()  # as wide as it has channels
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = watch(
        net,
        LatentMonitor(["encoder"], lambda maps: maps.chunk(2, dim=1), every_n_steps=1),
        loader=DataLoader([x, x], batch_size=None),
    )
    mean, log_variance = net.maps.detach().chunk(2, dim=1)
    assert found["encoder", "n"] == 5 * 64
    assert_reads(found, "encoder", *(half.movedim(1, -1).reshape(-1, 4) for half in (mean, log_variance)))


def test_estimates_of_information_agree_with_a_channel_and_know_their_limit():
    class Channel(Net):
        def training_step(self, batch, batch_idx):
            self.fc_mu(batch)
            self.fc_logvar(batch)
            return self.decoder["mean"].weight.square().sum()

    net = Channel()
    with torch.no_grad():
        net.fc_mu.weight.copy_(torch.eye(3, 6))
        net.fc_logvar.weight.zero_()
        for layer in (net.fc_mu, net.fc_logvar):
            layer.bias.zero_()
    keeper = PointKeeper()
    fit(net, [LatentMonitor(every_n_steps=1), keeper], data(*[64] * 40))

    def mean(name):  # of all points: one batch scatters
        return statistics.fmean(point.value for point in keeper.curve(f"latent/fc_mu/{name}"))

    truth = 1.5 * math.log(2)  # three units with as much signal as noise
    assert mean("information_lower") < truth < mean("information_upper")
    assert mean("information_upper") - mean("information_lower") < 0.15
    assert mean("information_ceiling") == pytest.approx(truth, abs=0.1)
    assert mean("information_limit") == pytest.approx(math.log(64))


def test_where_there_is_no_latent_and_where_it_cannot_be_told():
    for net, words in (
        (Net(names=("mu", "sigma")), "`sigma` may make a variance"),
        (Net(names=("a", "b")), "was found"),
    ):
        with pytest.warns(UserWarning, match=rf"no Gaussian latent was found.*{words}|{words}.*LatentMonitor\(layers="):
            assert watch(net) == {}


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda output: nn.functional.softplus(output).chunk(2, dim=1), "as standard deviations or variances are"),
        (lambda output: output.chunk(2, dim=1)[0].mean(), "must return"),
        (lambda output: [x.mean(dim=0) for x in output.chunk(2, dim=1)], "before it is averaged"),
        (lambda output: [output[:, :0]] * 2, "a unit or more"),
        (lambda output: (output, output[:, :1]), "of one shape"),
    ],
)
def test_what_is_not_a_posterior_is_said_once_and_training_goes_on(read, words):
    monitor = LatentMonitor(["encoder"], read=read, every_n_steps=1)
    with pytest.warns(UserWarning, match=words) as said:
        trainer = fit(Net(), [monitor], data(40, 40))
    assert trainer.state.finished
    assert sum(words in str(w.message) for w in said) == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="`read` takes a function"):
        LatentMonitor(read=lambda output: output)
    with pytest.raises(MisconfigurationException, match=r"LatentMonitor\(layers=\['nothing'\]\)"):
        fit(Net(), [LatentMonitor(["nothing"])], data(5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = Net(units=3)
        empty.fc_mu, empty.fc_logvar = nn.Linear(6, 0), nn.Linear(6, 0)
    with pytest.raises(MisconfigurationException, match="`fc_mu` makes 0 units"):
        fit(empty, [LatentMonitor()], data(5))


def test_the_guard_names_the_layer_of_the_mean():
    net = Net()
    with torch.no_grad():
        net.fc_mu.weight.zero_()
        net.fc_logvar.weight.zero_()
        net.fc_logvar.bias.fill_(-20.0)
    net.requires_grad_(False)
    net.decoder.requires_grad_(True)
    guard = CollapseGuard(action="log")
    fit(net, [LatentMonitor(every_n_steps=1), guard], data(*[8] * 12))
    assert [(v.kind, v.layer) for v in guard.judge.verdicts] == [("point_collapse", "fc_mu")]
