"""CLASSP: per-weight loop, AdaGrad, groups, state, precision, and Lightning."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_collapse.optimizers import CLASSP
from tests.toys import QUIET, Toy, batches, fit, weights


def reference(weight, grads, lr, threshold, eps, power, apply_decay):
    """Weight by weight, in float64, as the paper writes it."""
    weight, total = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for grad in grads:
        for i, g in enumerate(grad.double().tolist()):
            if g**2 > threshold:
                total[i] += abs(g) ** power
                weight[i] -= lr * g / (eps + total[i].item()) ** (1 / power) if apply_decay else lr * g
    return weight, total


def run(weight, grads, **arguments):
    parameter = nn.Parameter(weight.clone())
    optimizer = CLASSP([parameter], **arguments)
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]["sum"]


@pytest.mark.parametrize("apply_decay", [True, False])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_weight_by_weight(power, threshold, apply_decay):
    arguments = {"lr": 0.3, "threshold": threshold, "eps": 1e-3, "power": power, "apply_decay": apply_decay}
    weight, grads = torch.randn(40), list(torch.randn(6, 40) * torch.linspace(0.05, 2, 40))
    grads[2][:5] = 0
    wanted, total = reference(weight, grads, **arguments)
    found, sums = run(weight, grads, **arguments)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.double(), total + 1e-3, rtol=1e-5, atol=1e-6)
    if threshold:  # some weights stay, and not whole tensors of them
        small = torch.stack(grads).square().amax(dim=0) <= threshold
        assert 0 < small.sum() < 40
        assert torch.equal(found[small], weight[small])


def test_closed_form_of_a_constant_gradient():
    """After t equal gradients g: w = -lr * sum_k g / (eps + k |g|)."""
    found, _ = run(torch.zeros(1), [torch.tensor([-2.0])] * 4, lr=0.1, threshold=0.5, eps=0.5, power=1.0)
    assert found.item() == pytest.approx(0.1 * sum(2 / (0.5 + 2 * k) for k in range(1, 5)), rel=1e-6)


def test_with_a_power_of_two_and_no_threshold_it_is_adagrad():
    torch.manual_seed(3)
    ours, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    first = CLASSP(ours.parameters(), lr=0.2, threshold=0.0, eps=1e-5, power=2.0)
    second = torch.optim.Adagrad(theirs.parameters(), lr=0.2, initial_accumulator_value=1e-5, eps=0)
    for _ in range(10):
        x = torch.randn(16, 7)
        for model, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_the_parts_of_a_complex_weight_are_weights(power):
    torch.manual_seed(0)
    weight, grads = torch.randn(5, 2), list(torch.randn(4, 5, 2))
    wanted, total = run(weight, grads, lr=0.3, threshold=0.2, eps=1e-3, power=power)
    pairs = [torch.view_as_complex(grad) for grad in grads]
    found, sums = run(torch.view_as_complex(weight), pairs, lr=0.3, threshold=0.2, eps=1e-3, power=power)
    torch.testing.assert_close(torch.view_as_real(found), wanted)
    torch.testing.assert_close(sums, total)
    assert not torch.equal(wanted, weight)


def test_groups_have_their_own_and_may_change_between_tasks():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = CLASSP([{"params": [a], "threshold": 0.0}, {"params": [b], "lr": 1.0}], lr=0.1, apply_decay=False)
    a.grad = b.grad = torch.tensor([0.5, 2.0])
    optimizer.step()
    torch.testing.assert_close(a.data, torch.tensor([-0.05, -0.2]))
    torch.testing.assert_close(b.data, torch.tensor([0.0, -2.0]))
    for group in optimizer.param_groups:
        group.update(threshold=0.0, apply_decay=True)
    optimizer.step()  # the sums counted meanwhile: 2 + 2, and 0.5 alone where nothing had passed
    torch.testing.assert_close(b.data, torch.tensor([-1.0, -2.5]), rtol=1e-4, atol=0)


def test_a_parameter_without_gradient_stays_and_nan_does_not_pass():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = CLASSP([a, b], threshold=0.0)
    b.grad = torch.tensor([float("nan"), 1.0])
    optimizer.step()
    assert torch.equal(a.data, torch.ones(2))
    assert b.data[0] == 1
    assert b.data[1] < 1
    assert optimizer.state[a] == {}


@pytest.mark.parametrize("apply_decay", [True, False])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_nothing_waits_for_the_device(power, apply_decay):
    class NoWait(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    weights = [nn.Parameter(torch.randn(4).to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    before = [weight.detach().clone() for weight in weights]
    optimizer = CLASSP(weights, threshold=0.1, power=power, apply_decay=apply_decay)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with NoWait():
        optimizer.step()
        optimizer.step()
    assert not any(map(torch.equal, weights, before))


def test_closure():
    weight = nn.Parameter(torch.ones(3))
    optimizer = CLASSP([weight], threshold=0.0)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert (weight < 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_wide_and_survive_a_checkpoint(dtype):
    grads = list(torch.randn(30, 8).to(dtype))
    weight = torch.randn(8).to(dtype)
    parameter = nn.Parameter(weight.clone())
    optimizer = CLASSP([parameter], lr=0.01, threshold=0.0, power=2.0)
    for grad in grads[:20]:
        parameter.grad = grad
        optimizer.step()
    other = nn.Parameter(parameter.detach().clone())
    resumed = CLASSP([other], lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == 0.01
    for grad in grads[20:]:
        parameter.grad, other.grad = grad, grad.clone()
        optimizer.step()
        resumed.step()
    assert torch.equal(parameter, other)
    assert optimizer.state[parameter]["sum"].dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(optimizer.state[parameter]["sum"], resumed.state[other]["sum"])
    exact = 1e-5 + torch.stack(grads).double().square().sum(dim=0)
    torch.testing.assert_close(resumed.state[other]["sum"].double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lr": -0.1}, "`lr` must be finite and not negative, got -0.1"),
        ({"threshold": float("nan")}, "`threshold`"),
        ({"eps": 0.0}, "`eps` must be finite and positive"),
        ({"power": 0}, "`power` must be finite and positive"),
    ],
)
def test_misuse_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        CLASSP([nn.Parameter(torch.zeros(1))], **arguments)
    with pytest.raises(ValueError, match=match):
        CLASSP([{"params": [nn.Parameter(torch.zeros(1))], **arguments}])


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        CLASSP(table.parameters()).step()


class Lit(Toy):
    def configure_optimizers(self) -> Any:
        return CLASSP(self.parameters(), lr=0.05, threshold=1e-6)


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path):
    torch.manual_seed(0)
    whole = Lit()
    fit(whole, max_epochs=3)
    torch.manual_seed(0)
    half = Lit()
    before = weights(half)
    trainer = fit(half, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert not torch.equal(weights(half)["head.weight"], before["head.weight"])
    resumed = Lit()
    Trainer(**{**QUIET, "max_epochs": 3, "logger": False}).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_a_gradient_scaler_changes_nothing():
    """A real one, on the CPU: the threshold sees gradients without its factor, and a bad step is skipped."""
    torch.manual_seed(0)
    model = Lit()
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows at first
    fit(model, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], loader=batches(n=40))
    assert scaler.get_scale() < 2.0**40
    after = weights(model)
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_scaled_gradients_meet_the_threshold_unscaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = nn.Parameter(torch.zeros(2))
    optimizer = CLASSP([weight], lr=1.0, threshold=0.25, apply_decay=False)
    scaler.scale((weight * torch.tensor([0.25, 1.0])).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(weight.data, torch.tensor([0.0, -1.0]))
