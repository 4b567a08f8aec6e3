"""Without Lightning's trainer: what the examples of Fabric and Hugging Face find in a collapsing and a healthy run."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples import fabric_loop
from lightning_collapse.losses import VICReg
from tests.toys import weights


class Held(fabric_loop.Pulled):
    """The same, and held apart."""

    def forward(self, images: Tensor) -> Tensor:
        views = self.encoder(torch.cat([images, images]) + 0.1 * torch.randn(2 * len(images), 64))
        return VICReg()(*views.chunk(2))


def test_fabric_loop(capsys: pytest.CaptureFixture[str]) -> None:
    fabric_loop.main(60)
    assert "Complete collapse since step" in capsys.readouterr().out
    torch.manual_seed(0)
    assert fabric_loop.train(Held(), 60) == []


@pytest.mark.filterwarnings("ignore")  # of transformers and accelerate
def test_hugging_face_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    example = importlib.import_module("examples.hugging_face_trainer")

    class Held(example.Pulled):
        def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
            views = torch.cat([pixel_values, pixel_values]) + 0.1 * torch.randn(2 * len(pixel_values), 1, 8, 8)
            return {"loss": VICReg()(*self.projector(self.encoder(views).last_hidden_state.mean(dim=1)).chunk(2))}

    def run(make: type[nn.Module], *callbacks: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = make()
        example.train(model, 40, *callbacks)
        return weights(model)

    callback, healthy = example.CollapseCallback(), example.CollapseCallback()
    watched, plain = run(example.Pulled, callback), run(example.Pulled)
    assert all(torch.equal(value, plain[name]) for name, value in watched.items())
    assert [verdict.kind for verdict in callback.judge.verdicts] == ["complete_collapse"]
    assert "Complete collapse since step" in capsys.readouterr().out
    run(Held, healthy)
    assert healthy.judge.verdicts == []
    assert healthy.judge.coverage.points == 4
