"""Labels at the places of the outputs that predict them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.utilities.targets import shifted_labels

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
MOVED = torch.tensor([[6, 7, 8, -100], [8, 7, 6, -100]])
ANSWER = torch.tensor([[-100, -100, 7, 8], [-100, 8, 7, 6]])
NEXT = torch.tensor([[6, 7, 8, 1], [8, 7, 6, 1]])
OTHER = torch.tensor([[1, 1, 2, 2], [0, 1, 0, 1]])


def model(name: str, **config: Any) -> nn.Module:
    """A module around one of that class name and configuration."""
    inner = type(name, (nn.Linear,), {})(2, 2)
    if name != "Own":
        inner.config = SimpleNamespace(model_type="x", **config)
    return nn.ModuleDict({"model": inner})


CAUSAL, OWN = model("LlamaForCausalLM", is_encoder_decoder=False), model("Own")
CASES = {
    "causal": (CAUSAL, IDS, MOVED),
    "causal, of the answer alone": (CAUSAL, ANSWER, torch.tensor([[-100, 7, 8, -100], [8, 7, 6, -100]])),
    "causal, moved by the loader": (CAUSAL, NEXT, NEXT),
    "decoder": (model("BertLMHeadModel", is_decoder=True), IDS, MOVED),
    "image and text": (model("LlavaForConditionalGeneration", is_encoder_decoder=False), IDS, MOVED),
    "own": (OWN, IDS, MOVED),
    "own, moved by the loader": (OWN, NEXT, NEXT),
    "own, tags": (OWN, OTHER, OTHER),
    "tags": (model("BertForTokenClassification"), OTHER, OTHER),
    "encoder and decoder": (model("T5ForConditionalGeneration", is_encoder_decoder=True), IDS, IDS),
    "masked": (model("BertForMaskedLM"), IDS, IDS),
    "nothing counts": (OWN, torch.full_like(IDS, -100), torch.full_like(IDS, -100)),
}


@pytest.mark.parametrize("case", CASES)
def test_of_a_batch_with_its_inputs(case: str) -> None:
    module, labels, expected = CASES[case]
    for batch in ({"input_ids": IDS, "labels": labels}, (IDS, labels)):
        before = labels.clone()
        assert torch.equal(shifted_labels(batch, labels, module), expected)
        assert torch.equal(labels, before)


@pytest.mark.parametrize(("module", "expected"), [(CAUSAL, MOVED), (OWN, IDS)], ids=["causal", "own"])
def test_of_a_batch_without_ids(module: nn.Module, expected: Tensor) -> None:
    for batch in ({"inputs_embeds": torch.zeros(2, 4, 8)}, {"labels": IDS}, (torch.zeros(2, 4, 8), IDS)):
        assert torch.equal(shifted_labels(batch, IDS, module), expected)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 1]), torch.zeros(2, 4), torch.zeros(2, 1).long(), torch.zeros(1).long()]
)
def test_what_is_no_sequence_of_classes_stays(labels: Tensor) -> None:
    assert shifted_labels({"input_ids": IDS}, labels, CAUSAL) is labels
