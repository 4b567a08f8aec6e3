"""The tree of a model's modules: layers that hold weights, and blocks that repeat."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_collapse.utilities.private_torch import WRAPPERS

_LISTS = (nn.ModuleList, nn.ModuleDict)
_NUMBER = re.compile(r"\d+[a-z]?")
Named = tuple[str, nn.Module]


def clean_name(name: str) -> str:
    """Module name without the marks that compilation and sharding leave in it.

    Example:
        >>> clean_name("net._orig_mod.0._fsdp_wrapped_module.linear")
        'net.0.linear'
    """
    parts = name.split(".")
    return ".".join(part for part in parts if part not in WRAPPERS) or name


def named_modules(root: nn.Module) -> Iterator[Named]:
    """All modules but the root, a shared one under each of its names."""
    return ((name, module) for name, module in root.named_modules(remove_duplicate=False) if name)


def has_weight(module: nn.Module) -> bool:
    """Whether a module itself, not a child, multiplies by a weight of two or more dimensions."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False
    recurse = is_opaque(module)
    return any(nn.parameter.is_lazy(p) or p.ndim >= 2 for p in module.parameters(recurse=recurse))


def weighted_layers(root: nn.Module) -> list[Named]:
    """The innermost modules that hold a weight and are called, in the order of the model, by name."""
    return list(layers_of("", root))


def width_of(layer: nn.Module) -> int:
    """How many numbers a layer returns per row or position, 0 if that is not known."""
    width = getattr(layer, "out_features", getattr(layer, "out_channels", 0))
    return width if isinstance(width, int) else 0


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


def own_weight(module: nn.Module) -> Any:
    """The attribute ``weight``, ``None`` where there is none or it is parametrized.

    Asked for such a one, spectral normalization would take a step, and the training were another.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> own_weight(layer) is layer.weight, own_weight(nn.utils.parametrizations.spectral_norm(layer))
        (True, None)
    """
    return None if "weight" in getattr(module, "parametrizations", {}) else getattr(module, "weight", None)


def is_linear(module: nn.Module) -> bool:
    """By the shape of the weight: precision plugins replace ``nn.Linear`` by classes of their own."""
    weight = own_weight(module)
    if weight is None or nn.parameter.is_lazy(weight):
        return isinstance(module, nn.Linear)
    return isinstance(weight, Tensor) and weight.ndim == 2


def is_transposed(module: nn.Module) -> bool:
    """Whether outputs are columns: Hugging Face's ``Conv1D`` says how many it has as ``nf``."""
    weight = own_weight(module)
    return isinstance(weight, Tensor) and weight.ndim == 2 and getattr(module, "nf", None) == weight.shape[1]


def is_opaque(module: nn.Module) -> bool:
    """Whether the children only hold weights that the module itself multiplies by, adapters among them."""
    return isinstance(module, nn.MultiheadAttention) or hasattr(module, "parametrizations") or _is_adapted(module)


def _is_adapted(module: nn.Module) -> bool:
    """Whether it is one layer and a low-rank or other adapter of it."""
    kids = dict(module.named_children())
    if {"lora_A", "lora_B"} <= kids.keys() or ("base_layer" in kids and hasattr(module, "adapter_layer_names")):
        return True
    low = [p.shape for key, kid in kids.items() if "lora" in key.lower() for p in kid.parameters() if p.ndim > 1]
    rest = [p.shape for key, kid in kids.items() if "lora" not in key.lower() for p in kid.parameters() if p.ndim > 1]
    return len(rest) == 1 and bool(low) and all(max(s) in rest[0] and min(s) <= min(rest[0]) for s in low)


class ModuleTree:
    """Sizes and blocks of modules, each found once: the model must not change meanwhile."""

    def __init__(self) -> None:
        self._layers: dict[nn.Module, list[nn.Module]] = {}
        self._alike: dict[nn.Module, list[Named]] = {}
        self._blocks: dict[nn.Module, list[Named]] = {}

    def layers(self, module: nn.Module) -> list[nn.Module]:
        """Its layers with weights."""
        if module not in self._layers:
            self._layers[module] = [layer for _, layer in layers_of("", module)]
        return self._layers[module]

    def is_composite(self, module: nn.Module) -> bool:
        """Whether it holds several layers."""
        return len(self.layers(module)) > 1

    def size(self, module: nn.Module) -> int:
        """Parameters of its layers; lazy ones count as none."""
        return sum(
            p.numel() for layer in self.layers(module) for p in layer.parameters() if not nn.parameter.is_lazy(p)
        )

    def alike(self, module: nn.Module) -> list[Named]:
        """Children that repeat and hold several layers each.

        Repeated are two elements of a list, three of a class in an ``nn.Sequential`` (two of a class of its own if
        there are no others), or three siblings that only a number tells apart.
        """
        if module not in self._alike:
            families: dict[str | type, list[Named]] = {}
            for name, kid in weighted_children("", module):
                if self.is_composite(kid):
                    family = type(kid) if isinstance(module, nn.Sequential) else _NUMBER.sub("#", name)
                    families.setdefault(family, []).append((name, kid))
            one = len(families) == 1
            many = [members for family, members in families.items() if len(members) >= _least(family, one)]
            self._alike[module] = [named for members in many for named in members]
        return self._alike[module]

    def blocks(self, module: nn.Module) -> list[Named]:
        """The children that are blocks: those :meth:`alike`, or the layers of an ``nn.Sequential``.

        None where another child holds four times as many weights as all of them.
        """
        if module not in self._blocks:
            kids, found = weighted_children("", module), self.alike(module)
            rest = max((self.size(kid) for name, kid in kids if (name, kid) not in found), default=0)
            if not found or 4 * sum(self.size(kid) for _, kid in found) < rest:
                plain = isinstance(module, nn.Sequential) and len(kids) >= 3
                found = kids if plain and all(self.blocks(kid) or not self.holds_blocks(kid) for _, kid in kids) else []
            self._blocks[module] = found
        return self._blocks[module]

    def holds_blocks(self, module: nn.Module) -> bool:
        """Whether it or a module inside it has blocks."""
        return any(map(self.blocks, module.modules()))

    def repeats_blocks(self, module: nn.Module) -> bool:
        """Whether there are blocks of several layers somewhere in it."""
        return any(self.is_composite(block) for inner in module.modules() for _, block in self.blocks(inner))


def _least(family: str | type, alone: bool) -> int:
    if isinstance(family, str):
        return 2 if family == "#" or family.endswith(".#") else 3
    return 2 if alone and family is not nn.Sequential else 3
