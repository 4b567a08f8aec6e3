"""Divergences of latents: floors, conditional priors, the rate that an AR(1) prior commits, and what is refused."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from lightning_collapse.functional import gaussian_divergence, whitened_posterior
from lightning_collapse.losses import (
    DeltaVAE,
    FreeBits,
    KLBalance,
    ar1_divergence,
    committed_rate,
    free_bits,
)


def moments(rows=6, units=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2 * units, generator=generator, dtype=torch.float64)


def normal(z):
    mean, log_variance = z.chunk(2, dim=1)
    return Normal(mean, (log_variance / 2).exp())


def test_divergences_are_those_of_torch():
    posterior, prior = moments(), moments(seed=1)
    q, p = normal(posterior), normal(prior)
    plain, conditional = kl_divergence(q, Normal(0.0, 1.0)), kl_divergence(q, p)
    torch.testing.assert_close(gaussian_divergence(*posterior.chunk(2, 1)), plain)
    whitened = whitened_posterior(*posterior.chunk(2, 1), *prior.chunk(2, 1))
    torch.testing.assert_close(gaussian_divergence(*whitened), conditional)
    torch.testing.assert_close(FreeBits(floor=0.0)(posterior), plain.sum(1).mean())
    torch.testing.assert_close(FreeBits(floor=0.0)(torch.cat(whitened, 1)), conditional.sum(1).mean())
    torch.testing.assert_close(KLBalance()(posterior, prior), conditional.sum(1).mean())


def test_divergence_of_a_narrow_prior():
    """The objective of the posterior-collapse attack is this divergence less k / 2 ln v."""
    (mean, log_variance), v = moments(units=7).chunk(2, 1), 1e-2
    objective = ((mean.square() + log_variance.exp()) / v - log_variance - 1).sum(1) / 2
    prior = torch.zeros(7, dtype=torch.float64), torch.full((7,), math.log(v), dtype=torch.float64)
    divergence = gaussian_divergence(*whitened_posterior(mean, log_variance, *prior)).sum(1)
    assert (objective - divergence).tolist() == pytest.approx([16.1181] * 6, abs=5e-5)


def test_small_divergences_keep_their_digits():
    """A unit that is all but collapsed: mu^2 / 2, where a difference of ones would read 0 or below."""
    found = gaussian_divergence(torch.tensor(1e-5), torch.tensor(-3e-5))
    assert found.item() == pytest.approx((1e-10 + 9e-10 / 2) / 2, rel=1e-2)


def test_the_mean_is_inside_the_maximum_and_below_the_floor_is_no_gradient():
    z = torch.zeros(2, 4, dtype=torch.float64)
    z[0, 0], z[:, 1] = 2.0, 0.1  # the first unit has 2 and 0 nats, the second 0.005 twice
    loss = FreeBits(floor=0.5)(z.requires_grad_())
    assert loss.item() == pytest.approx(1.0 + 0.5)  # and not (2 + 0.5) / 2 + 0.5
    loss.backward()
    assert z.grad[0, 0] == 1
    assert not z.grad[:, 1].any()
    assert not z.grad[:, 3].any()


def test_groups_share_a_floor():
    z = moments()
    units = gaussian_divergence(*z.chunk(2, 1)).mean(0)
    expected = sum(max(1.5, units[i : i + 2].sum().item()) for i in (0, 2))
    assert FreeBits(1.5, group_size=2)(z).item() == pytest.approx(expected)
    assert FreeBits(1.5, group_size=2).at_collapse(6, 8) == 3.0


def test_balanced_gradients():
    posterior, prior = moments().requires_grad_(), moments(seed=1).requires_grad_()
    plain = torch.autograd.grad(kl_divergence(normal(posterior), normal(prior)).sum(1).mean(), [posterior, prior])
    for loss, factors in ((KLBalance(), (0.2, 0.8)), (KLBalance(1.0, 1.0), (1, 1))):
        found = torch.autograd.grad(loss(posterior, prior), [posterior, prior])
        for gradient, whole, factor in zip(found, plain, factors, strict=True):
            torch.testing.assert_close(gradient, factor * whole)


def test_an_ar1_prior_commits_its_rate():
    assert committed_rate(12, 0.7) == pytest.approx(2.33055, abs=5e-6)
    a, n = 0.7, 12
    powers = (torch.arange(n).unsqueeze(0) - torch.arange(n).unsqueeze(1)).abs()
    prior = MultivariateNormal(torch.zeros(n, dtype=torch.float64), (a**powers).double())
    mean, log_variance = torch.randn(2, 200, n, 2, dtype=torch.float64)
    found = ar1_divergence(mean, log_variance, a)
    posterior = MultivariateNormal(mean[3, :, 1], torch.diag(log_variance[3, :, 1].exp()))
    torch.testing.assert_close(found[3, 1], kl_divergence(posterior, prior))
    assert found.min() > committed_rate(n, a)
    inner = math.log((1 - a**2) / (1 + a**2))
    best = torch.tensor([math.log(1 - a**2), *[inner] * (n - 2), math.log(1 - a**2)], dtype=torch.float64)
    least = ar1_divergence(torch.zeros(1, n, 1, dtype=torch.float64), best.view(1, n, 1), a)
    assert least.item() == pytest.approx(committed_rate(n, a), rel=1e-12)
    assert ar1_divergence(mean, log_variance, 0.0).sum() == pytest.approx(
        gaussian_divergence(mean, log_variance).sum().item()
    )


def test_channels_are_sequences_of_their_own():
    z = moments(units=6)
    mean, log_variance = (part.reshape(6, 3, 2) for part in z.chunk(2, 1))
    apart = [torch.cat([mean[:, :, c], log_variance[:, :, c]], 1) for c in range(2)]
    expected = sum(DeltaVAE()(part) for part in apart)
    torch.testing.assert_close(DeltaVAE(channels=2)(z), expected)
    assert DeltaVAE(channels=2).at_collapse(6, 12) == pytest.approx(2 * committed_rate(3))


BAD = {
    "`floor` must not be negative, got -1": lambda: FreeBits(floor=-1),
    "`floor` must be finite, got inf": lambda: free_bits(torch.zeros(2, 2), floor=math.inf),
    "`group_size` must be an integer of at least 1, got 0": lambda: FreeBits(group_size=0),
    "`group_size` 3 does not divide the 4 units": lambda: FreeBits(group_size=3)(torch.zeros(2, 8)),
    r"of shape \(4,\). Pass that of every row, before it is": lambda: free_bits(torch.zeros(4)),
    r"of shape \(\). Pass that of every row, before it is": lambda: free_bits(torch.tensor(1.0)),
    r"`gaussians` .* must hold the means .* got shape \(2, 5\).*2 \* std.log": lambda: FreeBits()(torch.zeros(2, 5)),
    "`prior` must not be negative, got -1": lambda: KLBalance(-1.0),
    r"`posterior` .* must hold the means .* got shape \(2, 3\)": lambda: KLBalance()(*[torch.zeros(2, 3)] * 2),
    r"one shape, got `posterior` \(2, 4\) and `prior` \(2, 6\)": lambda: KLBalance()(
        torch.zeros(2, 4), torch.zeros(2, 6)
    ),
    "`correlation` must be at least 0 and below 1, got 1": lambda: DeltaVAE(correlation=1),
    "The 3 units of the latent are not two steps or more of `channels` 2": lambda: DeltaVAE(channels=2)(
        torch.zeros(2, 6)
    ),
    "`steps` must be an integer of at least 2, got 1": lambda: committed_rate(1),
    r"shape \(N, steps, channels\), got \(2, 4\)": lambda: ar1_divergence(*[torch.zeros(2, 4)] * 2),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
