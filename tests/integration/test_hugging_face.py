"""Causal language models of Hugging Face, built from tiny configurations, watched with no argument."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_collapse import (
    AttentionEntropyMonitor,
    CollapseMonitor,
    GeometryPhaseMonitor,
    GradientMonitor,
    SpectralAlignmentMonitor,
    WeightSpectrumMonitor,
)
from lightning_collapse.monitoring import ExecutionOrder
from lightning_collapse.utilities.modules import activation_taps, classification_head, default_taps
from lightning_collapse.utilities.points import Flag
from lightning_collapse.utilities.targets import shifted_labels
from tests.toys import PointKeeper, fit, weights

transformers = pytest.importorskip("transformers", reason="Hugging Face's library is not installed")

SMALL = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "gpt-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32, **SMALL)
    ),
    "llama, grouped queries": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_key_value_heads=2, **LLAMA, **SMALL)
    ),
}


CHOICE = {  # default layers, activation functions and head
    "gpt-2": (["transformer.h.0", "transformer.h.1", "lm_head"], "transformer.h.{}.mlp.act", "lm_head.input"),
    "llama, grouped queries": (
        ["model.layers.0", "model.layers.1", "lm_head"],
        "model.layers.{}.mlp.act_fn",
        "lm_head.input",
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_choice_of_layers_and_labels(model: str) -> None:
    blocks, activation, head = CHOICE[model]
    module = MODELS[model]().eval()  # without dropout the loss is the same twice
    ids = torch.randint(1, 64, (2, 8))
    order = ExecutionOrder(module)
    order.armed = True
    module(input_ids=ids, labels=ids)
    ran = order.pop()
    assert (
        [tap.name for tap in default_taps(module, ran)] == [tap.name for tap in default_taps(module)] == [*blocks, head]
    )
    assert [tap.name for tap in activation_taps(module, ran)] == [activation.format(i) for i in range(2)]
    found = classification_head(module, ran)
    assert found is not None
    assert found.name == head
    moved = shifted_labels({"input_ids": ids, "labels": ids}, ids, module)
    logits = module(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), moved.flatten())
    torch.testing.assert_close(module(input_ids=ids, labels=ids).loss, expected)


class Causal(LightningModule):
    def __init__(self, model: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = MODELS[model]()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def run(model: str, *callbacks: Any, **kwargs: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(8, 16, dtype=torch.long)
    mask[::2, 10:] = 0
    batches = [{"input_ids": torch.randint(64, (8, 16), generator=generator), "attention_mask": mask} for _ in range(6)]
    lit = Causal(model)
    torch.manual_seed(1)
    fit(lit, callbacks, DataLoader(batches, batch_size=None), **kwargs)
    return weights(lit)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("model", MODELS)
def test_every_monitor_reads_it_and_leaves_it_as_it_is(model: str, precision: str) -> None:
    keeper = PointKeeper()
    monitors = [
        monitor(every_n_steps=2)
        for monitor in (
            *(AttentionEntropyMonitor, CollapseMonitor, GeometryPhaseMonitor),
            *(GradientMonitor, SpectralAlignmentMonitor, WeightSpectrumMonitor),
        )
    ]
    plain, watched = run(model, precision=precision), run(model, *monitors, keeper, precision=precision)
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    last = {point.key: point for point in keeper.points if point.step == 5}
    assert {key.partition("/")[0] for key in last} == {
        *("attention", "collapse", "geometry"),
        *("gradients", "spectral_alignment", "updates", "weights"),
    }
    assert last["attention/all/entropy_mean"].value == pytest.approx(1, abs=0.1)  # untrained
    assert 0 < last["spectral_alignment/all/sign_diversity"].value <= 1
    assert {point.flag for point in last.values()} <= {Flag.OK, Flag.UNCONVERGED, Flag.CONSTANT}
