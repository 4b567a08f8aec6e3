"""The inverse-Lipschitz decoder: its bound, the convex networks it is the gradient of, and what L is worth."""

import copy
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from lightning_collapse.layers import InverseLipschitzDecoder
from lightning_collapse.losses import FreeBits, LinearRamp


def decoder(dtype=torch.float64, **changed):
    """One that has moved far from where it begins."""
    torch.manual_seed(0)
    found = InverseLipschitzDecoder(**{"latent_dim": 3, "output_dim": 7, "hidden": 16, "lipschitz": 0.3} | changed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter))
    return found.to(dtype)


def ratios(model, pairs=10_000, scale=1.0):
    """Of distances of outputs over those of latents, of random pairs from near to far."""
    first = 2 * torch.randn(pairs, 3)
    second = first + scale * torch.randn(pairs, 3) * torch.logspace(-2, 1, pairs).unsqueeze(1)
    first, second = first.to(model.isometry.dtype), second.to(model.isometry.dtype)
    with torch.no_grad():
        outputs = (model(first) - model(second)).double().norm(dim=1)
    return (outputs / (first - second).double().norm(dim=1))[(first != second).any(dim=1)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_pair_is_nearer_than_the_bound(depth):
    found = ratios(decoder(depth=depth))
    assert found.min() >= 0.3
    assert found.max() > 3 * found.min()  # and it is far from linear


def test_one_layer_has_an_upper_bound_too():
    model = decoder(depth=1)
    steepest = 1.0
    for part in (model.latent, model.output):
        weight = part.inputs[0].weight
        curvature = torch.linalg.matrix_norm(weight.mT * functional.softplus(part.raw_readout) @ weight, ord=2)
        steepest *= 0.3**0.5 + curvature.item() / 4
    assert ratios(model).max() <= steepest


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_maps_are_gradients_of_convex_networks(depth):
    part, x = decoder(depth=depth).output, torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    hidden = functional.softplus(part.inputs[0](x))
    for link, layer in zip(part.raw_links, part.inputs[1:], strict=True):
        hidden = functional.softplus(layer(x) + hidden @ functional.softplus(link).mT)
    potential = hidden @ functional.softplus(part.raw_readout) + x @ part.bias + 0.3 * x.square().sum(dim=1) / 2
    (expected,) = torch.autograd.grad(potential.sum(), x)
    torch.testing.assert_close(part(x, x.new_tensor(0.3)), expected, rtol=1e-12, atol=1e-12)


def test_derivatives_of_both_orders():
    model, z = decoder(hidden=4), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, z)
    assert torch.autograd.gradgradcheck(model, z)
    jacobian = torch.autograd.functional.jacobian(model, z[0])
    assert torch.linalg.svdvals(jacobian).min() >= 0.3


def test_a_schedule_lowers_the_bound_in_one_compiled_graph():
    model, ramp, z = decoder(torch.float32), LinearRamp(2.0, 0.5, steps=10), torch.randn(4, 3)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in (0, 5, 10):
        model.set_lipschitz(ramp(step))
        torch.testing.assert_close(compiled(z), model(z))
        assert ratios(model, pairs=500).min() >= ramp(step) * (1 - 1e-4)
    assert counter.frame_count == 1
    assert copy.deepcopy(model).lipschitz == 0.5
    other = decoder(torch.float32)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(z), model(z))


def test_precision():
    model, z = decoder(torch.float32), torch.randn(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(z), model(z.clone()))
        assert ratios(model).min() >= 0.3 * (1 - 1e-3)
    torch.testing.assert_close(model(z).double(), decoder()(z.double()), rtol=1e-4, atol=1e-4)
    half = model.bfloat16()
    assert half(z.bfloat16()).dtype == torch.float32
    assert ratios(half).min() >= 0.3 * (1 - 2e-2)
    half(z.bfloat16()).sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


def test_meta_device_and_no_gradient():
    with torch.device("meta"):
        model = InverseLipschitzDecoder(2, 4, hidden=8, lipschitz=0.7)
    for part in model.to_empty(device="cpu").modules():  # as FSDP does
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    torch.testing.assert_close(model.isometry.mT @ model.isometry, torch.eye(2))
    with torch.inference_mode():
        near_identity = torch.linalg.svdvals(model(torch.eye(2)) - model(torch.zeros(1, 2)))
    assert (near_identity > 0.7).all()


@pytest.mark.parametrize(("gain", "noise"), [(1.0, 0.5), (0.5, 2.0), (2.0, 20.0)])
def test_a_linear_decoder_keeps_its_divergence(gain, noise):
    """With its convex part off the decoder is L E z; the best encoder of any data keeps the bound's divergence."""
    model = InverseLipschitzDecoder(2, 2, hidden=1, depth=1, lipschitz=gain).double()
    with torch.no_grad():
        for part in (model.latent, model.output):
            part.raw_readout.fill_(-100.0)
        model.isometry.copy_(torch.eye(2))
    spread = torch.tensor([1.0, 1e-3], dtype=torch.float64)  # a direction of data, and one that has none
    slope, log_variance = torch.zeros(2, 2, dtype=torch.float64).unbind()
    optimizer = torch.optim.LBFGS([slope.requires_grad_(), log_variance.requires_grad_()], lr=0.5, max_iter=200)
    nodes = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # two points have the moments of a normal law

    def cost(step=True):
        x = nodes * spread
        z = (slope * x).unsqueeze(1) + nodes * (log_variance / 2).exp()
        error = (model(z) - x.unsqueeze(1)).square().sum(dim=2).mean() / 2
        value = error + noise * FreeBits(floor=0.0)(torch.cat([slope * x, log_variance.expand(2, 2)], dim=1))
        if step:
            optimizer.zero_grad()
            value.backward()
        return value

    optimizer.step(cost)
    q = noise / (gain**2 + noise)
    torch.testing.assert_close(log_variance.exp().detach(), torch.full((2,), q, dtype=torch.float64), rtol=1e-4, atol=0)
    divergence = (slope.square() * spread.square() + q - 1 - math.log(q)).detach() / 2
    floor = (q - 1 - math.log(q)) / 2
    assert (divergence >= floor * (1 - 1e-4)).all()
    if (gain, noise) == (1.0, 0.5):
        assert divergence[0].item() == pytest.approx(0.438, abs=1e-3)
        assert divergence[1].item() == pytest.approx(floor, rel=1e-4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`output_dim` must be at least `latent_dim` 4, got 3: no map to fewer"):
        InverseLipschitzDecoder(4, 3)
    with pytest.raises(ValueError, match="`lipschitz` must be positive, got 0"):
        InverseLipschitzDecoder(2, 3, lipschitz=0)
    with pytest.raises(ValueError, match="`depth` must be an integer of at least 1, got 0"):
        InverseLipschitzDecoder(2, 3, depth=0)
    with pytest.raises(ValueError, match="`lipschitz` must be finite, got inf"):
        InverseLipschitzDecoder(2, 3).set_lipschitz(math.inf)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\), got torch.float32 of shape \(5, 4\). Pass samples"):
        InverseLipschitzDecoder(2, 3)(torch.zeros(5, 4))
