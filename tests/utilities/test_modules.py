"""Which layers are chosen, and what they are called."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils import parametrizations

from lightning_collapse.utilities.module_tree import has_weight, weighted_layers
from lightning_collapse.utilities.modules import (
    MAX_DEFAULT_LAYERS,
    Tap,
    clean_name,
    curve_name,
    default_taps,
    find_modules,
    find_taps,
    in_backward,
    is_channels_first,
    is_compiled,
)

Linear = nn.Linear


class Net(nn.Module):
    """A module with these children."""

    def __init__(self, /, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Lit(LightningModule):
    def __init__(self, /, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [Linear(i, o), *([nn.BatchNorm1d(o)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers[: -2 if norm else -1])


class BasicBlock(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3), nn.BatchNorm2d(o)
        self.downsample = nn.Sequential(nn.Conv2d(i, o, 1), nn.BatchNorm2d(o)) if i != o else None


def resnet() -> Net:
    widths = [4, 4, 8, 16, 32]
    stages = {
        f"layer{k}": nn.Sequential(BasicBlock(widths[k - 1], widths[k]), BasicBlock(widths[k], widths[k]))
        for k in range(1, 5)
    }
    return Net(
        conv1=nn.Conv2d(3, 4, 7), bn1=nn.BatchNorm2d(4), **stages, avgpool=nn.AdaptiveAvgPool2d(1), fc=Linear(32, 10)
    )


class Block(nn.Module):
    """Of a transformer."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Net(qkv=Linear(d, 3 * d), proj=Linear(d, d))
        self.mlp = Net(fc1=Linear(d, 4 * d), fc2=Linear(4 * d, d))


class ViT(nn.Module):
    def __init__(self, depth: int, d: int = 4) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, d))
        self.patch_embed = Net(proj=nn.Conv2d(3, d, 4, 4))
        self.blocks = nn.Sequential(*[Block(d) for _ in range(depth)])
        self.norm = nn.LayerNorm(d)
        self.head = Linear(d, 3)


class BertLayer(nn.Module):
    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.attention = Net(
            self=Net(query=Linear(d, d), key=Linear(d, d), value=Linear(d, d)),
            output=Net(dense=Linear(d, d), LayerNorm=nn.LayerNorm(d)),
        )
        self.intermediate = Net(dense=Linear(d, 4 * d))
        self.output = Net(dense=Linear(4 * d, d), LayerNorm=nn.LayerNorm(d))


def bert(depth: int) -> Net:
    embeddings = Net(word_embeddings=nn.Embedding(9, 4), position_embeddings=nn.Embedding(9, 4), norm=nn.LayerNorm(4))
    encoder = Net(layer=nn.ModuleList([BertLayer() for _ in range(depth)]))
    backbone = Net(embeddings=embeddings, encoder=encoder, pooler=Net(dense=Linear(4, 4), activation=nn.Tanh()))
    return Net(bert=backbone, dropout=nn.Dropout(), classifier=Linear(4, 2))


class Conv1D(nn.Module):
    """GPT-2's transposed linear layer."""

    def __init__(self, o: int, i: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(i, o)), nn.Parameter(torch.zeros(o))


class GPTBlock(nn.Module):
    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Net(c_attn=Conv1D(3 * d, d), c_proj=Conv1D(d, d))
        self.mlp = Net(c_fc=Conv1D(4 * d, d), c_proj=Conv1D(d, 4 * d))


def gpt2(depth: int) -> Net:
    trunk = Net(wte=nn.Embedding(9, 4), wpe=nn.Embedding(9, 4), h=nn.ModuleList([GPTBlock() for _ in range(depth)]))
    model = Net(transformer=trunk, lm_head=Linear(4, 9, bias=False))
    model.lm_head.weight = trunk.wte.weight  # tied
    return model


class RawParameter(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.zeros(5, 4))
        self.net = mlp(4, 4, 4, 4)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def names(model: nn.Module) -> list[str]:
    return [tap.name for tap in default_taps(model)]


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


STAGES = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc", "fc.input"]
DEFAULTS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mlp": (lambda: mlp(8, 6, 6, 4), ["0", "2", "4", "4.input"]),
    "small mlp": (lambda: mlp(8, 6, 4), ["0", "2", "2.input"]),
    "lightning mlp": (lambda: Lit(net=mlp(8, 6, 6, 4)), ["net.0", "net.2", "net.4", "net.4.input"]),
    "encoder and head": (
        lambda: Lit(encoder=mlp(8, 6, 6, 4), head=Linear(4, 2)),
        ["encoder.0", "encoder.2", "encoder.4", "head", "head.input"],
    ),
    "resnet": (resnet, STAGES),
    "lightning resnet": (lambda: Lit(model=resnet()), [f"model.{name}" for name in STAGES]),
    "vgg": (
        lambda: Net(
            features=nn.Sequential(*[m for _ in range(3) for m in (nn.Conv2d(3, 3, 3), nn.ReLU(), nn.MaxPool2d(2))]),
            avgpool=nn.AdaptiveAvgPool2d(7),
            classifier=nn.Sequential(Linear(3, 9), nn.ReLU(), nn.Dropout(), Linear(9, 9), nn.ReLU(), Linear(9, 3)),
        ),
        [
            "features.0",
            "features.3",
            "features.6",
            "classifier.0",
            "classifier.3",
            "classifier.5",
            "classifier.5.input",
        ],
    ),
    "vit": (
        lambda: ViT(4),
        ["patch_embed.proj", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head", "head.input"],
    ),
    "bert": (
        lambda: bert(3),
        [*[f"bert.encoder.layer.{i}" for i in range(3)], "bert.pooler.dense", "classifier", "classifier.input"],
    ),
    "gpt-2": (lambda: gpt2(3), [*[f"transformer.h.{i}" for i in range(3)], "lm_head", "lm_head.input"]),
    "transformer encoder": (
        lambda: Net(
            emb=nn.Embedding(5, 4),
            enc=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 3, enable_nested_tensor=False),
            out=Linear(4, 5),
        ),
        ["enc.layers.0", "enc.layers.1", "enc.layers.2", "out", "out.input"],
    ),
    "simsiam": (
        lambda: Lit(encoder=resnet(), projector=mlp(32, 8, 4, norm=True), predictor=mlp(4, 2, 4, norm=True)),
        [
            *[f"encoder.{name}" for name in STAGES[:-1]],
            *["projector.0", "projector.3", "predictor.0", "predictor.3", "predictor.3.input"],
        ],
    ),
    "lstm": (lambda: Net(emb=nn.Embedding(5, 4), lstm=nn.LSTM(4, 4, 2), fc=Linear(4, 5)), ["lstm", "fc", "fc.input"]),
    "attention": (lambda: Net(attn=nn.MultiheadAttention(4, 2), fc=Linear(4, 2)), ["attn", "fc", "fc.input"]),
    "single linear": (lambda: Lit(layer=Linear(3, 4)), ["layer", "layer.input"]),
    "weight norm": (
        lambda: nn.Sequential(*[parametrizations.weight_norm(Linear(4, 4)) for _ in range(3)]),
        ["0", "1", "2", "2.input"],
    ),
    "spectral norm": (
        lambda: Net(body=nn.Sequential(*[parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)) for _ in range(3)])),
        ["body.0", "body.1", "body.2"],
    ),
    "frozen": (lambda: frozen(resnet()), STAGES),
    "raw parameter at the root": (RawParameter, ["net.0", "net.2", "net.4", "net.4.input"]),
    "shared layer": (
        lambda: (lambda s: nn.Sequential(s, nn.ReLU(), s, nn.ReLU(), Linear(4, 2)))(Linear(4, 4)),
        ["0", "4", "4.input"],
    ),
    "convnet without a linear layer": (
        lambda: nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(3)]),
        ["0", "1", "2"],
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2)), ["0", "2", "2.input"]),
    "no layers": (lambda: Lit(act=nn.ReLU(), norm=nn.LayerNorm(3), emb=nn.Embedding(3, 1)), []),
}


@pytest.mark.parametrize("model", DEFAULTS)
def test_default_taps(model: str) -> None:
    make, expected = DEFAULTS[model]
    root = make()
    taps = default_taps(root)
    assert [tap.name for tap in taps] == expected
    modules = dict(root.named_modules())
    for tap in taps:
        assert tap.module is modules[tap.name.removesuffix(".input")]
        assert tap.side == ("input" if tap.name.endswith(".input") else "output")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoder_and_decoder() -> None:
    found = names(nn.Transformer(4, 2, 3, 2, 8))
    assert found[:5] == [*[f"encoder.layers.{i}" for i in range(3)], *[f"decoder.layers.{i}" for i in range(2)]]


def test_networks_in_training_come_before_those_that_follow_them() -> None:
    online = {"online_encoder": resnet(), "online_projector": mlp(32, 8, 4, norm=True)}
    byol = Lit(
        **online,
        online_predictor=mlp(4, 8, 4, norm=True),
        target_encoder=frozen(resnet()),
        target_projector=frozen(mlp(32, 8, 4, norm=True)),
    )
    found = names(byol)
    assert found[:5] == [f"online_encoder.{name}" for name in STAGES[:5]]
    assert {"online_projector.3", "online_predictor.3"} < set(found)
    assert found[-1] == "online_predictor.3.input"
    assert len(found) == MAX_DEFAULT_LAYERS
    assert [name for name in found if name.startswith("target")] == ["target_encoder.conv1"]


def test_a_frozen_backbone_is_watched_below_a_trained_head() -> None:
    found = names(Lit(backbone=frozen(ViT(24)), head=Linear(3, 2)))
    assert {"backbone.blocks.0", "backbone.blocks.23", "head"} < set(found)
    assert found[-1] == "head.input"
    assert len(found) == MAX_DEFAULT_LAYERS


def test_the_logits_of_a_vocabulary_are_left_out_for_their_input() -> None:
    model = Net(h=nn.ModuleList([GPTBlock() for _ in range(3)]), lm_head=Linear(4, 16))
    assert names(model) == ["h.0", "h.1", "h.2", "lm_head.input"]


@pytest.mark.parametrize("depth", [11, 12, 13, 50, 97])
def test_deep_models_are_thinned_evenly(depth: int) -> None:
    found = names(Lit(net=nn.Sequential(*[Block() for _ in range(depth)])))
    chosen = [int(name.split(".")[1]) for name in found[:-1]]
    assert len(found) == MAX_DEFAULT_LAYERS == 12
    assert len(chosen) == len(set(chosen)) == 11
    assert (chosen[0], chosen[-1]) == (0, depth - 1)
    gaps = {later - earlier for earlier, later in pairwise(chosen)}
    assert max(gaps) - min(gaps) <= 1
    assert found[-1] == f"net.{depth - 1}.mlp.fc2.input"


DEEP = {"vit": lambda: ViT(50), "bert": lambda: bert(12), "gpt-2": lambda: gpt2(24), "deit": lambda: ViT(12)}


@pytest.mark.parametrize("model", DEEP)
def test_deep_models_have_a_dozen_taps_from_the_first_block_to_the_last(model: str) -> None:
    root = DEEP[model]()
    stack = next(m for m in root.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 3)
    taps = default_taps(root)
    assert len(taps) == MAX_DEFAULT_LAYERS
    depths = [i for i, block in enumerate(stack) if any(tap.module is block for tap in taps)]
    assert (depths[0], depths[-1]) == (0, len(stack) - 1)
    gaps = {later - earlier for earlier, later in pairwise(depths)}
    assert max(gaps) - min(gaps) <= 1
    assert len(depths) >= 8


def test_a_model_that_is_one_layer() -> None:
    layer = Linear(3, 4)
    assert default_taps(layer) == [Tap("input", layer, "input")]


def test_embeddings_are_watched_where_there_is_nothing_else() -> None:
    tables = {"user": nn.Embedding(9, 4), "item": nn.EmbeddingBag(9, 4), "bias": nn.Embedding(9, 1)}
    assert names(nn.ModuleDict(tables)) == ["user", "item"]
    assert names(nn.ModuleDict({**tables, "head": nn.Linear(4, 2)})) == ["head", "head.input"]


def test_compiled_models_have_the_same_taps() -> None:
    expected = names(Lit(model=gpt2(3)))
    assert names(Lit(model=compiled(gpt2(3)))) == expected
    blocks = gpt2(3)
    blocks.transformer.h = nn.ModuleList([compiled(block) for block in blocks.transformer.h])
    assert names(Lit(model=blocks)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net.0", "net.0"),
        ("_orig_mod.net.0", "net.0"),
        ("net._orig_mod.0._fsdp_wrapped_module.linear", "net.0.linear"),
        ("net._checkpoint_wrapped_module.block", "net.block"),
        ("module.fc", "module.fc"),
        ("_orig_mod", "_orig_mod"),
        ("my_orig_mod.x", "my_orig_mod.x"),
        ("", ""),
    ],
)
def test_clean_name(name: str, expected: str) -> None:
    assert clean_name(name) == expected


HOSTILE = [
    "a b",
    "a/b",
    "../../etc/passwd",
    "a\\b",
    "größe",
    "层.0",
    "",
    ".",
    "..",
    "...",
    "a..b",
    "<x>",
    "a\nb",
    "\0",
    "%s",
]
HOSTILE += ["head:input", ":input", "a:b", "name*", "-x", "_private", "x_", "con", "a" * 300]


@pytest.mark.parametrize("name", HOSTILE)
def test_curve_names_are_fit_for_tags_and_files(name: str) -> None:
    found = curve_name(name)
    assert found
    assert set(found) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
    assert ".." not in found
    assert found[0] not in "._"
    assert found[-1] not in "._"
    assert curve_name(found) == found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net.layers.0-x_y", "net.layers.0-x_y"),
        ("head:input", "head.input"),
        ("a b/c", "a_b_c"),
        ("层", "-5c42-"),
        ("..", "layer"),
        ("", "layer"),
    ],
)
def test_curve_name(name: str, expected: str) -> None:
    assert curve_name(name) == expected


TREE = {"encoder": mlp(4, 4, 4), "head": Linear(4, 2)}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["head"], ["head"]),
        (["encoder.*"], ["encoder.0", "encoder.1", "encoder.2"]),
        (["encoder.[02]", "head"], ["encoder.0", "encoder.2", "head"]),
        (["head", "encoder.0"], ["encoder.0", "head"]),
        (["*.0", "encoder.0"], ["encoder.0"]),
        (["?ncoder"], ["encoder"]),
        ([], []),
    ],
)
def test_find_modules(patterns: Sequence[str], expected: list[str]) -> None:
    root = Net(**TREE)
    found = find_modules(root, patterns)
    assert list(found) == expected
    assert all(found[name] is root.get_submodule(name) for name in expected)


def test_what_matches_nothing_is_answered_with_what_there_is() -> None:
    message = r"'hed' matches no submodule of Net\. It has: encoder, encoder\.0, encoder\.1, encoder\.2, head\."
    message += r" Did you mean `head`\?"
    for find in (find_modules, find_taps):
        with pytest.raises(ValueError, match=message):
            find(Net(**TREE), ["head", "hed"])
    with pytest.raises(ValueError, match=message):
        find_taps(Net(**TREE), ["hed:input"])
    with pytest.raises(ValueError, match=r"'HEAD' matches no submodule .* Did you mean `head`\?$"):
        find_modules(Net(**TREE), ["HEAD"])
    with pytest.raises(ValueError, match=r"Did you mean `encoder\.2`, `encoder` or `encoder\.1`\?$"):
        find_modules(Net(**TREE), ["encoder2"])
    with pytest.raises(ValueError, match=r"encoder\.2, head\.$"):
        find_modules(Net(**TREE), ["transformer.blocks"])


def test_exact_names_with_glob_characters() -> None:
    root = Net(blocks=nn.ModuleDict({"a[0]": Linear(1, 1), "a0": Linear(1, 1)}))
    assert "blocks.a[0]" in find_modules(root, ["blocks.a[0]"])


def test_a_shared_module_is_found_once() -> None:
    shared = Linear(4, 4)
    root = Net(first=shared, second=shared, third=Linear(4, 4))
    assert list(find_modules(root, ["*"])) == ["first", "third"]
    assert list(find_modules(root, ["second"])) == ["second"]


def test_the_outermost_wrapper_is_what_is_called() -> None:
    root = Net(**TREE)
    root.encoder = compiled(root.encoder)
    found = find_modules(root, ["encoder", "encoder.0"])
    assert found["encoder"] is root.encoder
    assert hasattr(found["encoder"], "_orig_mod")
    assert found["encoder.0"] is root.encoder._orig_mod[0]
    assert find_modules(compiled(Net(**TREE)), ["head"])


def test_find_taps() -> None:
    root = Net(**TREE)
    taps = find_taps(root, ["head:input", "encoder.?", "encoder.0:input"])
    assert taps == [
        Tap("encoder.0", root.encoder[0]),
        Tap("encoder.1", root.encoder[1]),
        Tap("encoder.2", root.encoder[2]),
        Tap("encoder.0.input", root.encoder[0], "input"),
        Tap("head.input", root.head, "input"),
    ]


def test_globs_leave_out_lists_that_are_never_called() -> None:
    root = Net(layers=nn.ModuleList([Linear(2, 2), Linear(2, 2)]), heads=nn.ModuleDict({"a": Linear(2, 2)}))
    assert [tap.name for tap in find_taps(root, ["*"])] == ["layers.0", "layers.1", "heads.a"]


@pytest.mark.parametrize(
    "keys",
    [["a b", "a/b"], ["a b", "a/b", "a_b"], ["x y", "x/y", "x_y_2"], ["x_y_2", "x y", "x/y"], ["é", "ü", "layer"]],
)
def test_names_of_taps_differ(keys: list[str]) -> None:
    root = nn.ModuleDict({key: Linear(2, 2) for key in keys})
    taps = find_taps(root, ["*"])
    assert len({tap.name for tap in taps}) == len(taps) == len(keys)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Linear(2, 2), True),
        (nn.Conv1d(2, 2, 1), True),
        (nn.Bilinear(2, 2, 2), True),
        (nn.LSTM(2, 2), True),
        (nn.MultiheadAttention(2, 1), True),
        (nn.LazyLinear(2), True),
        (Conv1D(2, 2), True),
        (parametrizations.weight_norm(Linear(2, 2)), True),
        (nn.Sequential(Linear(2, 2)), False),
        (nn.Embedding(2, 2), False),
        (nn.EmbeddingBag(2, 2), False),
        (nn.BatchNorm2d(2), False),
        (nn.LayerNorm(2), False),
        (nn.PReLU(), False),
        (nn.ReLU(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_has_weight(module: nn.Module, expected: bool) -> None:
    assert has_weight(module) is expected


def test_weighted_layers() -> None:
    root = Net(conv=nn.Conv2d(1, 1, 1), norm=nn.BatchNorm2d(1), net=mlp(2, 2, 2), attn=nn.MultiheadAttention(2, 1))
    root.normed = parametrizations.weight_norm(Linear(2, 2))
    layers = weighted_layers(root)
    assert [name for name, _ in layers] == ["conv", "net.0", "net.2", "attn", "normed"]
    assert all(root.get_submodule(name) is module for name, module in layers)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv1d(2, 2, 1), True),
        (nn.ConvTranspose1d(2, 2, 1), True),
        (nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)), True),
        (nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.ReLU()), True),
        (nn.Sequential(nn.Conv1d(2, 2, 1), nn.GELU(), nn.Dropout(0.1)), True),
        (nn.Sequential(nn.Conv1d(2, 2, 1), nn.PReLU()), True),
        (nn.Sequential(nn.Conv1d(2, 2, 1), nn.GroupNorm(1, 2), nn.ReLU()), True),
        (nn.Sequential(nn.Conv1d(2, 2, 1), nn.AdaptiveAvgPool1d(3)), True),
        (parametrizations.weight_norm(nn.Conv1d(2, 2, 1)), True),
        (nn.Sequential(parametrizations.spectral_norm(nn.Conv1d(2, 2, 1)), nn.ReLU()), True),
        (nn.Sequential(nn.Conv1d(2, 2, 1), nn.Flatten(), Linear(2, 2)), False),
        (nn.Conv2d(2, 2, 1), False),
        (Linear(2, 2), False),
        (Block(), False),
        (nn.LSTM(2, 2), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_is_channels_first(module: nn.Module, expected: bool) -> None:
    assert is_channels_first(module) is expected


def test_is_compiled() -> None:
    assert not is_compiled(Net(**TREE))
    assert is_compiled(compiled(Net(**TREE)))
    assert is_compiled(Net(part=compiled(Linear(2, 2))))
    in_place = Net(part=Linear(2, 2))
    in_place.part.compile(backend="eager")
    assert is_compiled(in_place)


def test_in_backward() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(in_backward()))
    y = x.sum()
    assert not in_backward()
    y.backward()
    assert seen == [True]
    assert not in_backward()
