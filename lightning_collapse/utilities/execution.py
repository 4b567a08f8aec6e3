"""Execution of a model: which of its modules run, in which order, and on the way of the gradients or not."""

import re
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import nn

from lightning_collapse.utilities.module_tree import (
    ModuleTree,
    Named,
    clean_name,
    is_linear,
    layers_of,
    named_modules,
    weighted_children,
    weighted_layers,
)

_CONDITION = re.compile(
    r"(^|[._])(t|temb|time(_?steps?)?|sigma|noise|cond(ition\w*)?)(_?(text_)?(emb\w*|mlp|proj\w*|fc|linear|net))?\d*(\.|$)"
)


class Execution(NamedTuple):
    """Clean names of the modules that ran in a training step.

    Attributes:
        order: All, in the order of their first call.
        beside: Those off the way of the gradients: a momentum encoder, a teacher, a frozen backbone.
    """

    order: tuple[str, ...]
    beside: tuple[str, ...] = ()


def functional_layers(root: nn.Module, not_called: Collection[str]) -> list[str]:
    """Of layers that were not called, by clean name, those with a gradient: a function was given their weights.

    Weights that a layer shares with one that was called, or with an embedding, tell nothing.

    Example:
        >>> import torch
        >>> net = nn.ModuleDict({"called": nn.Linear(4, 4), "given": nn.Linear(4, 2), "unused": nn.Linear(4, 4)})
        >>> nn.functional.linear(net["called"](torch.ones(1, 4)), net["given"].weight).sum().backward()
        >>> functional_layers(net, {"given", "unused"})
        ['given']
    """
    layers = {clean_name(name): layer for name, layer in weighted_layers(root)}
    others = [layer for name, layer in layers.items() if name not in not_called]
    others += [module for module in root.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    shared = {id(p) for layer in others for p in layer.parameters()}
    trained = {
        name: any(p.grad is not None and id(p) not in shared for p in layers[name].parameters())
        for name in layers
        if name in not_called
    }
    return [name for name, is_trained in trained.items() if is_trained]


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


class Run:
    """What is known of a run of the model: which modules are called, when, and on the way of the gradients or not."""

    def __init__(self, root: nn.Module, order: Execution | Sequence[str] | None) -> None:
        self.tree = ModuleTree()
        called: Sequence[str]
        if order is None:
            names = [clean_name(name) for name, _ in root.named_modules(remove_duplicate=False)]
            conditions, beside = _conditions(root), _networks_beside(root, self.tree)
            called = [name for name in names if not _is_in(name, conditions)]
            self._path = {name for name in called if not _is_in(name, beside)}
        else:
            called, off = order if isinstance(order, Execution) else Execution(tuple(order))
            self._path = set(called) - set(off) or set(called)
        self._called = {"", *called}
        self._start: dict[str, int] = {}
        for i, name in enumerate(called):
            for around in accumulate(name.split("."), "{}.{}".format):
                self._start.setdefault(around, i)

    def start(self, name: str) -> int:
        """The place of its first call, or of a module's inside it."""
        return self._start.get(clean_name(name), len(self._start))

    def called(self, name: str, module: nn.Module) -> list[Named]:
        """The module, or those inside it that are called where it is not itself."""
        if clean_name(name) in self._called:
            return [(name, module)]
        return [named for kid in weighted_children(name, module) for named in self.called(*kid)]

    def is_trained(self, name: str) -> bool:
        """Whether gradients pass through it."""
        return clean_name(name) in self._path or not name


def _networks_beside(root: nn.Module, tree: ModuleTree) -> set[str]:
    """Frozen modules of several layers in a model that trains; a single frozen layer may be its head."""
    if not _is_trained(root):
        return set()
    return {
        clean_name(name)
        for name, module in named_modules(root)
        if not _is_trained(module) and tree.is_composite(module)
    }


def _conditions(root: nn.Module) -> set[str]:
    """Modules of linear layers with the name of an embedding of time or noise, beside others."""
    layers = weighted_layers(root)
    found = {
        name
        for name, module in named_modules(root)
        if _CONDITION.search(name.lower()) and all(is_linear(layer) for _, layer in layers_of(name, module))
    }
    return {clean_name(name) for name in found} if any(not _is_in(name, found) for name, _ in layers) else set()


def _is_in(name: str, modules: set[str]) -> bool:
    return any(around in modules for around in accumulate(name.split("."), "{}.{}".format))
