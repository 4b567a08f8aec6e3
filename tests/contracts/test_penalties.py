"""One battery over every registered penalty: against a reference with all anchors, then in real fits by both doors."""

import io
import pickle
from copy import deepcopy
from functools import cache, partial
from inspect import ismethod

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import ContinualMixin, WeightPenalty
from lightning_collapse.utilities.registry import PENALTIES
from tests.penalties.cases import CASES
from tests.penalties.references import softmax_regression, task
from tests.penalties.toys import Classifier, Manual, fit_tasks, flat, loader
from tests.toys import QUIET, fit

DOORS = ["callback", "mixin"]
every_penalty = pytest.mark.parametrize("name", sorted(PENALTIES))


def build(name):
    """The penalty as its reference is."""
    case = CASES[name]
    return PENALTIES[name](case.weight, **case.arguments)


def build_toy(name):
    """The penalty for the classifier of three layers."""
    case = CASES[name]
    return PENALTIES[name](case.weight, **(case.arguments if case.toy is None else case.toy))


def mixed(base, name, **arguments):
    """The second door."""

    class Mixed(ContinualMixin, base):
        def __init__(self):
            super().__init__(**arguments)
            self.set_penalties({"it": build_toy(name)})

    return Mixed()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@cache
def trained(name, door, precision="32-true", accumulate=1):
    """Weights after two tasks, what the second has logged, and names in the ``state_dict``; one fit for all tests."""
    torch.manual_seed(0)
    model = mixed(Classifier, name) if door == "mixin" else Classifier()
    callbacks = [WeightPenalty(build_toy(name), name="it")] if door == "callback" else []
    trainer = fit_tasks(model, callbacks, precision=precision, accumulate_grad_batches=accumulate)
    return flat(model), of_steps(trainer.logger.rows), list(model.state_dict())


def of_steps(rows):
    """What is logged while a task is learned; some penalties have more to tell when it has ended."""
    return [row for row in rows if not all(key.endswith("/rank_one_share") for key in row[1])]


def shift(parameter):
    """Of every class another: the same for all changes no probability, and so no Fisher information sees it."""
    return 0.1 * torch.arange(1.0, len(parameter) + 1).to(parameter).view(-1, *[1] * (parameter.ndim - 1)) ** 2


def train(name, tasks, check):
    """Train by hand beside the reference; ``check(penalty, reference, model)`` before each step and after each end."""
    model, penalty = softmax_regression(), build(name)
    reference = CASES[name].reference(CASES[name].weight)
    reference.start(values(model))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for index in range(tasks):
        penalty.start(parameters)
        x, y = task(index)
        for _ in range(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            gradient, before = {n: p.grad.clone() for n, p in parameters.items()}, values(model)
            penalty.observe(parameters)
            penalty.add_gradients(parameters)
            check(penalty, reference, model, gradient)
            optimizer.step()
            penalty.after_step(parameters)
            reference.step(gradient, before, values(model))
        penalty.consolidate(model, [(x[:24], y[:24]), (x[24:], y[24:])])
        reference.end(values(model), x, y)
    return penalty, reference, model


@every_penalty
def test_value_and_gradient_are_those_of_the_reference_with_all_anchors(name):
    largest = 0.0

    def check(penalty, reference, model, gradient):
        nonlocal largest
        parameters = dict(model.named_parameters())
        theta = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
        expected = torch.as_tensor(reference.value(theta), dtype=torch.float64)
        torch.testing.assert_close(penalty.value(parameters).detach(), expected.detach(), rtol=1e-10, atol=1e-14)
        pulls = torch.autograd.grad(expected, theta.values()) if expected.requires_grad else [0.0, 0.0]
        for (n, parameter), pull in zip(parameters.items(), pulls, strict=True):
            torch.testing.assert_close(parameter.grad, gradient[n] + pull, rtol=1e-10, atol=1e-14)
        largest = max(largest, expected.item())

    train(name, 3, check)
    assert largest > 1e-4


@every_penalty
def test_gradient_is_the_derivative_of_the_value(name):
    penalty, _, model = train(name, 2, lambda *_: None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    parameters = dict(model.named_parameters())
    if not CASES[name].remembers:
        del parameters["bias"]
    expected = torch.autograd.grad(penalty.value(parameters), parameters.values())
    model.zero_grad()
    penalty.add_gradients(parameters)  # makes gradients where there are none
    for parameter, pull in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, pull, rtol=1e-10, atol=1e-14)
        assert pull.abs().max() > 0
    scaled = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
    penalty.add_gradients(scaled, scale=torch.tensor(1024.0))
    for parameter, pull in zip(scaled.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 1024 * pull, rtol=1e-10, atol=1e-14)


@every_penalty
def test_curvature_is_the_largest_eigenvalue_of_the_hessian(name):
    """Of all parameters, and of those alone that an optimizer has."""
    penalty, _, model = train(name, 2, lambda *_: None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for names in (["weight", "bias"], ["weight"], ["bias"]) if CASES[name].remembers else (["weight"],):
        own = {n: model.get_parameter(n) for n in names}
        others = {n: p.detach() for n, p in model.named_parameters() if n not in names}

        def value(flat, own=own, others=others):
            parts = torch.split(flat, [p.numel() for p in own.values()])
            return penalty.value(others | {n: part.view_as(own[n]) for n, part in zip(own, parts, strict=True)})

        point = torch.cat([p.detach().flatten() for p in own.values()])
        hessian = torch.autograd.functional.hessian(value, point)
        expected = torch.linalg.eigvalsh(hessian)[-1]
        torch.testing.assert_close(penalty.curvature(own), expected, rtol=0.02, atol=0)
        assert expected > 0
    for parameter in model.parameters():
        parameter.requires_grad = False
    assert penalty.curvature(dict(model.named_parameters())) is None


@every_penalty
def test_steps_that_would_diverge_are_told(name):
    """When a task has been learned, or at the start, before a step is taken."""
    torch.manual_seed(0)
    model, penalty = Classifier(), WeightPenalty(build_toy(name))
    penalty.penalty.weight *= 1e6
    with pytest.warns(UserWarning, match="overshoot ever more, unless its weight is below"):
        fit(model, [penalty], loader(0))


@every_penalty
def test_zero_until_a_task_ends_and_right_after(name):
    if not CASES[name].consolidates:
        pytest.skip("acts from the first step")
    model, penalty = softmax_regression(), build(name)
    parameters = dict(model.named_parameters())
    penalty.start(parameters)
    penalty.add_gradients(parameters)
    assert all(parameter.grad is None for parameter in parameters.values())
    assert penalty.value(parameters).item() == 0.0
    penalty, _, model = train(name, 1, lambda *_: None)
    assert penalty.value(dict(model.named_parameters())).item() == 0.0


@every_penalty
def test_state_goes_through_a_safe_file(name):
    penalty, _, model = train(name, 2, lambda *_: None)
    file = io.BytesIO()
    torch.save(penalty.state_dict(), file)
    file.seek(0)
    other = build(name)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shift(parameter)
    parameters = dict(model.named_parameters())
    other.start(parameters)
    assert torch.equal(penalty.value(parameters), other.value(parameters))
    assert other.value(parameters) > 1e-6


@every_penalty
def test_sparse_gradients_are_taken_as_dense_ones(name):
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 6, sparse=sparse), nn.Flatten(), nn.Linear(12, 3)).double()
        penalty, parameters = build_toy(name), dict(model.named_parameters())
        if name == "L2SP":
            penalty.new = ["2.*"]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        x, y = torch.randint(5, (16, 2)), torch.randint(3, (16,))  # two rows of the table are never looked up
        for _ in range(2):
            penalty.start(parameters)
            for _ in range(6):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                assert model[0].weight.grad.is_sparse == sparse
                penalty.observe(parameters)
                penalty.add_gradients(parameters)
                optimizer.step()
                penalty.after_step(parameters)
            penalty.consolidate(model, [(x, y)])
        found.append((flat(model), penalty.value(parameters).detach(), penalty.state_dict()))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


@every_penalty
def test_half_precision_weights_are_remembered_in_single(name):
    penalty, _, model = train(name, 1, lambda *_: None)
    state = penalty.state_dict()
    half = {n: p.detach().bfloat16().requires_grad_() for n, p in model.named_parameters()}
    penalty.load_state_dict(state)
    penalty.start(half)
    assert penalty.value(half).dtype == torch.float32
    penalty.add_gradients(half)
    found = [p.grad for p in half.values() if p.grad is not None]
    assert len(found) == len(half) if CASES[name].remembers else found
    assert all(gradient.dtype == torch.bfloat16 and gradient.isfinite().all() for gradient in found)


@every_penalty
def test_autocast_changes_nothing(name):
    """Optimizers that are stepped by hand do so within a training step, where autocast is on."""
    penalty, _, model = train(name, 1, lambda *_: None)
    parameters = {n: (p.detach() + shift(p)).float().requires_grad_() for n, p in model.named_parameters()}
    penalty.load_state_dict(penalty.state_dict())
    penalty.start(parameters)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            penalty.add_gradients(parameters)
            pulled = [p.grad for p in parameters.values() if p.grad is not None]
            found.append([penalty.value(parameters).detach(), *pulled])
        for parameter in parameters.values():
            parameter.grad = None
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0][0] > 1e-6


@every_penalty
@pytest.mark.filterwarnings("ignore:What was remembered of parameters")
def test_grown_and_removed_parameters(name):
    if not CASES[name].remembers:
        pytest.skip("nothing is remembered of parameters")
    penalty, _, model = train(name, 1, lambda *_: None)
    theta = values(model)
    grown = {
        "weight": torch.cat([theta["weight"], torch.ones(2, 6, dtype=torch.float64)]).requires_grad_(),
        "bias": torch.cat([theta["bias"], torch.ones(2, dtype=torch.float64)]).requires_grad_(),
    }
    before = penalty.value(dict(model.named_parameters()))
    penalty.start(grown)
    new = 0.05 / 2 * 2 if name == "L2SP" else 0.0  # what is new decays
    if name == "L2SP":
        new += 0.05 / 2 * 12
    torch.testing.assert_close(penalty.value(grown), before + new)
    with pytest.raises(ValueError, match="shape"):
        penalty.start({"weight": grown["weight"][:4], "bias": grown["bias"]})
    with pytest.warns(UserWarning, match="are gone is dropped: weight") as caught:
        penalty.start({"bias": grown["bias"]})
    assert len(caught) == 1
    penalty.start({"bias": grown["bias"]})


@every_penalty
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weight_is_checked(name, weight):
    with pytest.raises(ValueError, match="`weight`"):
        PENALTIES[name](weight)


def parts_of(value):
    """Everything that hangs on an object, the owners of its methods too."""
    yield value
    if ismethod(value):
        yield value.__self__
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    for part in (*held, *getattr(value, "__dict__", {}).values()):
        yield from parts_of(part)


@pytest.mark.parametrize("door", DOORS)
def test_a_copy_in_mid_fit_has_what_was_learned_and_nothing_of_the_fit(door):
    class Copying(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx != 3:
                return
            for make in (deepcopy, lambda part: pickle.loads(pickle.dumps(part))):
                copies = make(callbacks) if callbacks else list(make(pl_module).weight_penalties.values())
                for penalty, copy in zip(penalties, copies, strict=True):
                    torch.testing.assert_close(copy.state_dict(), penalty.state_dict(), rtol=0, atol=0)
                    assert not [part for part in parts_of(copy) if isinstance(part, nn.Module | nn.Parameter)]
                    copy.on_exception(trainer, pl_module, KeyError())  # takes off hooks, of its own alone

    torch.manual_seed(0)
    model = Classifier() if door == "callback" else Everything()
    callbacks = all_penalties() if door == "callback" else []
    penalties = callbacks or list(model.weight_penalties.values())
    fit_tasks(model, [*callbacks, Copying()])
    assert torch.equal(flat(model), together())


class Everything(ContinualMixin, Classifier):
    """With all penalties at once."""

    def __init__(self):
        super().__init__()
        self.set_penalties({penalty.name: penalty for penalty in all_penalties()})


def all_penalties():
    return [WeightPenalty(build_toy(name), name=name) for name in sorted(PENALTIES)]


@cache
def together():
    """Weights after two tasks with all penalties."""
    torch.manual_seed(0)
    model = Classifier()
    fit_tasks(model, all_penalties())
    return flat(model)


@every_penalty
@pytest.mark.parametrize(
    ("precision", "accumulate"), [("32-true", 1), ("bf16-mixed", 2), ("bf16-true", 1), ("64-true", 2)]
)
def test_doors_are_bit_equal(name, precision, accumulate):
    (callback, *seen), (mixin, *seen_inside) = (trained(name, door, precision, accumulate) for door in DOORS)
    assert torch.equal(callback, mixin)
    assert callback.isfinite().all()
    assert seen == seen_inside
    rows, keys = seen
    assert [step for step, _ in rows] == list(range(6 // accumulate))
    assert rows[-1][1]["penalty/it/value"] > 0
    assert rows[-1][1]["penalty/it/gradient_ratio"] > 0
    assert keys == list(Classifier().state_dict())


def by_door(door, name, **arguments):
    """A classifier and callbacks."""
    torch.manual_seed(0)
    if door == "mixin":
        return mixed(Classifier, name, **arguments), []
    return Classifier(**arguments), [WeightPenalty(build_toy(name))]


@every_penalty
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_in_the_middle_of_a_task(name, optimizer, door, tmp_path):
    options = {**QUIET, "max_epochs": 2, "logger": False, "enable_checkpointing": True}
    saver = partial(ModelCheckpoint, tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    model, trained = by_door(door, name, optimizer=optimizer)
    fit(model, trained, loader(0))
    Trainer(**options, callbacks=[*trained, saver()]).fit(model, loader(1))
    resumed, callbacks = by_door(door, name, optimizer=optimizer)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1.0)  # what it starts from does not matter
    trainer = Trainer(**options, callbacks=[*callbacks, saver()])
    trainer.fit(resumed, loader(1), ckpt_path=str(tmp_path / "step=6.ckpt"))
    assert trainer.global_step == 12
    assert torch.equal(flat(resumed), flat(model))
    states = [
        (list(m.weight_penalties.values()) if door == "mixin" else c)[0].state_dict()["penalty"]
        for m, c in ((model, trained), (resumed, callbacks))
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@every_penalty
def test_accumulation_is_a_larger_batch(name):
    models = []
    for batch_size, accumulate in ((16, 1), (4, 4)):
        torch.manual_seed(0)
        models.append(Classifier())
        callbacks = [WeightPenalty(build_toy(name))]
        fit_tasks(models[-1], callbacks, batch_size=batch_size, accumulate_grad_batches=accumulate)
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-4, atol=1e-5)


@every_penalty
def test_clipping_sees_the_sum(name):
    class Clipped(Classifier):
        def on_before_zero_grad(self, optimizer):
            norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
            if norms:
                seen.append(torch.stack(norms).norm().item())

    seen = []
    penalty = WeightPenalty(PENALTIES[name](1e4, **(CASES[name].toy or CASES[name].arguments)))
    fit_tasks(Clipped(), [penalty], gradient_clip_val=0.01)
    assert seen
    assert max(seen) == pytest.approx(0.01, rel=1e-3)


def scaled(init_scale=2.0**10):
    """16-bit training with a gradient scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


class FusedClassifier(Classifier):
    """Its optimizer takes the scale out itself, within its step."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, fused=True)


@cache
def fit_scaled(name, base, **options):
    """Two tasks; the weights, from one fit for all tests."""
    torch.manual_seed(0)
    model, penalty = base(), WeightPenalty(build_toy(name))
    for index in range(2):
        fit(model, [penalty], loader(index), max_epochs=2, **(scaled(**options) if options else {}))
    tables = penalty.state_dict()["penalty"]["memory"]
    assert all(part.isfinite().all() for table in tables.values() for part in table.values())
    return flat(model)


@every_penalty
@pytest.mark.parametrize("base", [Classifier, FusedClassifier])
def test_gradient_scaler(name, base):
    half, exact = fit_scaled(name, base, init_scale=2.0**10), fit_scaled(name, Classifier)
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.03)


@every_penalty
def test_steps_that_the_gradient_scaler_skips(name):
    assert fit_scaled(name, Classifier, init_scale=2.0**20).isfinite().all()


@every_penalty
def test_two_optimizers_by_hand(name):
    torch.manual_seed(0)
    model = Manual()
    rows = of_steps(fit_tasks(model, [WeightPenalty(build_toy(name), name="it")]).logger.rows)
    weights, expected_rows, _ = trained(name, "callback")
    exact = CASES[name].separable  # else the second optimizer sees where the first has led
    tolerances = {"rtol": 1e-6, "atol": 1e-7} if exact else {"rtol": 0.05, "atol": 5e-3}
    torch.testing.assert_close(flat(model), weights, **tolerances)
    ratios, expected = ([row["penalty/it/gradient_ratio"] for _, row in found] for found in (rows, expected_rows))
    assert ratios == pytest.approx(expected, rel=1e-4 if exact else 0.1, abs=1e-12 if exact else 2e-3)


@every_penalty
def test_consolidation_leaves_everything_as_it_was(name):
    class Normed(Classifier):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh())

    class Looks(Callback):
        def on_train_end(self, trainer, pl_module):
            buffers = [b.clone() for b in pl_module.buffers()]
            gradients = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
            flags = [module.training for module in pl_module.modules()]
            seen.append((buffers, gradients, flags, torch.get_rng_state(), generator.get_state(), flat(pl_module)))

    seen, generator = [], torch.Generator().manual_seed(3)
    model = Normed()
    shuffled = DataLoader(loader(0).dataset, 8, shuffle=True, generator=generator)
    model.encoder[1].eval()
    fit(model, [Looks(), WeightPenalty(build_toy(name))], shuffled)
    Looks().on_train_end(None, model)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
