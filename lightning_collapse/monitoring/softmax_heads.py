"""Softmax heads: layers whose outputs choose among clusters, prototypes or experts, and not among given classes."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_collapse.monitoring.autograd_graph import RESHAPED, AutogradGraph, Node, children, kind

_SOFTMAX = ("Softmax", "LogSoftmax")
_PASSED = (*RESHAPED, "Clone", "Alias", "Slice", "Select", "SplitWithSizes", "Split", "Mul", "Div", "Sub", "Add", "Neg")


def softmax_heads(graph: AutogradGraph, compared: Iterable[str]) -> tuple[str, ...]:
    """Names of layers of which the loss takes a softmax, and that no target is compared with.

    Only a temperature, a constant such as a center, and views may lie between: of similarities between samples the
    softmax is over samples, and no head.

    Args:
        graph: Of a loss, with the record of the step that made it.
        compared: Names of the modules that are compared with targets.
    """
    found: dict[str, None] = {}
    for node in graph.region():
        if kind(node) in _SOFTMAX:
            found |= dict.fromkeys(_layer_below(graph, children(node)[0]))
    return tuple(name for name in found if name not in set(compared))


def _layer_below(graph: AutogradGraph, node: Node) -> list[str]:
    while node not in graph.returned:
        inner = children(node)
        if kind(node) not in _PASSED or len(inner) != 1:
            return []
        node = inner[0]
    return graph.returned[node]
