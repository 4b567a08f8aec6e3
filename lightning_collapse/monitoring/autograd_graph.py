"""Autograd graph of a loss: its nodes, which of them multiply by weights, and what lies between."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_collapse.monitoring.call_record import CallRecord
from lightning_collapse.utilities.private_torch import dimensions_of, saved_tensors

Node = Any
LIMIT = 20000
"""Nodes that are looked at."""
_CHAIN, _DEPTH = 6, 256
_PRODUCTS = ("Addmm", "Mm", "Convolution", "Addbmm", "Baddbmm", "Mv", "Addmv")
RESHAPED: tuple[str, ...] = ("View", "UnsafeView", "Reshape", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy")
"""Operations that leave the order of numbers as it is; with :data:`VIEWS` their values."""
VIEWS = (*RESHAPED, "Transpose", "Permute", "T")
_PRODUCES = (*_PRODUCTS, "Embedding", "Bmm", "Gather", "IndexSelect")


def kind(node: Node) -> str:
    """The name of the operation: ``"NllLoss"`` of a node ``NllLossBackward0``.

    Those of Python, such as compiled regions and functions with a derivative of their own, keep their whole name.

    Example:
        >>> import torch
        >>> kind(torch.ones(2, requires_grad=True).sum().grad_fn)
        'Sum'
    """
    name: str = node.name().rpartition("::")[2]
    return name.rstrip("0123456789").removesuffix("Backward") if name[-1:].isdigit() else name


@dataclass
class Below:
    """What is reached from a node without a weight in between.

    Attributes:
        modules: Names of modules whose output it is, outermost part of a sum only.
        ends: Nodes where the search ended: that multiply by a weight, or sum up what a module returns.
        between: All nodes on the way.
    """

    modules: dict[str, None] = field(default_factory=dict)
    ends: dict[Node, None] = field(default_factory=dict)
    between: dict[Node, None] = field(default_factory=dict)

    def add(self, other: Below) -> None:
        """Take in what another search has found."""
        self.modules |= other.modules
        self.ends |= other.ends
        self.between |= other.between


class AutogradGraph:
    """The graph of a loss before its backward pass, with the modules that returned its tensors.

    Args:
        loss: A number with a gradient.
        record: Of the training step that made it; it must not have been cleared.
        limit: Nodes that are looked at, those next to the loss first.

    Attributes:
        nodes: All of them, breadth first.
        parents: The nodes that each one's value goes into.
        returned: The modules that returned the value of a node.
    """

    def __init__(self, loss: Tensor, record: CallRecord, limit: int = LIMIT) -> None:
        self.record = record
        self.nodes: dict[Node, None] = {}
        self.parents: dict[Node, list[Node]] = {}
        self.returned: dict[Node, list[str]] = {}
        for call in record.calls:
            for output in call.outputs:
                if output.node is not None:
                    self.returned.setdefault(output.node, []).append(call.name)
        self._weights: dict[Node, bool] = {}
        self._is_weight: dict[Node, bool] = {}
        self._saved: dict[Node, dict[str, Tensor]] = {}
        queue = deque([loss.grad_fn] if loss.grad_fn is not None else [])
        while queue and len(self.nodes) < limit:
            node: Node = queue.popleft()
            if node in self.nodes:
                continue
            self.nodes[node] = None
            for child in children(node):
                self.parents.setdefault(child, []).append(node)
                if child not in self.nodes:
                    queue.append(child)

    def saved(self, node: Node) -> dict[str, Tensor]:
        """What a node keeps, see :func:`~lightning_collapse.utilities.private_torch.saved_tensors`."""
        if node not in self._saved:
            self._saved[node] = saved_tensors(node, self.record.packed)
        return self._saved[node]

    def has_weight(self, node: Node) -> bool:
        """Whether a value is multiplied by a weight here: a parameter of two or more dimensions, or a fixed matrix.

        Scales and shifts of normalization have one dimension, and leave directions as they are.
        """
        if node not in self._weights:
            fixed = kind(node) in _PRODUCTS and any(child is None for child, _ in node.next_functions[-2:])
            self._weights[node] = fixed or any(map(self.is_weight, children(node)))
        return self._weights[node]

    def data(self, node: Node) -> list[Node]:
        """The nodes that a node's data come from, without its weights."""
        return [child for child in children(node) if not self.is_weight(child) and not _is_leaf(child)]

    def is_weight(self, node: Node) -> bool:
        """Whether a node is a parameter of two or more dimensions, or a view or cast of one."""
        if node not in self._is_weight:
            self._is_weight[node] = self._leads_to_weights(node, 0, False)
        return self._is_weight[node]

    def _leads_to_weights(self, node: Node, depth: int, split: bool) -> bool:
        if _is_leaf(node):
            return dimensions_of(node) > 1 or split
        # one long vector holds all weights of a sharded model
        split = split or _is_split(node)
        single = dimensions_of(node) < 2 and not split  # such as a penalty on weights
        if single or depth >= _CHAIN or node in self.returned or kind(node) in _PRODUCES:
            return False
        scales = [child for child in children(node) if dimensions_of(child) < 2 and not _is_split(child)]
        inputs = children(node) if split else [child for child in children(node) if child not in scales]
        return bool(inputs) and all(self._leads_to_weights(child, depth + 1, split) for child in inputs)

    def region(self, start: Node | None = None) -> Iterator[Node]:
        """Nodes between the loss, or another start, and the last weights, these included."""
        seen: dict[Node, None] = {}
        queue = deque(list(self.nodes)[:1] if start is None else [start])
        while queue:
            node = queue.popleft()
            if node in seen or _is_leaf(node):
                continue
            seen[node] = None
            yield node
            if not self.has_weight(node):
                queue.extend(self.data(node))

    def below(self, nodes: Iterable[Node]) -> Below:
        """What is reached from nodes, these included, without a weight in between."""
        found, memo = Below(), {}  # type: ignore[var-annotated]
        for node in nodes:
            found.add(self._below(node, False, memo, 0))
        return found

    def _below(self, node: Node, named: bool, memo: dict[Any, Below], depth: int) -> Below:
        if (node, named) in memo:
            return memo[node, named]
        names = [] if _is_leaf(node) else self.returned.get(node, [])
        found = Below(dict.fromkeys(names), {}, {node: None})
        memo[node, named] = found
        named = named or bool(names)
        if self.has_weight(node) or depth >= _DEPTH:
            found.ends[node] = None
            return found
        parts = [self._below(child, named, memo, depth + 1) for child in dict.fromkeys(self.data(node))]
        # what a module has summed up is its output, and not that of the parts
        if named and any(part.ends.keys() != parts[0].ends.keys() for part in parts):
            found.ends[node] = None
            return found
        for part in parts:
            found.add(part)
        return found

    def weights_below(self, nodes: Iterable[Node]) -> set[Node]:
        """All nodes with weights that are reached from nodes, these included, through others with weights."""
        seen: set[Node] = set()
        queue = deque(nodes)
        while queue:
            node = queue.popleft()
            if node not in seen and node in self.nodes:
                seen.add(node)
                queue.extend(self.data(node))
        return {node for node in seen if self.has_weight(node)}


def children(node: Node) -> list[Node]:
    """The nodes that a node's inputs come from."""
    return [child for child, _ in node.next_functions if child is not None]


def _is_split(node: Node) -> bool:
    return kind(node).startswith("Split")


def _is_leaf(node: Node) -> bool:
    return bool(node.name().endswith("AccumulateGrad"))
