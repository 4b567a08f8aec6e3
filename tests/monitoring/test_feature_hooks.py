"""Rows copied out of forward passes."""

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_collapse.monitoring.feature_hooks import FeatureHooks
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.modules import Tap


def listen(module: nn.Module, side: str = "output", **kwargs: Any) -> FeatureHooks:
    taps = FeatureHooks([Tap("layer", module, side)], **kwargs)
    taps.armed = True
    return taps


class Call(nn.Module):
    """Returns what a function makes of its arguments."""

    def __init__(self, fn: Any = lambda x: x) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def test_armed_or_not() -> None:
    layer = nn.Linear(3, 2)
    taps = listen(layer)
    taps.armed = False
    layer(torch.zeros(4, 3))
    assert taps.pop() == {}
    taps.armed = True
    y = layer(torch.randn(4, 3))
    heard = taps.pop()["layer"]
    assert torch.equal(heard.rows, y)
    assert heard.mask.tolist() == [True] * 4
    assert heard.returned == 4
    assert taps.pop() == {}


def test_every_call_is_kept_in_order() -> None:
    layer = nn.Linear(3, 2)
    taps = listen(layer)
    outputs = [layer(torch.randn(n, 3)) for n in (4, 1, 0, 2)]
    heard = taps.pop()["layer"]
    assert torch.equal(heard.rows, torch.cat(outputs))
    assert heard.returned == 7
    assert len(heard.mask) == 7


def test_several_taps_and_a_shared_module() -> None:
    layer, head = nn.Linear(3, 3), nn.Linear(3, 2)
    taps = FeatureHooks([Tap("a", layer), Tap("b", head), Tap("b.input", head, "input"), Tap("never", nn.Linear(1, 1))])
    taps.armed = True
    hidden = layer(layer(torch.randn(5, 3)))
    out = head(hidden)
    heard = taps.pop()
    assert set(heard) == {"a", "b", "b.input"}
    assert heard["a"].returned == 10
    assert torch.equal(heard["b"].rows, out)
    assert torch.equal(heard["b.input"].rows, hidden)


def test_in_place_operations_afterwards_change_nothing() -> None:
    layer = nn.Linear(3, 3)
    taps = listen(layer)
    before = layer(torch.randn(6, 3))
    expected = before.clone()
    nn.ReLU(inplace=True)(before)
    assert (before != expected).any()
    assert torch.equal(taps.pop()["layer"].rows, expected)


@pytest.mark.parametrize("limit", [3, 1000])
def test_rows_do_not_pin_the_activation(limit: int) -> None:
    layer = Call()
    taps = listen(layer, limit=limit)
    activation = torch.randn(64, 10, 16)
    reference = weakref.ref(activation)
    layer(activation[:, 0])  # a class token
    rows = taps.pop()["layer"].rows
    assert rows.untyped_storage().nbytes() == min(limit, 64) * 16 * 4
    del activation
    gc.collect()
    assert reference() is None


def test_no_graph_is_kept() -> None:
    layer = nn.Linear(3, 2)
    taps = listen(layer)
    x = torch.randn(4, 3, requires_grad=True)
    reference = weakref.ref(x)  # the graph of the output holds it
    layer(x)
    rows = taps.pop()["layer"].rows
    assert not rows.requires_grad
    del x
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_ignored(use_reentrant: bool) -> None:
    layer, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 3, requires_grad=True)
    taps = FeatureHooks([Tap("layer", layer), Tap("layer.input", layer, "input")])
    taps.armed = True
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert x.grad is not None  # it was recomputed
    heard = taps.pop()
    assert heard["layer"].returned == heard["layer.input"].returned == 4


def test_a_call_inside_a_backward_hook_of_autograd_is_ignored_and_the_next_is_not() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True)
    taps = listen(layer)
    x.register_hook(lambda grad: layer(grad).detach())
    layer(x).sum().backward()
    layer(x)
    assert taps.pop()["layer"].returned == 8


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {"x": torch.ones(4, 3)}),
        ((torch.ones(4, 3),), {}),
        ((torch.tensor([1]), torch.ones(4, 3)), {"mask": torch.zeros(9, 9)}),
        ((None,), {"flag": True, "x": torch.ones(4, 3)}),
        (({"features": torch.ones(4, 3)},), {}),
    ],
)
def test_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layer = Call(lambda *args, **kwargs: None)
    taps = listen(layer, "input")
    layer(*args, **kwargs)
    assert torch.equal(taps.pop()["layer"].rows, torch.ones(4, 3))


@pytest.mark.parametrize("output", [None, "a", torch.tensor(1.0), torch.tensor([1]), {}, torch.zeros(3, 0)], ids=repr)
def test_what_has_no_features_is_told_once(output: Any) -> None:
    layer = Call(lambda x: x)
    taps = listen(layer)
    with pytest.warns(UserWarning, match="`FeatureHooks`: reading layer `layer` failed with NoFeaturesError") as told:
        _ = [layer(output) for _ in range(2)]
    assert len(told) == 1
    assert taps.pop() == {}
    assert set(taps.left_out) == {"layer"}
    layer(torch.ones(2, 3))  # another time it may have some
    assert taps.pop()["layer"].returned == 2


def test_tuples() -> None:
    layer = nn.LSTM(3, 2, batch_first=True)
    taps = listen(layer, limit=10)
    output, _ = layer(torch.randn(2, 5, 3))
    assert torch.equal(taps.pop()["layer"].rows, output.reshape(10, 2))


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(3, 6, 3, padding=1), nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6))]
)
def test_sequences_of_channels_are_averaged(layer: nn.Module) -> None:
    taps = listen(layer)
    y = layer(torch.randn(4, 3, 10))
    torch.testing.assert_close(taps.pop()["layer"].rows, y.mean(dim=2))


@pytest.mark.parametrize("after", [nn.ReLU(), nn.Dropout(0.1), nn.MaxPool1d(2), nn.Identity()])
def test_sequences_of_channels_are_averaged_whatever_ends_the_block(after: nn.Module) -> None:
    layer = nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), after)
    taps = listen(layer)
    y = layer(torch.randn(4, 3, 10))
    assert y.shape[:2] == (4, 6)
    torch.testing.assert_close(taps.pop()["layer"].rows, y.mean(dim=2))


def test_inputs_of_convolutions_are_averaged_as_well() -> None:
    layer, x = nn.Conv1d(3, 6, 3), torch.randn(4, 3, 10)
    taps = listen(layer, "input")
    layer(x)
    torch.testing.assert_close(taps.pop()["layer"].rows, x.mean(dim=2))


def test_limits() -> None:
    layer = Call()
    x = torch.arange(3000.0).view(1000, 3)
    for limit, kept in ((7, 7), (None, 12), (5000, 1000)):
        taps = listen(layer, limit=limit)
        layer(x)
        heard = taps.pop()["layer"]
        assert len(heard.rows) == len(heard.mask) == kept
        assert heard.returned == 1000
        assert torch.equal(heard.rows, evenly(x, kept))
        taps.remove()
    taps = listen(layer)
    layer(torch.zeros(5000, 400))
    assert len(taps.pop()["layer"].rows) == 1024
    taps.limits = {"layer": 5, "other": 6}
    layer(x)
    assert torch.equal(taps.pop()["layer"].rows, evenly(x, 5))


def test_masks() -> None:
    layer = Call()
    taps = listen(layer, limit=6)
    taps.mask = torch.tensor([[1, 1, 0, 0, 0, 0]] * 2)
    tokens = torch.arange(24.0).view(2, 6, 2)
    layer(tokens)
    layer(torch.arange(8.0).view(4, 2))  # vectors have no mask
    heard = taps.pop()["layer"]
    assert torch.equal(heard.rows[:6], evenly(tokens.flatten(0, 1), 6))
    assert heard.mask.tolist() == [position % 12 < 4 for position in heard.rows[:6, 0].tolist()] + [True] * 4
    assert 0 < heard.mask[:6].sum() < 6
    assert taps.mask is None  # of the batch that was


def test_a_mask_that_only_looks_like_that_of_the_channels() -> None:
    # as many channels as tokens: rows are pooled, so there is nothing to mask
    layer = nn.Conv1d(5, 7, 3, padding=1)
    taps = listen(layer)
    taps.mask = torch.ones(4, 7)
    layer(torch.randn(4, 5, 7))
    heard = taps.pop()["layer"]
    assert len(heard.rows) == len(heard.mask) == 4


def test_calls_of_another_width_are_left_out() -> None:
    layer = Call()
    taps = listen(layer)
    layer(torch.zeros(3, 5))
    layer(torch.ones(4, 2))
    heard = taps.pop()["layer"]
    assert torch.equal(heard.rows, torch.ones(4, 2))
    assert heard.returned == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    layer = Call()
    taps = listen(layer)
    layer(torch.ones(3, 2, dtype=dtype))
    assert taps.pop()["layer"].rows.dtype == dtype


def test_inference_mode() -> None:
    layer = nn.Linear(3, 2)
    taps = listen(layer)
    with torch.inference_mode():
        layer(torch.zeros(4, 3))
    assert taps.pop()["layer"].returned == 4


def test_remove() -> None:
    layer = nn.Linear(3, 2)
    taps = FeatureHooks([Tap("layer", layer), Tap("layer.input", layer, "input")])
    taps.armed = True
    layer(torch.zeros(4, 3))
    taps.remove()
    taps.remove()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    layer(torch.zeros(4, 3))
    assert taps.pop() == {}


def test_the_model_computes_what_it_did() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected: Tensor = layer(x)
    taps = FeatureHooks([Tap("layer", layer), Tap("layer.input", layer, "input")])
    taps.armed = True
    assert torch.equal(layer(x), expected)
    assert not any("hook" in key for key in layer.state_dict())


def test_what_fails_is_told_once_in_the_name_of_the_owner_and_dropped() -> None:
    layer, other = nn.Linear(3, 2), nn.Linear(2, 2)
    containment = Containment("SomeMonitor")
    taps = FeatureHooks([Tap("layer", layer), Tap("other", other)], containment=containment)
    taps.limits = {"layer": "three"}  # type: ignore[dict-item]
    taps.armed = True
    with pytest.warns(UserWarning, match="`SomeMonitor`: reading layer `layer` failed with TypeError") as told:
        outputs = [other(layer(torch.ones(4, 3))) for _ in range(3)]
    assert len(told) == 1
    assert len(outputs) == 3
    assert set(taps.pop()) == {"other"}
    assert set(taps.left_out) == {"layer"}
    taps.remove()
    assert not layer._forward_hooks


def test_calls_are_the_views_of_one_step() -> None:
    layer = nn.Linear(3, 2)
    taps = listen(layer, limit=3)
    views = [layer(torch.randn(n, 3)) for n in (2, 5, 2)]
    captured = taps.pop()["layer"]
    assert captured.calls == (2, 3, 2)
    first, second, third = captured.rows.split(captured.calls)
    assert torch.equal(first, views[0])
    assert torch.equal(second, evenly(views[1], 3))
    assert torch.equal(third, views[2])
    assert captured.sequences is None


def test_whole_sequences_where_asked() -> None:
    layer = Call()
    taps = listen(layer, limit=13, sequences=True)
    taps.mask = torch.ones(6, 4).tril()
    tokens = torch.arange(48.0).view(6, 4, 2)
    layer(tokens)
    layer(tokens[:2])
    captured = taps.pop()["layer"]
    assert captured.calls == (12, 8)
    assert captured.returned == 32
    assert captured.sequences is not None
    assert captured.sequences.dtype == torch.int64
    picked = captured.sequences[:12:4].tolist()
    assert torch.equal(captured.rows[:12], tokens[picked].flatten(0, 1))
    assert torch.equal(captured.mask[:12], torch.ones(6, 4).tril()[picked].flatten().bool())
    assert captured.sequences[12:].tolist() == [6] * 4 + [7] * 4
    layer(tokens[:, 0])  # vectors are no sequences
    assert taps.pop()["layer"].sequences is None


HOW = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy, then pickle": lambda module: pickle.loads(pickle.dumps(copy.deepcopy(module))),
}


@pytest.mark.parametrize("how", HOW)
def test_copies_are_not_heard_and_carry_nothing(how: str) -> None:
    layer = nn.Sequential(nn.Linear(3, 2))
    taps = FeatureHooks([Tap("layer", layer[0]), Tap("layer.input", layer[0], "input")])
    taps.armed = True
    copied = HOW[how](layer)
    x = torch.randn(4, 3)
    assert torch.equal(copied(x), layer(x))
    assert {captured.returned for captured in taps.pop().values()} == {4}
    assert b"lightning_collapse" not in pickle.dumps(layer)
    if how == "deepcopy":
        assert not copied[0]._forward_hooks
        assert not copied[0]._forward_pre_hooks
        assert not copied[0]._forward_pre_hooks_with_kwargs
    assert len(layer[0]._forward_hooks) == len(layer[0]._forward_pre_hooks) == 1
    taps.remove()
    again = HOW[how](copied)
    assert torch.equal(again(x), layer(x))


def test_hooks_of_others_are_copied_as_ever() -> None:
    layer, seen = nn.Linear(3, 2), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    FeatureHooks([Tap("layer", layer)])
    copied = copy.deepcopy(layer)
    copied(torch.ones(1, 3))
    copied(torch.ones(1, 3))
    assert len(seen) == 2
    assert len(copied._forward_hooks) == 1


def test_a_script_module_is_left_out_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.warns(UserWarning, match="`script`.*not supported on ScriptModules"):
        taps = FeatureHooks([Tap("script", script), Tap("other", nn.Linear(1, 1))])
    assert set(taps.left_out) == {"script"}
    taps.remove()


@pytest.mark.parametrize("shape", [(2, 7, 5, 16), (2, 5, 6, 7, 16)])
def test_maps_of_an_unknown_layer_are_doubted_once(shape: tuple[int, ...]) -> None:
    layer, known = nn.ReLU(), nn.LayerNorm(16)
    taps = FeatureHooks([Tap("layer", layer), Tap("known", known)])
    taps.armed = True
    known(torch.ones(shape))
    with pytest.warns(UserWarning, match=r"nothing tells which axis .* `layer` .* read as \(N, C, \*\)") as told:
        _ = [layer(torch.ones(shape)) for _ in range(2)]
    assert len(told) == 1
    found = taps.pop()
    assert found["known"].rows.shape == (2, 16)
    assert found["layer"].rows.shape == (4, shape[1])


def test_all_layers_in_doubt_are_one_warning() -> None:
    layers = [nn.ReLU() for _ in range(10)]
    taps = FeatureHooks([Tap(f"layers.{i}", layer) for i, layer in enumerate(layers)])
    taps.armed = True
    x = torch.ones(2, 7, 5, 16)
    for layer in layers:  # of the first batch, which may show that they are no layers to look at
        layer(x)
    with pytest.warns(UserWarning, match=r"`layers.7` \(2, 7, 5, 16\) read as .* and 2 more\. ") as told:
        _ = [layer(x) for layer in layers]
    assert len(told) == 1
    taps.remove()
