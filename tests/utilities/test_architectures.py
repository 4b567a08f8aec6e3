"""Which layers are chosen in architectures whose modules are not registered in the order in which they run."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.monitoring.execution_order import ExecutionOrder
from lightning_collapse.utilities.modules import activation_taps, classification_head, default_taps


def names(model: nn.Module, *inputs: Any, choose: Callable[..., Any] = default_taps) -> list[str]:
    """Of the taps that are chosen after a first batch of these inputs, by registration if there are none."""
    if not inputs:
        return [tap.name for tap in choose(model)]
    order = ExecutionOrder(model)
    order.armed = True
    model(*inputs)
    return [tap.name for tap in choose(model, order.pop())]


class ConvBlock(nn.Module):
    def __init__(self, i: int, o: int, time: int = 0) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, o) if time else None

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        x = self.conv1(x).relu()
        if self.time_emb_proj is not None:
            x = x + self.time_emb_proj(t)[:, :, None, None]
        return self.conv2(x).relu()


class UNet(nn.Module):
    """Registered as in ``diffusers``: what embeds time and the way up come before the middle."""

    def __init__(self, time_name: str = "time_embedding") -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.time_name = time_name
        setattr(self, time_name, nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 16)))
        self.down_blocks = nn.ModuleList([ConvBlock(4, 8, 16), ConvBlock(8, 8, 16)])
        self.up_blocks = nn.ModuleList([ConvBlock(16, 8, 16), ConvBlock(12, 4, 16)])
        self.mid_block = ConvBlock(8, 8, 16)
        self.conv_out = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = getattr(self, self.time_name)(t)
        x = self.conv_in(x)
        skips = []
        for block in self.down_blocks:
            skips.append(x := nn.functional.avg_pool2d(block(x, t), 2) if skips else block(x, t))
        x = nn.functional.interpolate(self.mid_block(x, t), scale_factor=1.0)
        x = self.up_blocks[0](torch.cat([x, skips[1]], 1), t)
        x = self.up_blocks[1](
            torch.cat([nn.functional.interpolate(x, size=skips[0].shape[-2:]), skips[0][:, :4]], 1), t
        )
        return self.conv_out(x)


NOISED = torch.randn(2, 3, 8, 8), torch.randn(2, 6)


@pytest.mark.parametrize("time_name", ["time_embedding", "time_mlp", "temb", "anything"])
def test_unet(time_name: str) -> None:
    model = UNet(time_name)
    down, up = ["down_blocks.0", "down_blocks.1"], ["up_blocks.0", "up_blocks.1"]
    assert names(model, *NOISED) == ["conv_in", *down, "mid_block", *up, "conv_out"]
    order = ExecutionOrder(model)
    order.armed = True
    model(*NOISED)
    assert classification_head(model, order.pop()) is None
    if time_name != "anything":
        assert names(model) == ["conv_in", *down, *up, "mid_block", "conv_out"]
        assert classification_head(model) is None


def test_long_stacks_share_the_places() -> None:
    stacks = {name: nn.ModuleList([ConvBlock(4, 4) for _ in range(16)]) for name in ("encoder", "decoder")}
    found = names(nn.ModuleDict(stacks))
    assert {name: sum(tap.startswith(name) for tap in found) for name in stacks} == {"encoder": 5, "decoder": 6}


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


class MLP(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.net = mlp(*widths)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BYOL(nn.Module):
    """Three networks of one class, and a target whose weights are not even frozen."""

    def __init__(self, network: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.online, self.predictor = network(), MLP(6, 12, 6)
        self.target = deepcopy(self.online)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.target(y)
        return (self.predictor(self.online(x)) - wanted).square().mean()


ONLINE = ["online.net.0", "online.net.3", "online.net.6"]
PREDICTOR = ["predictor.net.0", "predictor.net.3", "predictor.net.3.input"]


def test_byol() -> None:
    model = BYOL(lambda: MLP(8, 12, 12, 6))
    found = names(model, torch.randn(4, 8), torch.randn(4, 8))
    assert [name for name in found if not name.startswith("target")] == ONLINE + PREDICTOR
    assert (
        names(model, torch.randn(4, 8), torch.randn(4, 8), choose=lambda *a: [classification_head(*a)])
        == PREDICTOR[-1:]
    )
    assert not {"online", "predictor", "target"} & {*found, *names(model)}


def test_networks_in_one_sequential_are_looked_into() -> None:
    encoder = nn.Module()
    encoder.stem = MLP(8, 8)
    encoder.stages = nn.Sequential(*[nn.Sequential(MLP(8, 8, 8), MLP(8, 8, 8)) for _ in range(3)])
    found = names(nn.Sequential(encoder, MLP(8, 16, 6), MLP(6, 12, 6)))
    assert found[:4] == ["0.stem.net.0", "0.stages.0", "0.stages.1", "0.stages.2"]
    assert not {"0", "1", "2"} & set(found)


class Adapted(nn.Module):
    """A frozen layer and a low-rank update of it, as in ``peft``."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class OwnAdapted(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.linear = base.requires_grad_(False)
        self.lora_down, self.lora_up = nn.Linear(base.in_features, rank), nn.Linear(rank, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora_up(self.lora_down(x))


class Block(nn.Module):
    def __init__(self, d: int = 8, wrap: Callable[[nn.Linear], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        self.q_proj, self.v_proj = wrap(nn.Linear(d, d)), wrap(nn.Linear(d, d))
        self.fc1, self.act, self.fc2 = nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.v_proj(x) * self.q_proj(x).softmax(-1)
        return x + self.fc2(self.act(self.fc1(x)))


class LM(nn.Module):
    """Everything is frozen but for the adapters in its blocks."""

    def __init__(self, wrap: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.lm_head = nn.Linear(8, 64, bias=False)
        self.requires_grad_(False)
        for block in self.layers:
            block.q_proj, block.v_proj = wrap(block.q_proj), wrap(block.v_proj)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.lm_head(x)


@pytest.mark.parametrize("wrap", [Adapted, OwnAdapted])
def test_adapters_are_no_layers_and_a_frozen_vocabulary_is_the_head(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    model, ids = LM(wrap), torch.randint(64, (2, 5))
    for found in (names(model), names(model, ids)):
        assert found == ["layers.0", "layers.1", "layers.2", "lm_head.input"]
    head = classification_head(model)
    assert head is not None
    assert head.module is model.lm_head


def test_an_adapted_layer_can_be_the_head() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Adapted(nn.Linear(8, 4)))
    for found in (names(model), names(model, torch.randn(3, 8))):
        assert found[-2:] == ["2", "2.input"]


def test_a_layer_called_base_is_no_adapter() -> None:
    model = nn.Module()
    model.base_layer, model.level1, model.level2 = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    assert names(model) == ["base_layer", "level1", "level2", "level2.input"]


def test_a_model_whose_name_says_lora_is_no_adapter() -> None:
    model = nn.ModuleDict({"lora_encoder": mlp(8, 8, 8, 8), "head": nn.Linear(8, 2)})
    assert names(model)[:3] == ["lora_encoder.0", "lora_encoder.3", "lora_encoder.6"]


class Detector(nn.Module):
    """Heads are registered before the network they stand on."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.box_head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.neck = nn.ModuleList([nn.Conv2d(32, 8, 1), nn.Conv2d(32, 8, 1), nn.Conv2d(32, 8, 1)])
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3))
        self.stages = nn.Sequential(*[ConvBlock(32, 32) for _ in range(12)])
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stages(self.stem(x))
        maps = torch.stack([level(x) for level in self.neck]).mean(0).flatten(2).mean(2)
        return [self.cls_head(maps), self.box_head(maps)]


def test_detector() -> None:
    found = names(Detector(), torch.randn(2, 3, 16, 16))
    assert found[0] == "stem"
    stages = [int(name.split(".")[1]) for name in found if name.startswith("stages.")]
    assert (stages[0], stages[-1]) == (0, 11)
    assert len(stages) >= 6  # the network, not its heads
    assert found[-4:] == ["neck.2", "cls_head.4", "box_head.4", "box_head.4.input"]
    assert "unused" not in found


class Staged(nn.Module):
    """Stages in which a downsampling layer and blocks take turns, registered apart, and a stem of three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.stages = nn.ModuleList([nn.Sequential(ConvBlock(4, 4), ConvBlock(4, 4)) for _ in range(3)])
        self.downs = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for down, stage in zip(self.downs, self.stages, strict=True):
            x = stage(down(x))
        return self.head(x.flatten(2).mean(2))


def test_stem_and_stages() -> None:
    turns = [f"{part}.{i}" for i in range(3) for part in ("downs", "stages")]
    assert names(Staged(), torch.randn(2, 3, 12, 12)) == ["stem", *turns, "head", "head.input"]
    net = nn.ModuleDict({"stem": Staged().stem, "layers": nn.Sequential(*[ConvBlock(4, 4) for _ in range(5)])})
    assert names(net) == ["stem", *[f"layers.{i}" for i in range(5)]]


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, 3)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.decoder = nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor, decode: bool = False) -> Any:
        for block in self.layers:
            x = block(x)
        logits = self.classifier(x.mean(1))
        return (logits, self.decoder(x.mT)) if decode else logits


def test_the_head_is_what_runs_last() -> None:
    model, tokens = HeadFirst(), torch.randn(2, 5, 8)
    expected = ["layers.0", "layers.1", "layers.2", "classifier", "classifier.input"]
    assert names(model, tokens) == expected
    assert names(model, tokens, True) == [*expected[:-1], "decoder", expected[-1]]


def test_order_as_plain_names() -> None:
    model = HeadFirst()
    order = ["layers.0", "layers.0.fc2", "layers.1", "layers.1.fc2", "classifier"]
    assert [tap.name for tap in default_taps(model, order)] == [
        "layers.0",
        "layers.1",
        "classifier",
        "classifier.input",
    ]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.fc2(nn.functional.relu(self.fc1(x))))


def test_activation_taps() -> None:
    act = {"choose": activation_taps}
    assert (
        names(LM(Adapted), **act)
        == names(LM(Adapted), torch.randint(64, (2, 5)), **act)
        == [f"layers.{i}.act" for i in range(3)]
    )
    assert names(BYOL(lambda: MLP(8, 12, 12, 6)), *[torch.randn(4, 8)] * 2, **act) == [
        *["online.net.2", "online.net.5", "predictor.net.2"]
    ]
    assert names(UNet(), *NOISED, **act) == []
    assert names(Functional(), **act)[0] == "fc2.input"
    deep = names(nn.Sequential(*[Block() for _ in range(30)]), **act)
    assert len(deep) == 12
    assert (deep[0], deep[-1]) == ("0.act", "29.act")
