"""Hooks in compiled models: one graph without a break, and what they read is what an eager model returns."""

import copy
import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor
from lightning_collapse.monitoring import graph_call
from lightning_collapse.monitoring.feature_hooks import Captured, FeatureHooks
from lightning_collapse.monitoring.graph_call import GraphCall, pack, unpack
from lightning_collapse.utilities.modules import Tap
from tests.toys import QUIET, PointKeeper, Toy, batches, fit, weights

BACKENDS = [
    ("eager", False),
    ("aot_eager", False),
    ("aot_eager", True),
    pytest.param(
        "inductor",
        False,
        marks=[
            pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
            pytest.mark.skipif(
                os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="Inductor's own code does not compile then"
            ),
        ],
    ),
]
pytestmark = [
    # of what the compiler calls in torch itself
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A backend that counts graphs and hands them on."""

    def __init__(self, backend: str = "eager") -> None:
        self.count = 0
        self._backend: Any = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return self._backend(graph, inputs)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def hooked(net: Net) -> FeatureHooks:
    taps = [Tap(f"block{i}", block) for i, block in enumerate(net.blocks)]
    return FeatureHooks([*taps, Tap("head.input", net.head, "input")])


def steps(call: Any, net: Net, hooks: FeatureHooks) -> list[dict[str, Captured]]:
    """Train for six steps with whatever changes from step to step, and return what each brought."""
    optimizer, generator = torch.optim.SGD(net.parameters(), lr=0.1), torch.Generator().manual_seed(1)
    found = []
    for step in range(6):
        hooks.armed = step in (1, 2, 4, 5)
        hooks.mask = torch.ones(4, 5).tril() if step == 2 else None
        hooks.limits = {"block1": 7} if step > 3 else {}
        call(torch.randn(4, 5, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(hooks.pop())
    return found


@pytest.mark.parametrize(("backend", "recompute"), BACKENDS)
def test_one_graph_without_a_break_reads_what_an_eager_model_returns(backend: str, recompute: bool) -> None:
    torch.manual_seed(0)
    plain, graphs = Net(recompute), Graphs(backend)
    net = copy.deepcopy(plain)
    expected = steps(plain, plain, hooked(plain))
    compiled = torch.compile(net, backend=graphs, fullgraph=True)
    hooks = hooked(net)
    found = steps(compiled, net, hooks)
    assert graphs.count == 1
    assert [set(step) for step in found] == [set(step) for step in expected]
    assert [len(step) for step in found] == [0, 4, 4, 0, 4, 4]
    for one, other in zip(found, expected, strict=True):
        for name, captured in one.items():
            assert captured.returned == other[name].returned == 20
            assert torch.equal(captured.mask, other[name].mask)
            torch.testing.assert_close(captured.rows, other[name].rows, rtol=1e-5, atol=1e-6)
    hooks.armed = True
    with torch.no_grad():
        compiled(torch.zeros(4, 5, 8))
    hooks.remove()
    compiled(torch.zeros(4, 5, 8))
    assert hooks.pop() == {}


def test_rows_outlive_the_memory_of_the_graph() -> None:
    net = Net()
    hooks = hooked(net)
    compiled = torch.compile(net, backend="aot_eager")
    hooks.armed = True
    with torch.no_grad():
        compiled(torch.ones(4, 5, 8))
        first = hooks.pop()["block0"].rows.clone()
        hooks.armed = True
        compiled(torch.ones(4, 5, 8))
        kept = hooks.pop()["block0"].rows
        hooks.armed = False
        compiled(torch.zeros(4, 5, 8))
    assert torch.equal(kept, first)


@pytest.mark.parametrize("watched", [range(6), (0, 4)], ids=["all", "some"])
def test_blocks_compiled_one_by_one_are_told_apart(watched: Any) -> None:
    blocks = nn.ModuleList(Block(4) for _ in range(6))
    hooks = FeatureHooks([Tap(str(i), blocks[i]) for i in watched])
    for block in blocks:
        block.compile(backend="eager", fullgraph=True)
    for _ in range(3):
        hooks.armed, x, expected = True, torch.randn(3, 4), {}
        for i, block in enumerate(blocks):
            x = block(x)
            expected[str(i)] = x
        found = hooks.pop()
        assert set(found) == {str(i) for i in watched}
        assert all(torch.equal(captured.rows, expected[name]) for name, captured in found.items())


def test_two_models_and_two_owners() -> None:
    nets = [Net(), Net()]
    owners = [[hooked(net), hooked(net)] for net in nets]
    compiled = [torch.compile(net, backend="eager", fullgraph=True) for net in nets]
    owners[0][1].armed = True
    for net in compiled:
        net(torch.ones(4, 5, 8))
    assert [[len(hooks.pop()) for hooks in own] for own in owners] == [[0, 4], [0, 0]]
    owners[0][1].remove()
    owners[1][0].armed = True
    for net in compiled:
        net(torch.ones(4, 5, 8))
    assert [[len(hooks.pop()) for hooks in own] for own in owners] == [[0, 0], [4, 0]]


def test_copies_of_a_compiled_model_are_not_heard() -> None:
    net = Net()
    hooks = hooked(net)
    compiled = torch.compile(net, backend="eager")
    compiled(torch.ones(4, 5, 8))
    copies = copy.deepcopy(compiled), torch.compile(copy.deepcopy(net), backend="eager")
    hooks.armed = True
    for other in copies:
        other(torch.ones(4, 5, 8))
    assert hooks.pop() == {}


def test_odd_outputs_are_told_at_the_first_armed_step() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"ids": x.argmax(dim=1), "more": (None, 3)}

    odd = Odd()
    hooks = FeatureHooks([Tap("odd", odd)])
    compiled = torch.compile(odd, backend="eager", fullgraph=True)
    compiled(torch.ones(3, 2))
    hooks.armed = True
    with pytest.warns(UserWarning, match="reading layer `odd` failed with NoFeaturesError"):
        compiled(torch.ones(3, 2))


def test_what_fails_in_a_graph_is_told_and_the_graph_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    hooks = hooked(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    hooks.limits = {"block0": "three"}  # type: ignore[dict-item]
    hooks.armed = True
    with pytest.warns(UserWarning, match="reading layer `block0` failed"):
        compiled(torch.ones(4, 5, 8))
    assert set(hooks.pop()) == {"block1", "block2", "head.input"}


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.5 does not tell what is exported")
def test_exported_programs_do_not_see_hooks() -> None:
    net = Net()
    hooks = hooked(net)
    hooks.armed = True
    program = torch.export.export(net, (torch.ones(4, 5, 8),))
    assert not any("lightning_collapse" in str(node.target) for node in program.graph.nodes)


def test_the_operator_survives_another_import() -> None:
    old = graph_call.GraphCall
    name = graph_call.__name__
    module = sys.modules.pop(name)
    try:
        new = importlib.import_module(name).GraphCall
    finally:
        sys.modules[name] = module
    seen: list[str] = []
    calls = [kind(lambda tensors, note: seen.append(note)) for kind in (old, new)]
    for call, note in zip(calls, ("old", "new"), strict=True):
        call([torch.ones(1)], note)
    assert seen == ["old", "new"]


def test_calls_of_what_is_gone_do_nothing() -> None:
    call = GraphCall(lambda tensors, note: None)
    token = call.token
    del call
    graph_call._OPERATOR([torch.ones(1)], "", token)


def test_values_are_written_down_and_found_again() -> None:
    x, y, tensors = torch.ones(2), torch.zeros(3), []
    value = (x, [y, None], {"causal": True, "kind": "a'b\"c", "deep": ({"x": x},)}, ())
    note = pack((*value, 3.5, object()), tensors)
    (a, [b, none], mapping, empty, *rest) = unpack(note, tensors)
    assert torch.equal(a, x)
    assert torch.equal(b, y)
    assert (none, empty, rest) == (None, (), [None, None])
    assert (mapping["causal"], mapping["kind"]) == (True, "a'b\"c")
    assert torch.equal(mapping["deep"][0]["x"], x)


def read_both(module: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys of a toy attention of one head."""
    [x] = args
    return module.q(x).unsqueeze(1), module.k(x).unsqueeze(1)


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.q(x) @ self.k(x).mT).softmax(dim=-1) @ x


class Compiled(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.attend(self.encoder(batch.view(8, 4, 16)))).square().mean()


def watch() -> list[Any]:
    return [
        CollapseMonitor(layers=["encoder", "attend", "head:input"], every_n_steps=2),
        CollapseMonitor(layers=["attend.q", "encoder.*"], every_n_steps=3),
        PlasticityMonitor(layers=["encoder.1"], every_n_steps=2),
        SpectralAlignmentMonitor(every_n_steps=2),
        AttentionEntropyMonitor(layers={"attend": read_both}, every_n_steps=2),
    ]


@pytest.mark.parametrize("place", ["whole", "part"])
def test_monitors_leave_a_compiled_model_its_graphs_and_read_the_same(place: str) -> None:
    def run(callbacks: list[Any], backend: Any) -> Any:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Compiled()
        if backend is None:
            return model, fit(model, callbacks, batches(12))
        if place == "whole":
            return model, fit(torch.compile(model, backend=backend), callbacks, batches(12))
        model.encoder = torch.compile(model.encoder, backend=backend)
        model.attend.compile(backend=backend, fullgraph=True)
        return model, fit(model, callbacks, batches(12))

    alone, watched = Graphs(), Graphs()
    plain, _ = run([], alone)
    model, trainer = run(watch(), watched)
    assert watched.count == alone.count
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(model).items())
    _, eager = run(watch(), None)
    expected = {step: row for step, row in eager.logger.rows if "collapse/attend.q/n" in row}
    found = {step: row for step, row in trainer.logger.rows if "collapse/attend.q/n" in row}
    assert found.keys() == expected.keys()
    for step, row in expected.items():
        assert found[step].keys() == row.keys()
        for key, value in row.items():
            assert found[step][key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), key
    assert any(key.startswith("attention/attend/") for row in found.values() for key in row)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x


class Validated(LightningModule):
    """Compiled, and keeps what it returns in validation."""

    def __init__(self, in_place: bool, rows: list[Tensor]) -> None:
        super().__init__()
        self.encoder: Any = Encoder()
        self.in_place, self.rows, self.graphs = in_place, rows, Graphs()
        self.seen: list[Tensor] = []

    def configure_model(self) -> None:
        if self.in_place:
            self.encoder.compile(backend=self.graphs)
        else:
            self.encoder = torch.compile(self.encoder, backend=self.graphs)

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(self.rows[:1], batch_size=None)  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.encoder(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.encoder(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("in_place", [True, False])
def test_validations_of_compiled_transformers_round_as_without_monitors(in_place: bool) -> None:
    """In evaluation mode torch takes another way through them as soon as anybody listens."""
    rows = [torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def run(*callbacks: Any) -> Validated:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Validated(in_place, rows)
        options = {**QUIET, "max_epochs": 2, "val_check_interval": 2, "limit_val_batches": 1, "logger": False}
        Trainer(**options, callbacks=list(callbacks)).fit(model)
        return model

    keeper = PointKeeper()
    plain, watched = run(), run(CollapseMonitor(layers=["*linear1"], every_n_steps=1), keeper)
    assert watched.graphs.count == plain.graphs.count > 0
    assert all(torch.equal(one, other) for one, other in zip(plain.seen, watched.seen, strict=True))
    assert [point.step for point in keeper.points if point.measure == "n"] == list(range(8))
