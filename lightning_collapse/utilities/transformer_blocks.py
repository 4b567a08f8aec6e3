"""Transformer blocks: the repeated modules a residual stream passes, and what in them writes to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from lightning_collapse.utilities.attention_projections import AttentionProjections, find_projections
from lightning_collapse.utilities.module_tree import Named, clean_name, is_linear, layers_of, width_of
from lightning_collapse.utilities.modules import Tap, curve_name

_VALUES = re.compile(r"(^|_)(v|value|values|wv|lin_v)(_|$)")


class TransformerBlock(NamedTuple):
    """One block.

    Attributes:
        name: Fit for curves.
        module: The block; its first argument is the stream, and its output the stream behind it.
        writers: What writes to the stream inside of it: the last map of every attention, and that of the MLP.
        length_first: Whether tokens are ``(L, N, D)``.
    """

    name: str
    module: nn.Module
    writers: tuple[Tap, ...] = ()
    length_first: bool = False


def transformer_blocks(root: nn.Module) -> list[TransformerBlock]:
    """Every block of a transformer: the innermost modules of one class in a list that hold an attention.

    Without such a list every attention is one itself, as :func:`find_projections` knows them.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> blocks = transformer_blocks(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        >>> [block.name for block in blocks], [writer.name for writer in blocks[1].writers]
        (['layers.0', 'layers.1'], ['layers.1.self_attn', 'layers.1.linear2'])
    """
    attentions = find_projections(root)
    around = {id(module) for each in attentions for module in _around(root, each.name)}
    found: dict[int, Named] = {}
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            found |= {id(kid): (f"{name}.{key}".lstrip("."), kid) for key, kid in _alike(module, around)}
    inner = [named for named in found.values() if not any(id(m) in found for m in list(named[1].modules())[1:])]
    if not inner:
        return [make_block(each.name, each.module) for each in attentions]
    return [make_block(name, module) for name, module in inner]


def make_block(name: str, module: nn.Module) -> TransformerBlock:
    """A module as a block, with what writes to the stream in it."""
    name = curve_name(clean_name(name))
    first = any(getattr(inner, "batch_first", True) is False for inner in module.modules())
    taps = [Tap(f"{name}.{curve_name(clean_name(key))}", writer) for key, writer in _writers(module) if key]
    return TransformerBlock(name, module, tuple(taps), first)


def _around(root: nn.Module, attention: str) -> Iterator[nn.Module]:
    """The modules that an attention is in, by clean name."""
    for name, module in root.named_modules():
        if not clean_name(name) or attention.startswith(f"{clean_name(name)}."):
            yield module


def _alike(container: nn.Module, around: set[int]) -> Sequence[Named]:
    """Children of one class that an attention is in: two, or the only one of a list."""
    kids = sorted(
        ((key, kid) for key, kid in container.named_children() if id(kid) in around), key=lambda named: _class(named[1])
    )
    runs = [list(run) for _, run in groupby(kids, key=lambda named: _class(named[1]))]
    alone = isinstance(container, nn.ModuleList) and len(container) == 1
    return [named for run in runs for named in run if len(run) > 1 or alone]


def _class(module: nn.Module) -> str:
    core = getattr(module, "_orig_mod", module)
    return f"{type(core).__module__}.{type(core).__qualname__}"


def _writers(block: nn.Module) -> Iterator[Named]:
    """The last map to the stream's width in every attention, and in what is outside of them."""
    layers = [named for named in layers_of("", block) if is_linear(named[1]) or _is_whole(named[1])]
    attentions = find_projections(block)
    # an MLP that makes position biases may be registered first
    width = _stream_width(attentions) or (_inputs(layers[0][1]) if layers else 0)
    rest = layers
    for attention in attentions:
        inside, own = _part_of(block, layers, attention, width)
        rest = [named for named in rest if named not in inside]
        yield from own[-1:]
    yield from [named for named in rest if _outputs(named[1]) == width][-1:]


def _stream_width(attentions: Sequence[AttentionProjections]) -> int:
    """What the queries of the first attention are made of, if a layer makes them; 0 if that is not known."""
    if not attentions:
        return 0
    module = attentions[0].module
    maker = module.get_submodule(attentions[0].query) if attentions[0].query else module
    return _inputs(maker)


def _part_of(
    block: nn.Module, layers: Sequence[Named], attention: AttentionProjections, width: int
) -> tuple[list[Named], list[Named]]:
    """Layers of an attention, and those among them that may write: in the module itself, or in what is around it."""
    path, inside = attention.name, list[Named]()
    apart = {f"{attention.name}.{part}" for part in (attention.query, attention.key)}
    while path:
        inside = [named for named in layers if f"{clean_name(named[0])}.".startswith(f"{path}.")]
        own = [
            (name, layer)
            for name, layer in inside
            if _outputs(layer) == width and name not in apart and not _VALUES.search(name.rpartition(".")[2].lower())
        ]
        if own:
            return inside, own
        path = path.rpartition(".")[0]
    return inside, []


def _is_whole(layer: nn.Module) -> bool:
    return isinstance(layer, nn.MultiheadAttention)


def _outputs(layer: Any) -> int:
    return layer.embed_dim if _is_whole(layer) else getattr(layer, "nf", width_of(layer))


def _inputs(layer: Any) -> int:
    return layer.embed_dim if _is_whole(layer) else getattr(layer, "nx", getattr(layer, "in_features", 0))
