"""Conditioning paths, routers and variance heads: layers that hold few directions by design, told from one step.

What a layer returns cannot hold more than what it receives. One number per sample, its sine and cosine, or a position
that is the same in every sample are all there is to a time embedding, a table of positions or a network that fits a
curve, and a map of positions receives nothing at all. A router and the head of a variance only scale what others
return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.monitoring.autograd_graph import VIEWS, AutogradGraph, Node, children, kind
from lightning_collapse.monitoring.call_record import Call, CallRecord, Seen

NUMBER, WAVES, POSITIONS, INDEX, SAME = (
    "it receives one number per sample",
    "it receives sines and cosines of one number",
    "it receives positions",
    "it receives one index per sample, beside maps or sequences",
    "it receives nothing of the samples",
)
ROUTER, VARIANCE = "its softmax weighs what others return", "its exponential scales what others return"
NO_GRADIENT = "no gradient passes through it"
_PASSED = (*VIEWS, "Expand", "Clone", "Alias", "Neg")
_KEPT_POSITIVE = (*_PASSED, "Sqrt", "Clamp", "Reciprocal")
_SCALES = ("Mul", "Div", "Add", "Sub", "Clamp")
_CHOICES: tuple[str, ...] = ("Topk", "Sort", "Gather", "Index", "Select", "Slice", "Split", "Unbind", "Scatter")
_CHOICES += ("ScatterAdd", "MaskedFill", "Where", "Sum", "Clamp", "Div", "Max", "Amax")
_CHOSEN = (*_PASSED, *_CHOICES)
_POSITIONS, _WAVES = 4, 4


def conditioned_layers(graph: AutogradGraph) -> dict[str, str]:
    """Names of modules that hold little by design, each with the reason.

    Only what is certain: a module every call of which receives nothing but a condition, directly or through modules and
    functions that receive nothing else; and linear layers whose output does nothing but weigh or scale others.

    Args:
        graph: Of a loss, with the record of the step that made it.
    """
    found = _fed_by_conditions(graph)
    for call in graph.record.calls:
        if call.name in graph.record.layers and call.name not in found:
            for output in call.outputs:
                if output.node is not None and (reason := _scales_others(graph, output.node)):
                    found[call.name] = reason
    return found


def without_gradient(record: CallRecord) -> dict[str, str]:
    """Names of modules no call of which takes part in training, such as those of a teacher."""
    trained = {call.name for call in record.calls if call.graph}
    return {call.name: NO_GRADIENT for call in record.calls if call.name not in trained}


def _fed_by_conditions(graph: AutogradGraph) -> dict[str, str]:
    raw = [seen for call in graph.record.calls for seen in call.inputs if seen.node is None]
    has_maps = any(_is_map(seen) for seen in raw)
    nodes: dict[Node, str] = {}
    reasons: dict[str, str] = {}
    refuted: set[str] = set()
    calls = graph.record.calls
    alone = {call.name for call in calls if call.numbers_only} - {c.name for c in calls if not c.numbers_only}
    for call in calls:
        inside = any(call.name.startswith(f"{name}.") for name in alone)
        reason = _reason(call, nodes, has_maps, inside)
        if not reason:
            refuted.add(call.name)
            continue
        reasons.setdefault(call.name, reason)
        nodes |= {output.node: reason for output in call.outputs if output.node is not None}
    return {name: reason for name, reason in reasons.items() if name not in refuted}


def _reason(call: Call, nodes: dict[Node, str], has_maps: bool, inside: bool) -> str:
    if not call.inputs:
        if not call.numbers_only:
            return ""
        # what layers in it have made of nothing of the samples
        made = [seen.node is not None and _of_node(seen.node, nodes) for seen in call.outputs]
        return SAME if made and all(made) else ""
    reasons = [
        _of_node(seen.node, nodes) if seen.node is not None else _of_raw(seen, has_maps) or _of_no_sample(seen, inside)
        for seen in call.inputs
    ]
    return reasons[0] if all(reasons) else ""


def _of_no_sample(seen: Seen, inside: bool) -> str:
    """A single row, made inside a module that receives nothing; several may be drawn, as those of a generator."""
    return SAME if inside and seen.shape[:1] == (1,) else ""


def _is_map(seen: Seen) -> bool:
    integer = seen.values is not None and not seen.values.is_floating_point()
    return len(seen.shape) > (1 if integer else 2)


def _of_raw(seen: Seen, has_maps: bool) -> str:
    if seen.values is None or seen.values.is_complex() or not seen.shape:
        return ""
    if seen.values.is_floating_point():
        if seen.numel == seen.shape[0] > 1:
            return NUMBER
        return WAVES if _are_waves(seen.values) else ""
    if _are_positions(seen.values):
        return POSITIONS
    return INDEX if has_maps and len(seen.shape) == 1 else ""


def _are_waves(values: Tensor) -> bool:
    if values.ndim != 2 or values.shape[1] < _WAVES or values.shape[1] % 2 or len(values) < 2:
        return False
    rows = values.double()
    half = rows.square().sum(dim=1) * 2 / rows.shape[1]
    return bool((half - 1).abs().max() < 1e-2) and bool(rows.abs().max() < 1 + 1e-2)


def _are_positions(values: Tensor) -> bool:
    rows = values.reshape(-1, values.shape[-1])
    if rows.shape[1] < _POSITIONS:
        return False
    return bool((rows == torch.arange(rows.shape[1], device=rows.device) + rows[:1, :1]).all())


def _of_node(node: Node, nodes: dict[Node, str]) -> str:
    """The reason, if all that is reached from a node is what conditioned modules returned."""
    reason, queue, seen = "", [node], set()
    while queue:
        node = queue.pop()
        if node in nodes:
            reason = nodes[node]
        elif node not in seen:
            seen.add(node)
            inner = children(node)
            if not inner or node.name().endswith("AccumulateGrad") or _takes_a_constant(node):
                return ""
            queue += inner
    return reason


def _takes_a_constant(node: Node) -> bool:
    """Whether data without gradient enter here; numbers do not count."""
    if all(child is not None for child, _ in node.next_functions):
        return False
    if kind(node) not in ("Mul", "Div"):
        return True
    saved: Any = getattr(node, "_saved_other", None)
    return not isinstance(saved, Tensor) or saved.numel() > 1


def _scales_others(graph: AutogradGraph, node: Node) -> str:
    """Whether the only way from a layer's output leads through a softmax, or one way through an exponential."""
    firsts = list(_up(graph, node, lambda above: kind(above) in _PASSED or _is_scaled(above)))
    if firsts and all(kind(first) in ("Softmax", "Topk") for first in firsts):
        weighs = (other for first in firsts for other in _up(graph, first, lambda above: kind(above) in _CHOSEN))
        return ROUTER if any(_multiplies_others(graph, above, node) for above in weighs) else ""
    for first in firsts:
        if kind(first) in ("Exp", "Softplus"):
            scaled = _up(graph, first, lambda above: kind(above) in _KEPT_POSITIVE or _is_scaled(above))
            if any(_multiplies_others(graph, above, node, noise=True) for above in scaled):
                return VARIANCE
    return ""


def _up(graph: AutogradGraph, node: Node, passes: Callable[[Node], bool]) -> Iterator[Node]:
    """The first nodes above that do not pass a value on."""
    queue, seen = list(graph.parents.get(node, [])), set()
    while queue:
        above = queue.pop()
        if above in seen:
            continue
        seen.add(above)
        if passes(above):
            queue += graph.parents.get(above, [])
        else:
            yield above


def _is_scaled(node: Node) -> bool:
    """A number, or noise, on top: nothing else with a gradient."""
    if kind(node) not in _SCALES or len(children(node)) != 1:
        return False
    saved: Any = getattr(node, "_saved_other", None)
    return not isinstance(saved, Tensor) or saved.numel() == 1


def _multiplies_others(graph: AutogradGraph, above: Node, node: Node, noise: bool = False) -> bool:
    if kind(above) not in ("Mul", "Div", "Bmm", "Mm", "Addcmul"):
        return False
    others = [child for child in children(above) if node not in graph.below([child]).between]
    return bool(others) or (noise and any(child is None for child, _ in above.next_functions))
