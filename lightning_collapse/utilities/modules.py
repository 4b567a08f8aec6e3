"""Which layers to look at, and what to call them."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain, count, groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

MAX_DEFAULT_LAYERS = 12
INPUT_SUFFIX = ":input"
VOCABULARY = 4  # a last layer this many times wider than its input is a vocabulary's
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_CHANNELS_FIRST = (
    nn.Conv1d,
    nn.ConvTranspose1d,
    nn.BatchNorm1d,
    nn.InstanceNorm1d,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool1d,
)
_ELEMENTWISE = {"torch.nn.modules.activation", "torch.nn.modules.dropout"}
_LISTS = (nn.ModuleList, nn.ModuleDict)  # never called themselves
Named = tuple[str, nn.Module]


class Tap(NamedTuple):
    """One place to look at: the output or the input of a module, and the name of its curves."""

    name: str
    module: nn.Module
    side: Literal["output", "input"] = "output"


def clean_name(name: str) -> str:
    """Module name without the marks that compilation and sharding leave in it.

    Example:
        >>> clean_name("net._orig_mod.0._fsdp_wrapped_module.linear")
        'net.0.linear'
    """
    parts = name.split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS) or name


def curve_name(name: str) -> str:
    """Module name as part of a tag or file name: letters, digits, ``_``, ``-`` and single inner dots.

    Example:
        >>> curve_name("../my block/<b>.0"), curve_name("head:input")
        ('my_block__b_.0', 'head.input')
    """
    name = name[: -len(INPUT_SUFFIX)] + ".input" if name.endswith(INPUT_SUFFIX) else name
    return re.sub(r"\.{2,}", ".", re.sub(r"[^\w.\-]", "_", name, flags=re.ASCII)).strip("._") or "layer"


def find_modules(root: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Submodules by exact clean name or glob, in the order of the model, keyed by clean name.

    Raises:
        ValueError: If a pattern matches nothing; the message lists what there is.
    """
    names = {clean_name(name): module for name, module in reversed(list(_named(root)))}
    names = {name: module for name, module in names.items() if not isinstance(module, _LISTS)}
    names = dict(reversed(names.items()))  # of a compiled or sharded module the outermost wrapper
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"{pattern!r} matches no submodule of {type(root).__name__}. It has: {', '.join(names)}.")
    found = {name: module for name, module in names.items() if any(_matches(name, p) for p in patterns)}
    first = {id(module): name for name, module in reversed(found.items())}  # a shared module once
    return {name: found[name] for name in found if first[id(found[name])] == name}


def find_taps(root: nn.Module, patterns: Sequence[str]) -> list[Tap]:
    """Taps chosen by glob; a pattern that ends in ``:input`` means the inputs of the modules it matches.

    Raises:
        ValueError: If a pattern matches nothing; the message lists what there is.
    """
    outputs = [pattern for pattern in patterns if not pattern.endswith(INPUT_SUFFIX)]
    inputs = [pattern[: -len(INPUT_SUFFIX)] for pattern in patterns if pattern.endswith(INPUT_SUFFIX)]
    taps = [Tap(name, module) for name, module in find_modules(root, outputs).items()]
    return _unique(
        taps + [Tap(name + INPUT_SUFFIX, module, "input") for name, module in find_modules(root, inputs).items()]
    )


def default_taps(root: nn.Module) -> list[Tap]:
    """At most a dozen taps that span the depth of any model: block outputs, and always the last Linear's input.

    Networks that are not trained (a momentum encoder, a teacher) take only the places that those in training leave.

    The rule, from the root down (only modules that hold a weight of two or more dimensions count, embeddings do not):

    - three or more siblings of one class that hold half of the weights (stages), two or more in an ``nn.ModuleList`` or
      ``nn.Sequential`` (a transformer's blocks), or the three or more layers of an ``nn.Sequential`` are the blocks;
    - a module with a single such child is a wrapper: look inside;
    - other modules are looked into if there are blocks further down; if there are none, their children are the blocks;
    - of more than eleven blocks the longest run of siblings is thinned, evenly and with its first and last;
    - the output of a last Linear that widens its input fourfold (a vocabulary) is left out: it has no rank of its own.
    """
    blocks = [named for kid in _kids("", root) for named in _blocks(*kid)] if not _is_stack(root) else _kids("", root)
    blocks = [named for block in blocks for named in _callable(*block)]
    linears = [named for named in weighted_layers(root) if _is_linear(named[1])]
    last = [named for named in linears if _is_trained(named[1])][-1:] or linears[-1:]
    blocks = [named for named in blocks if named not in last or not _widens(named[1])]
    trained = _thin([named for named in blocks if _is_trained(named[1])], MAX_DEFAULT_LAYERS - 1)
    others = _thin([named for named in blocks if not _is_trained(named[1])], MAX_DEFAULT_LAYERS - 1 - len(trained))
    taps = [Tap(clean_name(name), module) for name, module in blocks if (name, module) in [*trained, *others]]
    return _unique(taps + [Tap(clean_name(name) + INPUT_SUFFIX, module, "input") for name, module in last])


def has_weight(module: nn.Module) -> bool:
    """Whether a module itself, not a child, multiplies by a weight of two or more dimensions."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False
    recurse = _is_opaque(module)
    return any(nn.parameter.is_lazy(p) or p.ndim >= 2 for p in module.parameters(recurse=recurse))


def weighted_layers(root: nn.Module) -> list[Named]:
    """The innermost modules that hold a weight and are called, in the order of the model, by name."""
    return list(_leaves("", root))


def is_channels_first(module: nn.Module, side: Literal["output", "input"] = "output") -> bool:
    """Whether ``module`` returns, or receives, ``(N, C, L)``: its last, or first, layer that cares about shape does."""
    layers = list(_innermost(module))
    for layer in layers if side == "input" else reversed(layers):
        elementwise = type(layer).__module__ in _ELEMENTWISE and not isinstance(layer, nn.MultiheadAttention)
        if not elementwise and not isinstance(layer, nn.Identity | nn.GroupNorm):
            return isinstance(layer, _CHANNELS_FIRST)
    return False


def is_compiled(root: nn.Module) -> bool:
    """Whether ``torch.compile`` has wrapped a Lightning module or any module inside it."""
    whole = getattr(root, "_compiler_ctx", None) is not None
    return whole or any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in root.modules())


def let_hooks_be_seen(root: nn.Module) -> None:
    """Call before hooks are registered: has compiled code, if there is any in ``root``, compiled anew with them.

    Dynamo does not guard on hooks: what it compiled before they were there would never call them.
    """
    if is_compiled(root):
        torch.compiler.reset()


def in_backward() -> bool:
    """Whether the autograd engine is running: then a forward call is activation checkpointing's recomputation."""
    # dynamo cannot trace the question, and recomputation of a compiled graph does not run Python again
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_to_be_ignored() -> bool:
    """Whether the running forward call is not to be heard: a recomputation, or one inside ``torch.func.vmap`` and such.

    Tensors of a function transform mean nothing once it has returned: what is kept of them raises when it is read.
    """
    return in_backward() or (
        not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None
    )


def _named(root: nn.Module) -> Iterator[Named]:
    return ((name, module) for name, module in root.named_modules(remove_duplicate=False) if name)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _unique(taps: list[Tap]) -> list[Tap]:
    """The same taps under names that are fit for tags and differ from each other."""
    unique: dict[str, Tap] = {}
    for tap in taps:
        plain = curve_name(tap.name)
        names = chain([plain], (f"{plain}_{i}" for i in count(2)))
        name = next(name for name in names if name not in unique)
        unique[name] = tap._replace(name=name)
    return list(unique.values())


def _kids(name: str, module: nn.Module) -> list[Named]:
    """Children that hold weights."""
    if _is_opaque(module):
        return []
    prefix = f"{name}." if name else ""
    return [(prefix + key, kid) for key, kid in module.named_children() if any(map(has_weight, kid.modules()))]


def _leaves(name: str, module: nn.Module) -> Iterator[Named]:
    kids = _kids(name, module)
    if not kids and has_weight(module):
        yield name, module
    for kid in kids:
        yield from _leaves(*kid)


def _innermost(module: nn.Module) -> Iterator[nn.Module]:
    kids = [] if _is_opaque(module) else list(module.children())
    if not kids:
        yield module
    for kid in kids:
        yield from _innermost(kid)


def _is_linear(module: nn.Module) -> bool:
    """By the shape of the weight: precision plugins replace ``nn.Linear`` by classes of their own."""
    weight = getattr(module, "weight", None)
    if weight is None or nn.parameter.is_lazy(weight):
        return isinstance(module, nn.Linear)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _widens(module: nn.Module) -> bool:
    weight = module.weight
    return (
        isinstance(weight, Tensor) and not nn.parameter.is_lazy(weight) and len(weight) >= VOCABULARY * weight.shape[1]
    )


def _is_opaque(module: nn.Module) -> bool:
    """Whether the children are only holders of weights that the module itself multiplies by."""
    return isinstance(module, nn.MultiheadAttention) or hasattr(module, "parametrizations")


def _is_stack(module: nn.Module) -> bool:
    kids = [kid for _, kid in _kids("", module)]
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    if isinstance(module, nn.Sequential) and len(kids) >= 3:
        return True
    alike: dict[type[nn.Module], list[nn.Module]] = {}
    for kid in kids:
        if _kids("", kid) and not isinstance(kid, _LISTS):
            alike.setdefault(type(kid), []).append(kid)
    size = sum(map(_size, kids))
    return any(
        len(same) >= (2 if listed and cls is not nn.Sequential else 3) and 2 * sum(map(_size, same)) >= size
        for cls, same in alike.items()
    )


def _size(module: nn.Module) -> int:
    return sum(p.numel() for _, layer in _leaves("", module) for p in layer.parameters() if not nn.parameter.is_lazy(p))


def _blocks(name: str, module: nn.Module) -> list[Named]:
    kids = _kids(name, module)
    if not kids:
        return [(name, module)]
    if len(kids) > 1 and (_is_stack(module) or not any(_is_stack(m) for _, kid in kids for m in kid.modules())):
        return kids
    return [named for kid in kids for named in _blocks(*kid)]


def _thin(blocks: list[Named], keep: int) -> list[Named]:
    """At most ``keep`` of the blocks: the longest run of siblings gives way, but for its first and last."""
    runs = [list(run) for _, run in groupby(blocks, key=lambda named: named[0].rpartition(".")[0])]
    while (over := sum(map(len, runs)) - keep) > 0 and runs and len(longest := max(runs, key=len)) > 2:
        longest[:] = _evenly(longest, max(2, len(longest) - over))
    return _evenly([named for run in runs for named in run], keep)


def _evenly(blocks: list[Named], keep: int) -> list[Named]:
    if len(blocks) <= keep:
        return blocks
    return [blocks[round(i * (len(blocks) - 1) / max(keep - 1, 1))] for i in range(keep)]


def _callable(name: str, module: nn.Module) -> list[Named]:
    """A module list is never called: its elements are."""
    if not isinstance(module, _LISTS):
        return [(name, module)]
    return [named for kid in _kids(name, module) for named in _callable(*kid)]
