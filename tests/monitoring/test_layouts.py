"""Fits whose layers return what is no plain matrix of numbers: a point or one warning, and the fit ends."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse import (
    CollapseMonitor,
    IntrinsicDimensionMonitor,
    PlasticityMonitor,
    SpectralAlignmentMonitor,
    WeightSpectrumMonitor,
)
from tests.toys import MemoryLogger, Toy, batches, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@dataclass
class Output:
    loss: float
    features: Tensor


class ModelOutput(dict[str, Any]):
    """What Hugging Face returns: a mapping whose items are attributes too."""


class Text:
    """An object of the user's own."""


def sequences(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.as_nested_tensor([x[:10], x[10:13], x[13:]], layout=layout)


READ = {
    "nested": lambda x: sequences(x, torch.strided),
    "jagged": lambda x: sequences(x, torch.jagged),
    "complex": lambda x: torch.complex(x, 2 * x),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "float16": lambda x: x.half(),
    "numbers": lambda x: x[:, 0],
    "tokens": lambda x: x.view(8, 4, 8),
    "transposed": lambda x: x.view(8, 4, 8).transpose(0, 1),
    "expanded": lambda x: x[:1].expand(32, 8),
    "dict": lambda x: {"ids": torch.arange(3), "hidden": (None, x)},
    "dataclass": lambda x: Output(0.5, x),
    "model output": lambda x: ModelOutput(last_hidden_state=x, loss=x.mean()),
    "tuple": lambda x: (torch.tensor(1), x, "a"),
    "infinite": lambda x: x / 0,
    "maps": lambda x: x.view(8, 8, 2, 2),
}
LEFT_OUT = {
    "nothing": lambda x: None,
    "text": lambda x: "words",
    "object": lambda x: Text(),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "integers": lambda x: x.argmax(dim=1),
    "flags": lambda x: x > 0,
    "number": lambda x: x.mean(),
    "no width": lambda x: x[:, :0],
    "nested maps": lambda x: torch.nested.as_nested_tensor([x.view(4, 2, 32)[:3], x.view(4, 2, 32)[:1]]),
    "empty": lambda x: [],
}
MAYBE = {"no rows": lambda x: x[:0], "no sequences": lambda x: x.view(8, 4, 8)[:0]}


class Odd(nn.Module):
    """A layer that computes as the others do and returns something odd beside it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.made = None
        self.make = (READ | LEFT_OUT | MAYBE)[kind]

    def forward(self, x: Tensor) -> Any:
        self.made = self.linear(x)
        return self.make(self.made.detach())


class Taker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, anything: Any) -> None:
        return None


class Odds(Toy):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.odd, self.taker = Odd(kind), Taker()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        out = self.odd(self.encoder(batch))
        self.taker(out)
        return self.head(self.odd.made).square().mean()


def run(kind: str, monitor: Any) -> tuple[dict[str, float], list[str], Odds]:
    """Last curves and warnings of ours, of a fit, and the model."""
    torch.manual_seed(0)
    model = Odds(kind)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = fit(model, [monitor], batches(4), logger=MemoryLogger())
    assert trainer.global_step == 4
    values = {key: value for _, row in trainer.logger.rows for key, value in row.items()}
    ours = [str(warning.message) for warning in told if type(monitor).__name__ in str(warning.message)]
    return values, ours, model


@pytest.mark.parametrize("layer", ["odd", "taker:input"])
@pytest.mark.parametrize("kind", [*READ, *LEFT_OUT, *MAYBE])
def test_a_point_or_one_warning(kind: str, layer: str) -> None:
    values, told, model = run(kind, CollapseMonitor(layers=["encoder", layer], every_n_steps=2))
    name = layer.replace(":", ".")
    assert values["collapse/encoder/flag"] == 0
    assert not model.odd._forward_hooks
    assert not model.taker._forward_pre_hooks
    if kind in READ:
        assert told == []
        assert values[f"collapse/{name}/n"] > 0 or kind == "infinite"
    elif kind in LEFT_OUT:
        [message] = told
        assert f"`{name}`" in message
    else:
        assert len(told) <= 1


@pytest.mark.parametrize("kind", [*READ, *LEFT_OUT, *MAYBE])
@pytest.mark.parametrize("monitor", [PlasticityMonitor, IntrinsicDimensionMonitor])
def test_other_monitors_end_as_well(kind: str, monitor: Any) -> None:
    _, told, model = run(kind, monitor(layers=["odd"], every_n_steps=2))
    assert len(told) <= 1
    assert not model.odd._forward_hooks


@pytest.mark.parametrize("kind", [*READ, *LEFT_OUT, *MAYBE])
def test_matrices_take_what_comes(kind: str) -> None:
    _, told, model = run(kind, SpectralAlignmentMonitor(every_n_steps=2))
    assert len(told) <= 1
    assert not model.taker._forward_pre_hooks
    run(kind, WeightSpectrumMonitor(every_n_steps=2))


def test_values_of_nested_tensors_are_those_of_their_tokens() -> None:
    plain, _, _ = run("dict", CollapseMonitor(layers=["odd"], every_n_steps=2))
    for kind in ("nested", "jagged"):
        values, _, _ = run(kind, CollapseMonitor(layers=["odd"], every_n_steps=2))
        assert values == pytest.approx(plain)


def test_a_scripted_child_is_left_out_by_name() -> None:
    class Scripted(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.script = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.head(self.script(self.encoder(batch))).square().mean()

    for layers in (["encoder", "script"], None):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer = fit(Scripted(), [CollapseMonitor(layers, every_n_steps=2)], batches(4), logger=MemoryLogger())
        ours = [str(warning.message) for warning in told if "CollapseMonitor" in str(warning.message)]
        assert trainer.global_step == 4
        assert len([message for message in ours if "`script`" in message]) == (layers is not None)


def test_a_fused_encoder_in_eval_mode_returns_nested_tensors() -> None:
    class Encoder(Toy):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.transformer = nn.TransformerEncoder(layer, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            padding = torch.zeros(8, 4, dtype=torch.bool)
            padding[:, 3:] = True
            self.transformer.eval()
            with torch.no_grad():
                tokens = self.transformer(batch.view(8, 4, 16), src_key_padding_mask=padding)
            return self.head(self.encoder(tokens[:, 0])).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(
            Encoder(), [CollapseMonitor(["transformer.layers.*"], every_n_steps=2)], batches(4), logger=MemoryLogger()
        )
    values = {key: value for _, row in trainer.logger.rows for key, value in row.items()}
    assert values["collapse/transformer.layers.1/n"] > 0


def test_doubt_about_an_axis_is_told_once_when_the_first_batch_changes_the_choice() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.zeros(2, 3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(1, (2, 2, 4)).repeat(1, 1, 2, 1)[:, :, :3] + self.places

    class Backwards(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.unused, self.shift = nn.Linear(24, 4), nn.Linear(4, 4), Shift()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.head(self.shift(batch).flatten(1)).pow(2).mean()

    monitor = CollapseMonitor(every_n_steps=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(Backwards(), [monitor], batches(4))
    assert len([w for w in told if "tells which axis" in str(w.message)]) == 1
