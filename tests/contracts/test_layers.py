"""One battery over every registered layer that modules are converted into, in place and back."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_collapse.layers import ConversionError
from lightning_collapse.utilities.registry import LAYERS
from tests.layers.cases import CASES, WIDTH

OWN = sorted(name for name, layer in LAYERS.items() if layer.__module__.startswith("lightning_collapse."))
every_layer = pytest.mark.parametrize("name", OWN)


def converted(name, seed=0, moved=True):
    """A model whose converted modules are no longer the identity, with their names."""
    torch.manual_seed(seed)
    model = CASES[name].model()
    names = convert(name, model)
    with torch.no_grad():
        for number, added in enumerate(LAYERS[name].added_parameters(model).values() if moved else ()):
            added.mul_(1.1 + 0.1 * number)
    return model, names


def convert(name, model):
    """What is tied stays out."""
    return LAYERS[name].convert_(model, **CASES[name].options, exclude=["head"])


def outputs(name, model):
    """In training, in evaluation, and in evaluation without gradients, which has kernels of its own."""
    inputs = CASES[name].inputs()
    found = [model.train()(inputs).detach(), model.eval()(inputs).detach()]
    with torch.no_grad():
        found.append(model(inputs))
    model.train()
    return torch.stack(found)


def same(name, one, other):
    one, other = outputs(name, one), outputs(name, other)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


def facts(model):
    """Classes, and names of the state."""
    return [type(module) for module in model.modules()], list(model.state_dict())


def test_every_layer_has_its_case():
    assert sorted(CASES) == OWN


@every_layer
def test_conversion_keeps_what_is_computed_and_the_parameters(name):
    torch.manual_seed(0)
    plain = CASES[name].model()
    model = copy.deepcopy(plain)
    before, random = dict(model.named_parameters()), torch.get_rng_state()
    names = convert(name, model)
    assert torch.equal(random, torch.get_rng_state())
    assert names
    assert all(isinstance(model.get_submodule(n), LAYERS[name]) for n in names)
    after = dict(model.named_parameters())
    assert all(after[key] is parameter for key, parameter in before.items())
    assert all(torch.equal(plain.get_parameter(key), parameter) for key, parameter in before.items())
    added = LAYERS[name].added_parameters(model)
    assert added == {key: p for key, p in after.items() if key not in before}
    assert all(p.ndim for p in added.values())
    same(name, model, plain)


@every_layer
def test_reverted_modules_do_what_converted_ones_have_learned(name):
    model, names = converted(name)
    if not CASES[name].folds:
        with pytest.raises(ConversionError, match=f"`{names[0]}`"):
            LAYERS[name].revert_(model)
        return
    learned, own = copy.deepcopy(model), [id(p) for p in model.parameters()]
    assert LAYERS[name].revert_(model) == names
    same(name, model, learned)
    assert facts(model) == facts(CASES[name].model())
    assert {id(p) for p in model.parameters()} < set(own)
    assert LAYERS[name].revert_(model) == []


@every_layer
def test_state_copies_and_pickles(name):
    model, _ = converted(name)
    other, _ = converted(name, seed=1, moved=False)
    other.load_state_dict(model.state_dict())
    same(name, other, model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert facts(again) == facts(model)
        assert not {id(p) for p in again.parameters()} & {id(p) for p in model.parameters()}
        same(name, again, model)


@every_layer
def test_one_graph(name):
    """Of the last one that was converted alone: a model takes torch seconds."""
    model, names = converted(name)
    module = model.get_submodule(names[-1])
    is_table = isinstance(module, nn.Embedding)
    inputs = [torch.tensor([[0, 3], [1, 3]]) if is_table else torch.randn(2, 3, getattr(module, "in_features", WIDTH))]
    inputs *= 3 if isinstance(module, nn.MultiheadAttention) else 1
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), module(*inputs), rtol=0, atol=0)


@every_layer
def test_autocast_and_half_precision(name):
    model, _ = converted(name, moved=False)
    torch.manual_seed(0)
    plain, inputs = CASES[name].model(), CASES[name].inputs()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(inputs), plain(inputs), rtol=0.02, atol=0.02)
    one, other = model.bfloat16()(inputs).detach(), plain.bfloat16()(inputs).detach()
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))  # compares dtypes too


@every_layer
def test_activation_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        model, _ = converted(name)
        model.checkpointing = checkpointing
        model(CASES[name].inputs()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


@every_layer
def test_optimizers_made_before_go_on_and_what_is_tied_stays_tied(name):
    torch.manual_seed(0)
    model = CASES[name].model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(name, model)
    added = LAYERS[name].added_parameters(model)
    optimizer.add_param_group({"params": list(added.values()), "weight_decay": 0.0})
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model(CASES[name].inputs()).square().sum().backward()
    optimizer.step()
    stuck = [key for key, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[key])]
    assert all(key.endswith(("in_proj_bias",)) for key in stuck), stuck
    assert model.head._parameters["weight"] is model.embed._parameters["weight"]


@every_layer
def test_what_cannot_be_converted_is_named_and_nothing_is_changed(name):
    def refused(prepare, match, **options):
        torch.manual_seed(0)
        model = CASES[name].model()
        made = prepare(model)
        model = model if made is None else made
        before = facts(model)
        with pytest.raises(ConversionError, match=match) as caught:
            LAYERS[name].convert_(model, **CASES[name].options, **({"exclude": ["head"]} | options))
        assert facts(model) == before
        assert "exclude=[" in str(caught.value)
        return str(caught.value)

    _, names = converted(name)
    first = names[0]
    again = refused(lambda model: convert(name, model) and None, f"`{first}`: it is converted into `{name}`")
    assert all(f"- `{n}`: " in again for n in names)
    refused(lambda model: model.to("meta"), f"`{first}`.*meta device")
    refused(lambda model: torch.compile(model, backend="eager"), f"`{first}`: it is compiled")
    refused(lambda model: model.encoder.layers[0].compile(backend="eager"), f"`{first}`: it is compiled")

    def parametrized(model):
        module = model.get_submodule(first)
        key = next(key for key, p in module.named_parameters(recurse=False) if p.ndim > 1)
        parametrize.register_parametrization(module, key, nn.Identity())

    if any(p.ndim > 1 for p in CASES[name].model().get_submodule(first).parameters(recurse=False)):
        refused(parametrized, f"`{first}`: it")
    with pytest.raises(ValueError, match=r"finds nothing to convert in Sequential|matches no"):
        LAYERS[name].convert_(nn.Sequential(nn.Flatten()), **CASES[name].options)


@every_layer
def test_a_conversion_that_fails_half_way_is_taken_back(name, monkeypatch):
    torch.manual_seed(0)
    model = CASES[name].model()
    before, plain, calls = facts(model), copy.deepcopy(model), []

    def failing(module, key, value):
        if isinstance(module, LAYERS[name]) and key == LAYERS[name].adds[0]:
            calls.append(key)
            if len(calls) > 1:
                raise RuntimeError("boom")
        nn.Module.__setattr__(module, key, value)

    monkeypatch.setattr(LAYERS[name], "__setattr__", failing, raising=False)
    with pytest.raises(RuntimeError, match="boom"):
        convert(name, model)
    assert facts(model) == before
    same(name, model, plain)
