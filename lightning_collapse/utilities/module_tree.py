"""The tree of a model's modules: layers that hold weights, and blocks that repeat."""

import re
from collections.abc import Iterator

from torch import Tensor, nn

_LISTS = (nn.ModuleList, nn.ModuleDict)
_NUMBER = re.compile(r"\d+[a-z]?")
Named = tuple[str, nn.Module]


def has_weight(module: nn.Module) -> bool:
    """Whether a module itself, not a child, multiplies by a weight of two or more dimensions."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False
    recurse = is_opaque(module)
    return any(nn.parameter.is_lazy(p) or p.ndim >= 2 for p in module.parameters(recurse=recurse))


def weighted_layers(root: nn.Module) -> list[Named]:
    """The innermost modules that hold a weight and are called, in the order of the model, by name."""
    return list(layers_of("", root))


def weighted_children(name: str, module: nn.Module) -> list[Named]:
    """Children that hold weights; of lists, which are never called themselves, their elements."""
    if is_opaque(module):
        return []
    prefix = f"{name}." if name else ""
    kids = [(prefix + key, kid) for key, kid in module.named_children() if any(map(has_weight, kid.modules()))]
    return [named for kid in kids for named in (weighted_children(*kid) if is_list(kid[1]) else [kid])]


def is_list(module: nn.Module) -> bool:
    """Whether it only holds others and is never called itself."""
    return isinstance(module, _LISTS) and type(module).forward is nn.Module.forward


def layers_of(name: str, module: nn.Module) -> Iterator[Named]:
    """As :func:`weighted_layers`, of a module that has a name itself."""
    kids = weighted_children(name, module)
    if not kids and has_weight(module):
        yield name, module
    for kid in kids:
        yield from layers_of(*kid)


def innermost(module: nn.Module) -> Iterator[nn.Module]:
    """All modules that call no other, with weights or not."""
    kids = [] if is_opaque(module) else list(module.children())
    if not kids:
        yield module
    for kid in kids:
        yield from innermost(kid)


def is_linear(module: nn.Module) -> bool:
    """By the shape of the weight: precision plugins replace ``nn.Linear`` by classes of their own."""
    weight = getattr(module, "weight", None)
    if weight is None or nn.parameter.is_lazy(weight):
        return isinstance(module, nn.Linear)
    return isinstance(weight, Tensor) and weight.ndim == 2


def is_opaque(module: nn.Module) -> bool:
    """Whether the children only hold weights that the module itself multiplies by, adapters among them."""
    return isinstance(module, nn.MultiheadAttention) or hasattr(module, "parametrizations") or _is_adapted(module)


def _is_adapted(module: nn.Module) -> bool:
    """Whether it is one layer and a low-rank or other adapter of it."""
    kids = dict(module.named_children())
    if "base_layer" in kids or {"lora_A", "lora_B"} <= kids.keys():
        return True
    layers = [key for key, kid in kids.items() if not list(kid.children()) and has_weight(kid)]
    return len([key for key in layers if "lora" not in key.lower()]) == 1 and any("lora" in key.lower() for key in kids)


def is_composite(module: nn.Module) -> bool:
    """Whether it holds several layers."""
    return len(list(layers_of("", module))) > 1


def blocks_of(module: nn.Module) -> list[Named]:
    """The children that are blocks: layers of an ``nn.Sequential``, or repeated modules that hold several layers.

    Repeated are two elements of a list, two of a class of their own in an ``nn.Sequential``, or three siblings that
    only a number tells apart, unless another child holds four times as many weights as all of them.
    """
    kids = weighted_children("", module)
    families: dict[str | type, list[Named]] = {}
    for name, kid in kids:
        if is_composite(kid):
            family = type(kid) if isinstance(module, nn.Sequential) else _NUMBER.sub("#", name)
            families.setdefault(family, []).append((name, kid))
    found = [named for family, alike in families.items() if len(alike) >= _least(family) for named in alike]
    rest = [weight_count(kid) for name, kid in kids if (name, kid) not in found]
    if found and 4 * sum(weight_count(kid) for _, kid in found) >= max(rest, default=0):
        return found
    plain = isinstance(module, nn.Sequential) and len(kids) >= 3
    return kids if plain and all(blocks_of(kid) or not holds_blocks(kid) for _, kid in kids) else []


def _least(family: str | type) -> int:
    if isinstance(family, str):
        return 2 if family == "#" or family.endswith(".#") else 3
    return 3 if family is nn.Sequential else 2


def holds_blocks(module: nn.Module) -> bool:
    """Whether it or a module inside it has blocks."""
    return any(map(blocks_of, module.modules()))


def weight_count(module: nn.Module) -> int:
    """Parameters of its layers with weights; lazy ones count as none."""
    layers = (layer for _, layer in layers_of("", module))
    return sum(p.numel() for layer in layers for p in layer.parameters() if not nn.parameter.is_lazy(p))


def repeats_blocks(module: nn.Module) -> bool:
    """Whether there are blocks of several layers somewhere in it."""
    return any(is_composite(block) for inner in module.modules() for _, block in blocks_of(inner))
