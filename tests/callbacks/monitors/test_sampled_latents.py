"""Latents are found where a training step samples them, whatever it calls them; actions and other noise are none."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_collapse import LatentMonitor
from tests.toys import PointKeeper, fit

UNITS = 3


class Sampling(LightningModule):
    """An autoencoder whose modules have names that say nothing; ``seen`` keeps what it has sampled."""

    def __init__(self, sample, *layers, decoder=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(*layers) if layers else nn.Linear(6, 8)
        self.fc1, self.fc2 = nn.Linear(8, UNITS), nn.Linear(8, UNITS)
        self.both = nn.Linear(8, 2 * UNITS)
        self.out = decoder or nn.Linear(UNITS, 6)
        self.sample, self.seen = sample, []

    def training_step(self, batch, batch_idx):
        z, divergence, mean, deviation = self.sample(self, self.body(batch))
        self.seen.append((mean.detach().double(), deviation.detach().double()))
        return functional.mse_loss(self.out(z.to(batch.dtype)).view_as(batch), batch) + divergence

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def divergence_of(mean, logs):
    return -0.5 * torch.sum(1 + logs - mean.pow(2) - logs.exp(), dim=-1).mean()


def written_out(self, h):
    mean, logs = self.fc1(h), self.fc2(h)
    std = torch.exp(0.5 * logs)
    return mean + torch.randn_like(std) * std, divergence_of(mean, logs), mean, std


def in_place(self, h):
    mean, logs = self.fc1(h), self.fc2(h)
    std = logs.mul(0.5).exp_()
    return std.new_empty(std.shape).normal_().mul(std).add_(mean), divergence_of(mean, logs), mean, std


def before_it_samples(self, h):
    mean, logs = self.fc1(h), self.fc2(h)
    divergence = 0.5 * (mean * mean + logs.exp() - 1 - logs).mean()
    return torch.addcmul(mean, (logs / 2).exp(), torch.randn(h.shape[0], UNITS)), divergence, mean, (logs / 2).exp()


def halves(self, h):
    mean, logs = self.both(h).chunk(2, dim=-1)
    return mean + (logs / 2).exp() * torch.randn_like(mean), divergence_of(mean, logs), mean, (logs / 2).exp()


def normal(self, h):
    posterior = Independent(Normal(self.fc1(h), functional.softplus(self.fc2(h)) + 1e-4), 1)
    prior = Independent(Normal(torch.zeros(UNITS), torch.ones(UNITS)), 1)
    return posterior.rsample(), kl_divergence(posterior, prior).mean(), posterior.mean, posterior.stddev


def of_one_sample(self, h):
    posterior = Normal(self.fc1(h), self.fc2(h).exp())
    z = posterior.rsample()
    prior = Normal(torch.zeros_like(z), torch.ones_like(z))
    return z, (posterior.log_prob(z) - prior.log_prob(z)).mean(), posterior.mean, posterior.stddev


def beside_other_powers(self, h):
    """What has exponents of its own is no square, and is not read to see whether it is."""
    mean, logs = self.fc1(h), self.fc2(h)
    z = mean + torch.randn_like(mean) * (logs / 2).exp()
    powers = torch.pow(h.abs() + 1, torch.full_like(h, 2.0)).mean() + torch.pow(input=mean, exponent=2).mean()
    return z, divergence_of(mean, logs) + 0 * powers, mean, (logs / 2).exp()


def of_several_samples(self, h):
    posterior = Normal(self.fc1(h), self.fc2(h).exp())
    z = posterior.rsample((4,))
    divergence = kl_divergence(posterior, Normal(torch.zeros(UNITS), torch.ones(UNITS))).mean()
    return z.mean(dim=0), divergence, posterior.mean, posterior.stddev


FOUND = {
    written_out: "fc1",
    in_place: "fc1",
    before_it_samples: "fc1",
    halves: "both",
    normal: "fc1",
    of_one_sample: "fc1",
    of_several_samples: "fc1",
    beside_other_powers: "fc1",
}


def watch(net, **options):
    points = PointKeeper()
    rows = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(1))
    fit(net, [LatentMonitor(every_n_steps=1), points], DataLoader(rows, batch_size=None), **options)
    return {(point.step, point.layer, point.measure): point.value for point in points.points}


@pytest.mark.parametrize("sample", FOUND, ids=lambda sample: sample.__name__)
def test_wherever_it_is_sampled(sample):
    net = Sampling(sample)
    found = watch(net)
    assert {layer for _, layer, _ in found} == {FOUND[sample]}
    for step, (mean, std) in enumerate(net.seen):
        divergence = (mean.square() + std.square() - 1 - 2 * std.log()).sum(dim=1).mean() / 2
        assert found[step, FOUND[sample], "kl"] == pytest.approx(divergence.item(), rel=1e-5)
        assert found[step, FOUND[sample], "n"] == 16


@pytest.mark.parametrize("sample", [written_out, normal])
def test_in_half_precision(sample):
    net = Sampling(sample)
    found = watch(net, precision="bf16-mixed")
    mean, std = net.seen[-1]
    divergence = (mean.square() + std.square() - 1 - 2 * std.log()).sum(dim=1).mean() / 2
    assert found[3, "fc1", "kl"] == pytest.approx(divergence.item(), rel=0.05)


def test_maps_are_read_by_place():
    def of_map(self, h):
        mean, logs = h.chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (logs / 2).exp()
        return z, divergence_of(mean.movedim(1, -1), logs.movedim(1, -1)), mean, (logs / 2).exp()

    layers = (nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 1))
    net = Sampling(of_map, *layers, decoder=nn.Sequential(nn.Flatten(), nn.Linear(12, 6)))
    found = watch(net)
    assert found[0, "body.1", "n"] == 16 * 6
    mean, std = net.seen[0]
    divergence = (mean.square() + std.square() - 1 - 2 * std.log()).sum(dim=1).mean() / 2
    assert found[0, "body.1", "kl"] == pytest.approx(divergence.item(), rel=1e-5)


def noisy_features(self, h):
    return self.fc1(h) + 0.1 * torch.randn(h.shape[0], UNITS), h.square().mean(), h, h


def an_action(self, h):
    policy = Normal(self.fc1(h), self.fc2(h).exp())
    z = policy.rsample()
    return z.tanh(), policy.log_prob(z).mean(), policy.mean, policy.stddev


def sampled_logits(self, h):
    mean, std = self.fc1(h), functional.softplus(self.fc2(h))
    return mean + std * torch.randn_like(std), std.mean(), mean, std


def noisy_weights(self, h):
    weight = self.fc1.weight + self.fc2.weight * torch.randn_like(self.fc1.weight)
    return h @ weight.T, self.fc1.weight.square().mean(), h, h


@pytest.mark.parametrize("sample", [noisy_features, an_action, sampled_logits, noisy_weights])
def test_other_noise_is_no_latent(sample):
    with pytest.warns(UserWarning, match=r"no Gaussian latent was found.*LatentMonitor\(layers="):
        assert not watch(Sampling(sample))


def test_a_prior_that_is_learned_is_told_and_not_taken_for_the_standard_one():
    def conditional(self, h):
        posterior, prior = Normal(self.fc1(h), self.fc2(h).exp()), Normal(self.both(h)[:, :UNITS], torch.ones(UNITS))
        return posterior.rsample(), kl_divergence(posterior, prior).mean(), posterior.mean, posterior.stddev

    with pytest.warns(UserWarning, match=r"`fc1` is compared with a prior that is learned.*read=") as caught:
        assert not watch(Sampling(conditional))
    assert sum("learned" in str(warning.message) for warning in caught) == 1


def test_it_is_not_read_twice_and_changes_nothing():
    def named(self, h):
        mean, logs = self.heads["mu"](h), self.heads["logvar"](h)
        return mean + torch.randn_like(mean) * (logs / 2).exp(), divergence_of(mean, logs), mean, (logs / 2).exp()

    nets = []
    for monitors in ([LatentMonitor(every_n_steps=1)], []):
        net = Sampling(named)
        net.heads = nn.ModuleDict({"mu": nn.Linear(8, UNITS), "logvar": nn.Linear(8, UNITS)})
        points = PointKeeper()
        rows = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        fit(net, [*monitors, points], DataLoader(rows, batch_size=None))
        nets.append((net, {point.layer for point in points.points}, torch.rand(1).item()))
    assert nets[0][1] == {"heads.mu"}
    assert nets[0][2] == nets[1][2]
    for watched, bare in zip(nets[0][0].parameters(), nets[1][0].parameters(), strict=True):
        assert torch.equal(watched, bare)


def test_information_is_that_of_the_posteriors():
    net = Sampling(written_out)
    found = watch(net)
    mean, std = net.seen[-1]
    variances = std.square().mean(dim=0) + mean.var(dim=0, unbiased=False)
    ceiling = (variances.log() - 2 * std.log().mean(dim=0)).sum() / 2
    assert math.isclose(found[3, "fc1", "information_ceiling"], ceiling.item(), rel_tol=1e-4)
