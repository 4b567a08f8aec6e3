"""Compiled code that breaks into several graphs: what runs between them is run as it is written."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_collapse import RouterMonitor
from lightning_collapse.monitoring.feature_hooks import FeatureHooks
from lightning_collapse.monitoring.function_calls import FUNCTION_CALLS
from lightning_collapse.utilities.gradients import follow_gradient
from lightning_collapse.utilities.modules import Tap
from lightning_collapse.utilities.skippable_step import SkippableStep
from tests.toys import PointKeeper, batches, fit, weights

pytestmark = [
    # of what the compiler calls in torch itself
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Recurrent(LightningModule):
    """Recurrent layers, which break every graph, and a router behind them."""

    def __init__(self):
        super().__init__()
        self.cells, self.router = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        scores = self.router(self.cells(batch.unflatten(1, (4, 4)))[0][:, -1])
        return scores.softmax(dim=-1).topk(2).values.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(callbacks=()):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Recurrent()
    fit(torch.compile(model, backend="eager"), callbacks, batches(3))
    return weights(model)


def test_a_watched_fit_of_recurrent_layers_goes_as_a_bare_one():
    keeper = PointKeeper()
    watched = trained([RouterMonitor(layers=["router"], every_n_steps=1), keeper])
    assert all(torch.equal(value, watched[name]) for name, value in trained().items())
    assert len(keeper.curve("router/router/load_cv2")) == 3


class Heard:
    """Names of the functions that it is shown, and whether the compiler looks on."""

    def __init__(self):
        self.names, self.compiled = set(), set()

    def note(self, func, args, kwargs, output):
        self.names.add(func.__name__)
        self.compiled.add(torch.compiler.is_compiling())

    def fail(self, error):
        raise error


def test_functions_that_are_called_between_graphs_are_heard():
    heard, cells, x = Heard(), nn.GRU(4, 8), torch.ones(3, 2, 4)
    FUNCTION_CALLS.add(heard)
    try:
        output = torch.compile(lambda x: cells(x)[0].sin(), backend="eager")(x)
    finally:
        FUNCTION_CALLS.remove(heard)
    assert torch.equal(output, cells(x)[0].sin())
    assert {"zeros", "gru"} <= heard.names
    assert heard.compiled == {False}


def test_one_graph_stays_one_while_functions_are_listened_to():
    heard, layer = Heard(), nn.Linear(4, 2)
    FUNCTION_CALLS.add(heard)
    try:
        output = torch.compile(lambda x: layer(x).to(x.dtype).softmax(dim=-1), backend="eager", fullgraph=True)
        assert output(torch.ones(3, 4)).shape == (3, 2)
    finally:
        FUNCTION_CALLS.remove(heard)


class Still(torch.optim.Optimizer):
    """Leaves weights as they are."""

    def step(self, closure=None):
        return None


def test_neither_gradients_nor_updates_are_read_by_compiled_code():
    layer, compiled = nn.Linear(4, 2), []
    optimizer = Still(layer.parameters(), {})

    def note(*_):
        compiled.append(torch.compiler.is_compiling())

    def step(x):
        output = layer(x)
        torch.compiler.disable(follow_gradient)(output, note)
        output.sum().backward()
        optimizer.step()

    skippable = SkippableStep(optimizer, note)
    torch.compile(step, backend="eager")(torch.ones(3, 4))
    skippable.remove()
    assert compiled == [False, False]


class Scaled(nn.Module):
    """A layer by whose gain its output is multiplied."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.layer(x) * self.gain


def test_a_transform_of_compiled_layers_goes_on_with_hooks_in_them():
    """It has nothing compiled anew, but for what else it calls."""
    model, x = Scaled(), torch.ones(3, 4)
    expected = torch.func.jacrev(model)(x)
    hooks = FeatureHooks([Tap("layer", model.layer), Tap("", model)])
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert torch.equal(torch.func.jacrev(compiled)(x), expected)
    hooks.remove()


def test_hooks_beside_compiled_code_make_no_graph_of_their_own():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    layer = nn.Linear(4, 4)
    layer.compile(backend=backend)
    hooks = FeatureHooks([Tap("layer", layer)])
    hooks.armed = True
    layer(torch.ones(3, 4))
    assert hooks.pop()["layer"].rows.shape == (3, 4)
    assert len(graphs) == 1
    hooks.remove()
