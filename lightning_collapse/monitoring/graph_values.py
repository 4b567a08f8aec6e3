"""Graph values: what a node of the graph of a loss comes to, as far as views and slices of what a module returned."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.monitoring.autograd_graph import VIEWS, AutogradGraph, Node, children, kind
from lightning_collapse.monitoring.call_record import Seen
from lightning_collapse.monitoring.value_comparison import Sample, sample_of

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
            return None if whole is None else _part(whole, node, name, output)
        if name not in VIEWS or len(inner) != 1:
            return None
        output, node = node.next_functions[0][1], inner[0]


def takes_features(node: Node) -> bool:
    """Whether a part of each row is taken, along the last dimension or the channels of a map, or all of a tensor."""
    sizes = getattr(node, "_saved_self_sym_sizes", ())
    dimensions = len(sizes) or len(node._input_metadata[0].shape) + (kind(node) == "Unbind")
    dim = _signed(node._saved_dim) % max(dimensions, 1)
    if kind(node) == "Slice" and sizes and node._saved_start == 0 and node._saved_end >= sizes[dim]:
        return True
    return dim > 0 and (dim == dimensions - 1 or (dim == 1 and dimensions > 3))


def _sample(seen: Seen) -> Sample | None:
    if seen.values is None or seen.values.is_complex():
        return None
    return Sample(seen.shape, seen.values.cpu().double(), not seen.values.is_floating_point())


def _part(whole: Sample, node: Any, name: str, output: int) -> Sample | None:
    """Of each of the first rows."""
    values = whole.values
    dim = _signed(node._saved_dim) % max(values.ndim, 1)
    sizes = getattr(node, "_saved_self_sym_sizes", whole.shape)
    if not dim or tuple(sizes[1:]) != tuple(values.shape[1:]):
        # the first rows of it, as all that was taken of the batch
        full = name == "Slice" and tuple(sizes) == whole.shape and node._saved_end - node._saved_start >= sizes[0]
        return whole if full else None
    values = _taken(values, node, name, dim, output)
    return Sample((whole.shape[0], *values.shape[1:]), values, whole.integer)


def _taken(values: Tensor, node: Any, name: str, dim: int, output: int) -> Tensor:
    if name in ("Select", "Unbind"):
        return values.select(dim, output if name == "Unbind" else _signed(node._saved_index))
    if name == "Slice":
        places = range(values.shape[dim])[node._saved_start : node._saved_end : node._saved_step]
        return values[(slice(None),) * dim + (list(places),)]
    if name == "Split":
        return torch.split(values, node._saved_split_size, dim)[output]
    starts = [0, *accumulate(node._saved_split_sizes)]
    return values.narrow(dim, starts[output], node._saved_split_sizes[output])


def _signed(number: int) -> int:
    return number - 2**64 if number > 2**63 else number
