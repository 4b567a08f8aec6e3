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
    OutputMonitor,
    RouterMonitor,
    SpectralAlignmentMonitor,
    WeightSpectrumMonitor,
)
from lightning_collapse.monitoring import ExecutionOrder
from lightning_collapse.utilities.modules import activation_taps, classification_head, default_taps
from lightning_collapse.utilities.points import Flag
from lightning_collapse.utilities.routers import find_routers
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


MIXTURES: dict[str, Any] = {
    "Mixtral": {"num_local_experts": 6},
    "Qwen2Moe": {"num_experts": 6, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 16, "head_dim": 8},
    "Olmoe": {"num_experts": 6},
    "Phimoe": {"num_local_experts": 6},
    "DeepseekV3": {
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_are_read_as_the_model_chooses(family: str) -> None:
    config = {"num_key_value_heads": 2, "num_experts_per_tok": 2, **LLAMA, **SMALL, **MIXTURES[family]}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config))

    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.chosen = model, []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    lit, keeper = Lit(), PointKeeper()
    router = find_routers(lit)[0]
    chosen: list[Tensor] = []
    router.module.register_forward_hook(lambda module, args, output: chosen.append(output[-1].detach()))
    ids = torch.randint(1, 64, (8, 8), generator=torch.Generator().manual_seed(0))
    fit(lit, [RouterMonitor(every_n_steps=1), keeper], DataLoader(ids, batch_size=8), max_steps=1)
    assert [point.value for point in keeper.curve(f"router/{router.name}/experts_per_token")] == [2]
    counts = torch.bincount(chosen[0].flatten(), minlength=6).double()
    [found] = keeper.curve(f"router/{router.name}/load_cv2")
    assert found.n == 64
    assert found.value == pytest.approx((counts.var(correction=0) / counts.mean() ** 2).item(), rel=1e-9)


def test_a_lens_through_a_language_model_ends_in_its_loss() -> None:
    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = MODELS["llama, grouped queries"]()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
            return self.loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    ids = torch.randint(1, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    lit, keeper = Lit(), PointKeeper()
    loader = DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)
    fit(lit, [OutputMonitor(every_n_steps=1, lens=["model.model.layers.*"]), keeper], loader)
    [found] = keeper.curve("lens/model.model.norm.input/cross_entropy")
    assert found.value == pytest.approx(lit.loss.item(), rel=1e-5)
    assert len(keeper.curve("lens/model.model.layers.1/entropy")) == 1
