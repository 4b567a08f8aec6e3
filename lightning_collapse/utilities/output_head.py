"""Output head: the layer that returns logits, of tokens, classes or actions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_collapse.utilities.execution import Execution, Run
from lightning_collapse.utilities.module_tree import clean_name, is_linear, weighted_layers, width_of
from lightning_collapse.utilities.modules import Tap, classification_head, curve_name


def output_head(root: nn.Module, order: Execution | Sequence[str] | None = None) -> Tap | None:
    """The output of the Linear that a forward pass ends with, ``None`` if there is none with two outputs or more.

    Where that has a single output, such as the value beside a policy, it is the last Linear before it that does not
    feed it, as far as widths tell.

    Args:
        root: The model.
        order: What ran in a training step, in order, as :func:`~lightning_collapse.utilities.default_taps` takes it.

    Example:
        >>> net = nn.ModuleDict({"body": nn.Linear(4, 8), "policy": nn.Linear(8, 3), "value": nn.Linear(8, 1)})
        >>> output_head(net).name
        'policy'
    """
    last, run = classification_head(root, order), Run(root, order)
    if last is None:
        return None
    layers = sorted(weighted_layers(root), key=lambda named: run.start(named[0]))
    layers = [named for layer in layers for named in run.called(*layer) if is_linear(named[1])]
    names = {id(layer): name for name, layer in layers}
    if width_of(last.module) != 1:
        return Tap(curve_name(clean_name(names.get(id(last.module), last.name.removesuffix(".input")))), last.module)
    wanted = getattr(last.module, "in_features", 0)
    for name, layer in reversed([named for named in layers if named[1] is not last.module]):
        if width_of(layer) == wanted:
            wanted = getattr(layer, "in_features", 0)
        elif width_of(layer) > 1:
            return Tap(curve_name(clean_name(name)), layer)
    return None


def norm_behind(root: nn.Module, order: Execution, head: nn.Module) -> str:
    """Name of a norm that runs after the last Linear, if that is the head: then a function makes the logits.

    Example:
        >>> net = nn.ModuleDict({"up": nn.Linear(4, 8), "norm": nn.LayerNorm(8)})
        >>> [norm_behind(net, Execution(order), net["up"]) for order in (("up", "norm"), ("norm", "up"))]
        ['norm', '']
    """
    last = classification_head(root, order)
    modules = {clean_name(name): module for name, module in root.named_modules()}
    places = [i for i, name in enumerate(order.order) if modules.get(name) is head]
    if last is None or last.module is not head or not places:
        return ""
    behind = [name for name in order.order[places[0] + 1 :] if "norm" in type(modules.get(name)).__name__.lower()]
    return next((name for name in behind if any(True for _ in modules[name].parameters(recurse=False))), "")
