"""Graph values: what a node of the graph of a loss comes to, as far as views and slices of what a module returned."""

from __future__ import annotations

from lightning_collapse.monitoring.autograd_graph import VIEWS, AutogradGraph, Node, children, kind
from lightning_collapse.monitoring.call_record import Seen
from lightning_collapse.monitoring.value_comparison import Sample, sample_of
from lightning_collapse.utilities.private_torch import shape_of, taken_part

PARTS = ("Slice", "Select", "Split", "SplitWithSizes", "Unbind")
"""Operations that take a part of a tensor."""
_KEPT = ("Tanh", "Sigmoid", "Exp", "Softmax")
"""Operations that keep their result, and change no order of numbers."""


def value_of(graph: AutogradGraph, node: Node, output: int = 0) -> Sample | None:
    """The first rows of a node's value, on the host; ``None`` where nothing tells.

    Transposed ones come as they were before.

    Args:
        graph: With the record of the step.
        node: One of its nodes.
        output: Which of the node's outputs, where it has several.
    """
    returned = [seen for call in graph.record.calls for seen in call.outputs if seen.node is not None]
    while True:
        own = [seen for seen in returned if seen.node == node]
        if own:
            return _sample(own[0] if len(own) <= output else own[output])
        name, inner = kind(node), children(node)
        if name in _KEPT:
            return sample_of(graph.saved(node).get("result"))
        if name in PARTS and len(inner) == 1:
            whole = value_of(graph, inner[0], node.next_functions[0][1])
            return None if whole is None else _part(whole, node, output)
        if name not in VIEWS or len(inner) != 1:
            return None
        output, node = node.next_functions[0][1], inner[0]


def takes_features(node: Node) -> bool:
    """Whether a part of each row is taken, along the last dimension or the channels of a map, or all of a tensor."""
    part = taken_part(node)
    if part.sizes and len(part.places) == part.sizes[part.dim] > 1:
        return True
    dimensions = len(part.sizes) or len(shape_of(node)) + 1
    return part.dim > 0 and (part.dim == dimensions - 1 or (part.dim == 1 and dimensions > 3))


def _sample(seen: Seen) -> Sample | None:
    if seen.values is None or seen.values.is_complex():
        return None
    # waits for the device, in the first step alone
    return Sample(seen.shape, seen.values.cpu().double(), not seen.values.is_floating_point())


def _part(whole: Sample, node: Node, output: int) -> Sample | None:
    """Of each of the first rows."""
    part, values = taken_part(node, output), whole.values
    sizes = part.sizes or whole.shape
    if not part.dim or sizes[1:] != tuple(values.shape[1:]):
        return whole if sizes == whole.shape and len(part.places) == sizes[0] > 1 else None
    values = values[(slice(None),) * part.dim + (list(part.places),)]
    values = values.squeeze(part.dim) if part.is_one else values
    return Sample((whole.shape[0], *values.shape[1:]), values, whole.integer)
