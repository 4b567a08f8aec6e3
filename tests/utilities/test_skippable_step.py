"""A skipped step leaves parameters and the state of every optimizer bit-equal to a run in which it was not made."""

import copy

import pytest
import torch
from torch import nn, optim

from lightning_collapse.optimizers import CLASSP
from lightning_collapse.utilities.skippable_step import SkippableStep

LOOPS = {"loop": {"foreach": False}, "foreach": {"foreach": True}}
FUSED = {"fused": {"fused": True}}
KINDS = {
    "SGD": (optim.SGD, {"lr": 0.1}, LOOPS | FUSED),
    "momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9}, LOOPS | FUSED),
    "dampened": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}, LOOPS | FUSED),
    "nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, LOOPS | FUSED),
    "Adam": (optim.Adam, {"weight_decay": 0.1}, LOOPS | FUSED),
    "AdamW": (optim.AdamW, {}, LOOPS | FUSED),
    "AMSGrad": (optim.AdamW, {"amsgrad": True}, LOOPS | FUSED),
    "Adagrad": (optim.Adagrad, {"lr_decay": 0.1}, LOOPS | FUSED),
    "RMSprop": (optim.RMSprop, {"momentum": 0.9, "centered": True}, LOOPS),
    "Adamax": (optim.Adamax, {}, LOOPS),
    "NAdam": (optim.NAdam, {}, LOOPS),
    "RAdam": (optim.RAdam, {}, LOOPS),
    "Adadelta": (optim.Adadelta, {}, LOOPS),
    "Rprop": (optim.Rprop, {}, LOOPS),
    "ASGD": (optim.ASGD, {"t0": 1, "lambd": 0.1}, LOOPS),
    "Adafactor": (optim.Adafactor, {}, LOOPS),
    "Muon": (optim.Muon, {}, {"loop": {}}),
    "CLASSP": (CLASSP, {}, {"loop": {}}),
}
CASES = [(kind, path) for kind, (_, _, paths) in KINDS.items() for path in paths]


def make(kind, path):
    made, options, paths = KINDS[kind]
    parameters = [nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    parameters.append(nn.Parameter(torch.ones(2, 2)))  # of which there is never a gradient
    return made(parameters, **options, **paths[path])


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def put_gradients(optimizer, step, bad=False):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters_of(optimizer)[:2]:
        parameter.grad = torch.randn(4, 3, generator=generator) * (float("nan") if bad else 1.0)


def snapshot(optimizer):
    return copy.deepcopy((parameters_of(optimizer), optimizer.state_dict()["state"]))


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return all(map(equal, one, other)) if isinstance(one, list | tuple) else one == other


def train(kind, path, skipped, steps=6, by_hand=False, as_tensor=True):
    """States after each step, of which some are skipped, or not made at all."""
    optimizer, states, flags = make(kind, path), [], []
    step = None if by_hand else SkippableStep(optimizer, lambda: flags.pop())
    for i in range(steps):
        put_gradients(optimizer, i, bad=i in skipped)
        if step is not None:
            flags.append(torch.tensor(float(i in skipped)) if as_tensor else i in skipped)
            optimizer.step()
            assert "found_inf" not in vars(optimizer)
            assert all(p.grad is not None for p in parameters_of(optimizer)[:2])  # whoever looks at them still can
        elif i not in skipped:
            optimizer.step()
        states.append(snapshot(optimizer))
    return states


@pytest.mark.parametrize("skipped", [(2, 3), (0, 4)], ids=["later", "first"])
@pytest.mark.parametrize(("kind", "path"), CASES)
def test_as_if_it_had_not_been(kind, path, skipped):
    ours, other = train(kind, path, skipped), train(kind, path, skipped, by_hand=True)
    assert all(map(equal, ours, other))
    assert all(p.isfinite().all() for p in ours[-1][0])
    assert not equal(ours[1], ours[5])


@pytest.mark.parametrize(("kind", "path"), CASES)
def test_a_decision_that_is_known_already(kind, path):
    ours, other = train(kind, path, (1, 2), as_tensor=False), train(kind, path, (1, 2), by_hand=True)
    assert all(map(equal, ours, other))


@pytest.mark.parametrize(("kind", "path"), [case for case in CASES if case[1] == "fused"])
def test_fused_optimizers_are_told_on_the_device(kind, path):
    """But for the first update, which makes the moments."""

    class Flag(torch.Tensor):
        reads = 0

        def __bool__(self):
            Flag.reads += 1
            return super().__bool__()

    optimizer = make(kind, path)
    SkippableStep(optimizer, lambda: torch.tensor(1.0 if i == 3 else 0.0).as_subclass(Flag))
    for i in range(5):
        put_gradients(optimizer, i, bad=i == 3)
        optimizer.step()
    assert Flag.reads == (0 if kind in ("SGD", "Adagrad") else 1)
    assert all(p.isfinite().all() for p in parameters_of(optimizer))


def test_a_weight_that_is_unfrozen_later_has_no_moments_yet():
    optimizer, flags = make("AdamW", "fused"), [0.0, 1.0, 0.0]
    SkippableStep(optimizer, lambda: torch.tensor(flags.pop(0)))
    for i in range(3):
        put_gradients(optimizer, i, bad=i == 1)
        if i:
            parameters_of(optimizer)[2].grad = torch.full((2, 2), float("nan") if i == 1 else 1.0)
        optimizer.step()
        assert len(optimizer.state) == (3 if i == 2 else 2)
    assert [int(state["step"]) for state in optimizer.state.values()] == [2, 2, 1]


def test_the_closure_is_run_before_the_decision():
    optimizer = make("AdamW", "loop")
    before = snapshot(optimizer)
    SkippableStep(optimizer, lambda: torch.tensor(float(parameters_of(optimizer)[0].grad.isnan().any())))

    def closure(bad):
        put_gradients(optimizer, 0, bad)
        return 3.0

    assert optimizer.step(lambda: closure(True)) == 3.0
    assert equal(snapshot(optimizer), before)
    assert optimizer.step(closure=lambda: closure(False)) == 3.0
    assert not equal(snapshot(optimizer), before)


@pytest.mark.parametrize(("kind", "path"), [("AdamW", "fused"), ("momentum", "fused"), ("AdamW", "foreach")])
def test_a_gradient_scaler_keeps_its_own_account(kind, path):
    """A burst is no overflow, and its scale grows on; an overflow is none of ours, and is skipped all the same."""

    def go(bursts, skips_by_hand):
        optimizer, states = make(kind, path), []
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)
        step = SkippableStep(optimizer, lambda: torch.tensor(float(i in bursts and not skips_by_hand)))
        for i in range(8):
            scaler.scale(torch.zeros(()))
            put_gradients(optimizer, i, bad=i == 5)
            for parameter in parameters_of(optimizer)[:2]:
                parameter.grad *= scaler.get_scale()
            if skips_by_hand and i in bursts:
                scaler.unscale_(optimizer)
            else:
                scaler.step(optimizer)
            scaler.update()
            assert not {"found_inf", "grad_scale"} & vars(optimizer).keys()
            states.append((snapshot(optimizer), scaler.get_scale()))
        step.remove()
        return states

    assert equal(go((2, 3), False), go((2, 3), True))


def test_two_who_may_skip_one_step():
    optimizer = make("AdamW", "fused")
    first, second = [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]
    steps = [SkippableStep(optimizer, lambda own=own: torch.tensor(own[i])) for own in (first, second)]
    for i in range(4):
        put_gradients(optimizer, i, bad=i > 0)
        optimizer.step()
        if i == 0:
            before = snapshot(optimizer)
    assert equal(snapshot(optimizer), before)
    for step in steps:
        step.remove()
        step.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_sparse_gradients():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer, before = optim.SparseAdam(table.parameters()), table.weight.detach().clone()
    step = SkippableStep(optimizer, lambda: True)
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert torch.equal(table.weight, before)
    assert not optimizer.state
    step.remove()
    optimizer.step()
    assert not torch.equal(table.weight, before)


def test_a_subclass_with_a_step_of_its_own_is_not_told_on_the_device():
    class Own(optim.AdamW):
        def step(self, closure=None):
            assert "found_inf" not in vars(self)
            return super().step(closure)

    weight = nn.Parameter(torch.ones(2))
    optimizer = Own([weight], fused=True)
    SkippableStep(optimizer, lambda: torch.tensor(float(weight.grad.isnan().any())))
    for value in (1.0, float("nan")):
        weight.grad = torch.full((2,), value)
        optimizer.step()
    assert weight.isfinite().all()


def test_a_step_that_fails_leaves_nothing_for_the_next():
    optimizer, flags = make("AdamW", "fused"), []
    SkippableStep(optimizer, lambda: flags.pop())
    for i in range(2):
        put_gradients(optimizer, i)
        flags.append(torch.tensor(0.0))
        optimizer.step()
    parameters_of(optimizer)[0].grad = torch.ones(4, 3)
    optimizer.param_groups[0]["lr"] = "no number"
    flags.append(torch.tensor(1.0))
    with pytest.raises(Exception, match="lr"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    before = snapshot(optimizer)
    flags.append(None)
    optimizer.step()
    assert not equal(snapshot(optimizer)[0], before[0])
