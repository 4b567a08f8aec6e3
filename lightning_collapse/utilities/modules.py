"""Layer choice: which layers to look at, and what to call them."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import chain, count, groupby, pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.activations import is_activation
from lightning_collapse.utilities.arguments import did_you_mean
from lightning_collapse.utilities.execution import Execution as Execution
from lightning_collapse.utilities.execution import Run
from lightning_collapse.utilities.module_tree import (
    ModuleTree,
    Named,
    innermost,
    is_linear,
    is_list,
    named_modules,
    weighted_children,
)
from lightning_collapse.utilities.module_tree import clean_name as clean_name
from lightning_collapse.utilities.module_tree import weighted_layers as weighted_layers
from lightning_collapse.utilities.module_tree import width_of as width_of
from lightning_collapse.utilities.points import curve_part
from lightning_collapse.utilities.private_torch import (
    SHAPELESS,
    autograd_is_running,
    is_compiled_itself,
    is_inside_transform,
)
from lightning_collapse.utilities.trainer import is_compiled_whole

MAX_DEFAULT_LAYERS = 12
INPUT_SUFFIX = ":input"
_LISTED = 12
VOCABULARY = 4  # a last layer this many times wider than its input is a vocabulary's
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
_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")
T = TypeVar("T")


class Tap(NamedTuple):
    """One place to look at: the output or the input of a module, and the name of its curves."""

    name: str
    module: nn.Module
    side: Literal["output", "input"] = "output"


def curve_name(name: str) -> str:
    """Module name as part of a tag or file name: letters, digits, ``_``, ``-`` and single inner dots.

    Letters of other alphabets are written as their code points, see
    :func:`~lightning_collapse.utilities.points.curve_part`, so that two of them do not become the same underscore.

    Example:
        >>> curve_name("../my block/<b>.0"), curve_name("head:input"), curve_name("\u5934:input")
        ('my_block__b_.0', 'head.input', '-5934-.input')
    """
    name = name[: -len(INPUT_SUFFIX)] + ".input" if name.endswith(INPUT_SUFFIX) else name
    name = name if name.isascii() else re.sub(r"[^\x00-\x7f]+", lambda foreign: curve_part(foreign[0]), name)
    return re.sub(r"\.{2,}", ".", re.sub(r"[^\w.\-]", "_", name, flags=re.ASCII)).strip("._") or "layer"


def find_modules(root: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Submodules by exact clean name or glob, in the order of the model, keyed by clean name.

    Raises:
        ValueError: If a pattern matches nothing; the message lists the first of what there is, and what comes nearest.
    """
    names = {clean_name(name): module for name, module in reversed(list(named_modules(root)))}
    names = {name: module for name, module in names.items() if not is_list(module)}
    names = dict(reversed(names.items()))  # of a compiled or sharded module the outermost wrapper
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            few = list(names)[:_LISTED]
            more = f" and {len(names) - len(few)} more" if len(names) > len(few) else ""
            there = f"It has: {', '.join(few)}{more}.{did_you_mean(pattern, names)}"
            raise ValueError(f"{pattern!r} matches no submodule of {type(root).__name__}. {there}")
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


def default_taps(root: nn.Module, order: Execution | Sequence[str] | None = None) -> list[Tap]:
    """At most a dozen taps that span the depth of any model: block outputs, and the input of a last Linear.

    Networks that are not trained (a momentum encoder, a teacher) take only the places that those in training leave.

    The rule, from the root down (only modules that hold a weight of two or more dimensions count, embeddings do not):

    - the elements of an ``nn.ModuleList``, three or more siblings that only a number tells apart (``layer1``, ...) or
      of one class in an ``nn.Sequential``, or its three or more layers are blocks, and their siblings with them, unless
      one of these holds four times as many weights as all of them;
    - a module with a single such child is a wrapper: look inside;
    - other modules are looked into if there are blocks further down; if there are none, their children are the blocks;
    - what comes before the first block that holds several layers (a stem) is one block, if it is small;
    - what embeds time or another condition is none;
    - of more than eleven blocks lists with less than a twentieth of the weights are thinned to their last, then the
      longest runs of siblings, evenly and with their first and last;
    - the output of a last Linear that widens its input fourfold (a vocabulary) is left out: it has no rank of its own;
    - of a model without any such layer (a factorization of users and items) embeddings are the blocks.

    Args:
        root: The model.
        order: What ran in a training step, see :class:`~lightning_collapse.monitoring.ExecutionOrder`; modules that did
            not run are left out, and order, networks in training and conditions are told by it. By default by the
            order of registration, ``requires_grad`` and names.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [tap.name for tap in default_taps(net)]
        ['0', '2', '2.input']
    """
    run = Run(root, order)
    blocks = [named for block in _root_blocks(root, run) for named in run.called(*block)] or _tables(root, run)
    last = _head(root, run, blocks)
    blocks = sorted((b for b in blocks if b != last or not _widens(b[1])), key=lambda named: run.start(named[0]))
    trained = _thin([named for named in blocks if run.is_trained(named[0])], MAX_DEFAULT_LAYERS - 1, run.tree)
    others = [named for named in blocks if not run.is_trained(named[0])]
    chosen = trained + _thin(others, MAX_DEFAULT_LAYERS - 1 - len(trained), run.tree)
    taps = [Tap(clean_name(name), module) for name, module in blocks if (name, module) in chosen]
    return _unique(taps + ([Tap(clean_name(last[0]) + INPUT_SUFFIX, last[1], "input")] if last else []))


def classification_head(root: nn.Module, order: Execution | Sequence[str] | None = None) -> Tap | None:
    """The input of the Linear that a forward pass ends with, trained or frozen, ``None`` if there is no such layer.

    It is the last layer with a weight; where that is none (a decoder of convolutions beside a classifier) the last
    Linear outside of repeated blocks. Of networks that are not trained only where there are no others.

    Args:
        root: The model.
        order: As in :func:`default_taps`.

    Example:
        >>> net = nn.ModuleDict({"head": nn.Linear(4, 2), "encoder": nn.Linear(8, 4)})
        >>> classification_head(net).name, classification_head(net, ["encoder", "head"]).name
        ('encoder.input', 'head.input')
    """
    run = Run(root, order)
    last = _head(root, run, [named for block in _root_blocks(root, run) for named in run.called(*block)])
    return _unique([Tap(clean_name(last[0]) + INPUT_SUFFIX, last[1], "input")])[0] if last else None


def classifier_head(root: nn.Module, order: Execution | Sequence[str] | None = None) -> Tap | None:
    """The input of the fixed prototypes that run after the last Linear; without any :func:`classification_head`.

    Fixed prototypes are a layer without parameters whose ``weight`` of two or more rows is a buffer, such as
    :class:`~lightning_collapse.layers.ETFClassifier`.

    Args:
        root: The model.
        order: As in :func:`default_taps`.

    Example:
        >>> fixed = nn.Module()
        >>> fixed.register_buffer("weight", torch.eye(2))
        >>> net = nn.ModuleDict({"encoder": nn.Linear(8, 2), "head": fixed})
        >>> classifier_head(net).name, classification_head(net).name
        ('head.input', 'encoder.input')
    """
    last, run = classification_head(root, order), Run(root, order)
    named = [(name, module) for name, module in root.named_modules() if name and run.called(name, module)]
    begins = max((run.start(name) for name, module in named if last and module is last.module), default=-1)
    fixed = [pair for pair in named if _is_fixed(pair[1]) and run.is_trained(pair[0]) and run.start(pair[0]) > begins]
    if not fixed:
        return last
    name, module = max(fixed, key=lambda pair: run.start(pair[0]))
    return _unique([Tap(clean_name(name) + INPUT_SUFFIX, module, "input")])[0]


def activation_taps(root: nn.Module, order: Execution | Sequence[str] | None = None) -> list[Tap]:
    """At most a dozen activation functions that span the depth, what they return; in training, by the given order.

    Where a model has none as modules, the inputs of the linear layers that narrow what another one beside them has
    made (``linear2`` of a transformer's block): between the two is the function. None where there are no such layers.

    Args:
        root: The model.
        order: As in :func:`default_taps`.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(dim=-1))
        >>> [tap.name for tap in activation_taps(net)]
        ['1']
    """
    run = Run(root, order)
    named = [(name, module) for name, module in root.named_modules() if name and run.is_trained(name)]
    named.sort(key=lambda pair: run.start(pair[0]))
    taps = [Tap(clean_name(name), module) for name, module in named if is_activation(module)]
    return _unique(_evenly(taps or _behind_functions(named), MAX_DEFAULT_LAYERS))


def is_channels_first(module: nn.Module, side: Literal["output", "input"] = "output") -> bool:
    """Whether ``module`` returns, or receives, ``(N, C, L)``: its last, or first, layer that cares about shape does."""
    layers = list(innermost(module))
    for layer in layers if side == "input" else reversed(layers):
        if not isinstance(layer, SHAPELESS) and not is_activation(layer):
            return isinstance(layer, _CHANNELS_FIRST)
    return False


def is_compiled(root: nn.Module) -> bool:
    """Whether ``torch.compile`` has wrapped a Lightning module or any module inside it."""
    return is_compiled_whole(root) or any(map(is_compiled_itself, root.modules()))


def let_hooks_be_seen(root: nn.Module) -> None:
    """Call before hooks are registered: has compiled code, if there is any in ``root``, compiled anew with them.

    Dynamo does not guard on hooks: what it compiled before they were there would never call them.
    """
    if is_compiled(root):
        torch.compiler.reset()


def in_backward() -> bool:
    """Whether the autograd engine is running: then a forward call is activation checkpointing's recomputation."""
    # dynamo cannot trace the question, and recomputation of a compiled graph does not run Python again
    return not torch.compiler.is_compiling() and autograd_is_running()


def is_to_be_ignored() -> bool:
    """Whether the running forward call is not to be captured.

    That is a recomputation, one inside :func:`hooks_ignored`, or one inside ``torch.func.vmap`` and such.
    Tensors of a function transform mean nothing once it has returned: what is kept of them raises when it is read.
    """
    return (
        any(applies() for applies in _UNHEARD)
        or in_backward()
        or (not torch.compiler.is_compiling() and is_inside_transform())
    )


_UNHEARD: list[Callable[[], bool]] = []


@contextmanager
def hooks_ignored(applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Have hooks ignore what is called inside, where a function says so: a reader of attention calls layers too."""
    _UNHEARD.append(applies)
    try:
        yield
    finally:
        _UNHEARD.pop()


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _is_fixed(module: nn.Module) -> bool:
    """Whether it is a layer of prototypes that are no parameters."""
    weight = dict(module.named_buffers(recurse=False)).get("weight")
    alone = next(module.parameters(), None) is None and next(module.children(), None) is None
    return alone and weight is not None and weight.ndim == 2 and len(weight) > 1


def _unique(taps: list[Tap]) -> list[Tap]:
    """The same taps under names that are fit for tags and differ from each other."""
    unique: dict[str, Tap] = {}
    for tap in taps:
        plain = curve_name(tap.name)
        names = chain([plain], (f"{plain}_{i}" for i in count(2)))
        name = next(name for name in names if name not in unique)
        unique[name] = tap._replace(name=name)
    return list(unique.values())


def _widens(module: nn.Module) -> bool:
    outputs, inputs = _shape(module)
    return outputs >= VOCABULARY * inputs > 0


def _shape(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer; zeros where they are not known yet."""
    if isinstance(module, nn.Linear):  # the weight may be packed
        return module.out_features, module.in_features
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or nn.parameter.is_lazy(weight) or weight.ndim != 2:
        return 0, 0
    outputs, inputs = weight.shape
    return outputs, inputs


def _behind_functions(named: list[Named]) -> list[Tap]:
    """Inputs of linear layers that can only come from a function of another layer's outputs."""
    taps = []
    for (before, source), (name, module) in pairwise(pair for pair in named if is_linear(pair[1])):
        beside = before.rpartition(".")[0] == name.rpartition(".")[0]
        (hidden, inputs), (outputs, width) = _shape(source), _shape(module)
        if beside and inputs != hidden == width > outputs:
            taps.append(Tap(clean_name(name) + INPUT_SUFFIX, module, "input"))
    return taps


def _root_blocks(root: nn.Module, run: Run) -> list[Named]:
    return weighted_children("", root) if run.tree.blocks(root) else _look_into("", root, run)


def _blocks(name: str, module: nn.Module, run: Run) -> list[Named]:
    kids = weighted_children(name, module)
    if not kids:
        return [(name, module)]
    if len(kids) > 1 and (run.tree.blocks(module) or not any(run.tree.holds_blocks(kid) for _, kid in kids)):
        return kids
    return _look_into(name, module, run)


def _look_into(name: str, module: nn.Module, run: Run) -> list[Named]:
    tree, alike = run.tree, {kid for _, kid in run.tree.alike(module)}
    kids = sorted(weighted_children(name, module), key=lambda named: run.start(named[0]))
    first = next((i for i, (_, kid) in enumerate(kids) if tree.repeats_blocks(kid)), 0)
    small = sum(tree.size(kid) for _, kid in kids) / 4
    found = []
    for i, (key, kid) in enumerate(kids):
        stem = i < first and tree.size(kid) <= small
        found += [(key, kid)] if kid in alike else [_unwrap(key, kid)] if stem else _blocks(key, kid, run)
    return found


def _tables(root: nn.Module, run: Run) -> list[Named]:
    """Embeddings of vectors; not those of single numbers, such as biases."""
    tables = [pair for pair in root.named_modules() if pair[0] and isinstance(pair[1], nn.Embedding | nn.EmbeddingBag)]
    return [pair for name, table in tables if table.embedding_dim > 1 for pair in run.called(name, table)]


def _unwrap(name: str, module: nn.Module) -> Named:
    kids = weighted_children(name, module)
    return _unwrap(*kids[0]) if len(kids) == 1 else (name, module)


def _head(root: nn.Module, run: Run, blocks: list[Named]) -> Named | None:
    layers = sorted(weighted_layers(root), key=lambda named: run.start(named[0]))
    layers = [named for layer in layers for named in run.called(*layer)]
    layers = [named for named in layers if run.is_trained(named[0])] or layers
    if not layers or is_linear(layers[-1][1]):
        return layers[-1] if layers else None
    deep = min((run.start(name) for name, block in blocks if run.tree.is_composite(block)), default=0)
    apart = {
        run.tree.layers(block)[0]
        for name, block in blocks
        if not run.tree.is_composite(block) and not _NUMBERED.search(name)
    }
    heads = [named for named in layers if named[1] in apart and is_linear(named[1]) and run.start(named[0]) > deep]
    return heads[-1] if heads else None


def _thin(blocks: list[Named], keep: int, tree: ModuleTree) -> list[Named]:
    """At most ``keep`` of the blocks.

    Of a list that holds less than a twentieth of the weights (a head of several layers) the last one stays; then the
    longest runs of siblings give way, but for their first and last.
    """
    runs = [list(run) for _, run in groupby(blocks, key=lambda named: named[0].rpartition(".")[0])]
    light = sum(tree.size(block) for _, block in blocks) / 20
    for run in runs:
        numbered = run[-1][0].rpartition(".")[2].isdigit()
        if numbered and sum(map(len, runs)) > keep and sum(tree.size(block) for _, block in run) < light:
            run[:] = run[-1:]
    sizes = [len(run) for run in runs]
    while sum(sizes) > keep and max(sizes) > 2:
        sizes[sizes.index(max(sizes))] -= 1
    return _evenly([named for run, size in zip(runs, sizes, strict=True) for named in _evenly(run, size)], keep)


def _evenly(blocks: list[T], keep: int) -> list[T]:
    if len(blocks) <= keep:
        return blocks
    return [blocks[round(i * (len(blocks) - 1) / max(keep - 1, 1))] for i in range(keep)]
