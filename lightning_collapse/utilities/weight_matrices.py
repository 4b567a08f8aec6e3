"""Weight matrices: those a model multiplies by, whatever class holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.modules import clean_name, curve_name
from lightning_collapse.utilities.parameters import real_parameters, why_no_number

_PACKED = {"qkv", "c_attn", "in_proj", "wqkv", "qkv_proj", "to_qkv"}
_PARTS = ("q", "k", "v")


class Input(NamedTuple):
    """Where the rows that a matrix multiplies can be captured: an argument of a module's call.

    Attributes:
        module: The module to hook.
        position: Index of the argument if it is positional.
        keyword: Its name if it is not; ``None`` for whichever comes first.
    """

    module: nn.Module
    position: int = 0
    keyword: str | None = None


class WeightMatrix(NamedTuple):
    """One matrix of a model.

    Attributes:
        name: Name of the module, and of the part where a module holds several matrices; fit for curves.
        module: The module that holds it.
        read: Returns the matrix that is in effect now, shape ``(O, I)``, without graph: adapters added,
            parametrizations applied, shards gathered. On sharded weights it is collective: call it on every process.
        input: Where its input rows can be captured; ``None`` where no module receives them as they are (convolutions
            would need unfolding, recurrent cells and the output projection of ``nn.MultiheadAttention`` never show
            theirs).

    Example:
        >>> [matrix] = weight_matrices(nn.Sequential(nn.Linear(4, 3)))
        >>> matrix.name, matrix.read().shape
        ('0', torch.Size([3, 4]))
    """

    name: str
    module: nn.Module
    read: Callable[[], Tensor]
    input: Input | None


def weight_matrices(root: nn.Module, embeddings: bool = False) -> list[WeightMatrix]:
    """Every weight of two or more dimensions as a matrix ``(O, I)``, tied ones once, in the order of the model.

    Found by shape and not by class, so precision plugins that replace ``nn.Linear`` change nothing. Packed query, key
    and value weights (of ``nn.MultiheadAttention``, and layers of three times as many outputs as inputs with a name
    like ``qkv``, ``c_attn``, ``in_proj``) are three matrices; those that interleave the three by heads
    (``query_key_value``) stay one. Hugging Face's ``Conv1D`` is transposed. Convolutions are ``(O, I * k * k)``.
    Low-rank adapters (``lora_A``, ``lora_B``) count with the weight they are added to. Weights flattened by FSDP1 are
    left out, and those that :func:`left_out_weights` names.

    Args:
        root: The model.
        embeddings: Also the tables of ``nn.Embedding``: rows are looked up there, not multiplied.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [(matrix.name, tuple(matrix.read().shape)) for matrix in weight_matrices(net)]
        [('0', (3, 4)), ('2', (2, 3))]
    """
    found: dict[str, WeightMatrix] = {}
    seen: set[int] = set()
    inside: set[int] = set()  # modules that only hold what another one multiplies by
    for name, module in root.named_modules():
        if id(module) in inside:
            continue
        inside |= {id(held) for part in _holders(module) for held in part.modules()}
        if isinstance(_core(module), nn.Embedding | nn.EmbeddingBag) and not embeddings:
            continue
        for group in _groups(module, name):
            new = {id(source) for source in group.sources} - seen
            seen |= new
            for part, read, captured in group.parts if new else ():
                plain = curve_name(clean_name(f"{name}.{part}".strip(".")))
                unique = next(n for n in chain([plain], (f"{plain}_{i}" for i in count(2))) if n not in found)
                found[unique] = WeightMatrix(unique, module, read, captured)
    return list(found.values())


def left_out_weights(root: nn.Module) -> dict[str, str]:
    """By name, the weights that are no real matrix, and why: quantized, complex, sparse or lazy.

    Example:
        >>> left_out_weights(nn.Sequential(nn.Linear(2, 2, dtype=torch.cfloat), nn.Linear(2, 2)))
        {'0.weight': 'torch.complex64'}
    """
    found = real_parameters(root)
    complex_ones = {name: str(p.dtype) for name, p in found.kept.items() if p.is_complex() and p.ndim > 1}
    return {clean_name(name): reason for name, reason in (found.left_out | complex_ones).items()}


def left_out_message(root: nn.Module) -> str:
    """What to say of :func:`left_out_weights`, with their number; empty where there are none."""
    found = left_out_weights(root)
    if not found:
        return ""
    some = ", ".join(f"`{name}` ({reason})" for name, reason in list(found.items())[:3])
    return f"{len(found)} weight(s) are no matrix of real numbers and are left out: {some}."


class _Group(NamedTuple):
    """Matrices that lie in one weight: name of the part, reader, input; and the parameters behind them."""

    parts: list[tuple[str, Callable[[], Tensor], Input | None]]
    sources: list[Tensor]


def _groups(module: nn.Module, name: str) -> Iterator[_Group]:
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention(module)
        return
    core = _core(module)
    for attribute in _weight_names(core):
        sources = _sources(core, attribute)
        if any(why_no_number(source) or source.is_complex() for source in sources):
            continue
        shape = _raw(core, attribute).shape
        if not all(shape) or (len(shape) > 2 and not hasattr(core, "kernel_size")):  # expert stacks and the like
            continue
        linear = attribute == "weight" and len(shape) == 2 and not isinstance(core, nn.Embedding | nn.EmbeddingBag)
        captured = Input(module) if linear else None
        read = _reader(module, attribute)
        outputs, inputs = reversed(shape) if linear and _is_transposed(core) else shape[:2]
        if linear and outputs == 3 * inputs and name.rpartition(".")[2].lower() in _PACKED:
            yield _Group([(part, _third(read, i), captured) for i, part in enumerate(_PARTS)], sources)
        else:
            yield _Group([("" if attribute == "weight" else attribute, read, captured)], sources)


def _attention(module: nn.MultiheadAttention) -> Iterator[_Group]:
    places = [Input(module, i, keyword) for i, keyword in enumerate(("query", "key", "value"))]
    if module.in_proj_weight is not None:
        read = _reader(module, "in_proj_weight")
        parts = [(_PARTS[i], _third(read, i), place) for i, place in enumerate(places)]
        yield _Group(list(parts), _sources(module, "in_proj_weight"))
    else:
        for part, place in zip(_PARTS, places, strict=True):
            attribute = f"{part}_proj_weight"
            yield _Group([(part, _reader(module, attribute), place)], _sources(module, attribute))
    yield _Group([("out_proj", _reader(module.out_proj, "weight"), None)], _sources(module.out_proj, "weight"))


def _core(module: nn.Module) -> nn.Module:
    """What holds the weight itself: an adapter wraps its layer."""
    base = getattr(module, "base_layer", None)
    return _core(base) if isinstance(base, nn.Module) and _has_adapters(module) else module


def _has_adapters(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling"))


def _holders(module: nn.Module) -> list[nn.Module]:
    kids = dict(module.named_children())
    if isinstance(module, nn.MultiheadAttention):
        return list(kids.values())
    names = {"parametrizations"}
    if _has_adapters(module):
        names |= {"base_layer"} | {name for name in kids if name.startswith("lora_")}
    return [kid for name, kid in kids.items() if name in names]


def _weight_names(module: nn.Module) -> list[str]:
    if hasattr(module, "normalized_shape"):  # scales, not a matrix, however many dimensions they have
        return []
    if isinstance(vars(module).get("weight"), Tensor):  # what `weight_norm` of old computes before each call
        return ["weight"]
    own = {name: p for name, p in module.named_parameters(recurse=False) if nn.parameter.is_lazy(p) or p.ndim > 1}
    names = [name for name in (*own, *getattr(module, "parametrizations", ())) if "weight" in name]
    return ["weight"] if "weight" in names else [name for name in names if _raw(module, name).ndim > 1]


def _sources(module: nn.Module, attribute: str) -> list[Tensor]:
    parametrizations = getattr(module, "parametrizations", {})
    if attribute in parametrizations:
        return list(parametrizations[attribute].parameters())
    return [getattr(module, attribute)]


def _is_transposed(module: nn.Module) -> bool:
    """Whether the weight is ``(I, O)``: Hugging Face's ``Conv1D`` says how many outputs it has as ``nf``."""
    shape = _raw(module, "weight").shape
    return getattr(module, "nf", None) == shape[1]


@torch.no_grad()
def _raw(module: nn.Module, attribute: str) -> Tensor:
    parametrizations = getattr(module, "parametrizations", None)
    with _quiet(parametrizations) if parametrizations is not None else nullcontext():
        value: Tensor = getattr(module, attribute)
    return value


@contextmanager
def _quiet(parametrizations: nn.Module) -> Iterator[None]:
    """In training mode a look at a spectrally normalized weight would change its buffers."""
    training = [module for module in parametrizations.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def whole(tensor: Tensor) -> Tensor:
    """Of a sharded tensor all of it; collective then."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def _reader(module: nn.Module, attribute: str) -> Callable[[], Tensor]:
    core = _core(module)
    matrix = _raw(core, attribute).ndim == 2
    adapted = matrix and _has_adapters(module)
    transposed = _is_transposed(core) if matrix and attribute == "weight" else getattr(core, "transposed", False)

    @torch.no_grad()
    def read() -> Tensor:
        weight = whole(_raw(core, attribute))
        weight = _adapted(module, weight) if adapted else weight
        weight = weight.transpose(0, 1) if transposed else weight
        return weight if matrix else weight.flatten(1)

    return read


def _third(read: Callable[[], Tensor], index: int) -> Callable[[], Tensor]:
    return lambda: read().chunk(3)[index]


def _adapted(module: Any, weight: Tensor) -> Tensor:
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return weight
    downs, ups, scaling = module.lora_A, module.lora_B, module.scaling
    pairs = [(downs, ups, scaling)]
    if isinstance(scaling, dict):  # several adapters by name, the active ones count
        active = [name for name in getattr(module, "active_adapters", scaling) if name in downs]
        pairs = [(downs[name].weight, ups[name].weight, scaling[name]) for name in active]
    for down, up, scale in pairs:
        delta = whole(up) @ whole(down) * scale
        weight = weight + (delta.T if _is_transposed(_core(module)) else delta)
    return weight
