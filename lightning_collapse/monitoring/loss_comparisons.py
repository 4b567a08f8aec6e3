"""Comparisons of a loss: nodes of its graph that compare what a model returned with a constant or with itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.monitoring.autograd_graph import VIEWS, AutogradGraph, Below, Node, children, kind
from lightning_collapse.monitoring.graph_values import PARTS, takes_features, value_of
from lightning_collapse.monitoring.value_comparison import Sample, sample_of
from lightning_collapse.utilities.private_torch import shape_of

CLASSES = ("NllLoss", "NllLoss2D", "MultiMarginLoss", "MultiMargin", "CtcLoss")
NUMBERS = ("MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss")
YES_OR_NO = ("BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "SoftMarginLoss", "MultilabelMarginLoss")
_PROBABILITIES = ("LogSoftmax", "Softmax", "Sigmoid", "LogSigmoid", "Log", "LogSigmoidForward")
_PICKS = ("Gather", "Index", "IndexSelect", "Take")
_ERRORS = ("Pow", "Abs", "Mul", "LinalgVectorNorm", "Norm")
_PAIRS = ("Mul", "Mm", "Bmm", "Dot", "Mv", "Cdist", "EuclideanDist", "PairwiseDistance", *NUMBERS)
_MIXES = ("Mm", "Bmm", "Dot", "Mv", "Cdist", "EuclideanDist")
_MOVES = ("Index", "IndexSelect", "Gather", "Roll", "Flip")


@dataclass
class Comparison:
    """One place where a loss compares.

    Attributes:
        node: The node.
        sort: ``"classes"``, ``"numbers"``, ``"yes or no"``, ``"probabilities"``, ``"pick"`` (an element is chosen by an
            index), ``"weight"`` (terms are multiplied by it) or ``"pair"`` (both sides have a gradient).
        below: What is compared, up to the last weights.
        constant: What it is compared with; ``None`` where that has a gradient, or must be computed.
        sample: Its first rows, where they are computed: an error was saved and not the target.
        classes: Of how many classes one is right, 0 where that is not known.
        given: Tensors of the batch that the constant is, or was made of, with how.
    """

    node: Node
    sort: str
    below: Below
    constant: Tensor | None = None
    sample: Sample | None = None
    classes: int = 0
    given: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The operation."""
        return kind(self.node)

    def rows(self) -> Sample | None:
        """The first rows of the constant, on the host."""
        if self.sample is None:
            self.sample = sample_of(self.constant)
        return self.sample


def comparisons(graph: AutogradGraph) -> list[Comparison]:
    """All comparisons between the loss and the last weights, from the loss on."""
    found = []
    for node in graph.region():
        name = kind(node)
        if name in (*CLASSES, *NUMBERS, *YES_OR_NO):
            found += _of_loss(graph, node, name)
        elif name == "Xlogy" and node.next_functions[0][0] is None:  # counts, and the logarithm of their rate
            found.append(Comparison(node, "numbers", graph.below(graph.data(node)), graph.saved(node).get("self")))
        elif name in _PICKS:
            found += [Comparison(node, "pick", graph.below(graph.data(node)), index) for index in _index(graph, node)]
        elif name in _ERRORS or name in _PAIRS:
            found += _error(graph, node) or _product(graph, node, name)
        elif name.endswith("Backward"):
            found += _of_views(graph, node)
    return found


def _of_views(graph: AutogradGraph, node: Node) -> list[Comparison]:
    """Of a function with a derivative of its own that takes what one module has returned twice: two views."""
    sides = [child for child, _ in node.next_functions if child is not None]
    names = [graph.below([side]).modules.keys() for side in sides]
    several = [side for side, of in zip(sides, names, strict=True) if of]
    alike = len(several) > 1 and set.intersection(*(set(of) for of in names if of))
    return _pair(graph, node, several) if alike else []


def _of_loss(graph: AutogradGraph, node: Node, name: str) -> list[Comparison]:
    saved = graph.saved(node)
    sides = [child for child, _ in node.next_functions[:2]]
    if len(sides) > 1 and None not in sides and sides[0] != sides[1]:
        return _pair(graph, node, sides)
    target = saved.get("self") if sides[0] is None else saved.get("target", saved.get("targets"))
    if target is None:
        return []
    sort = "classes" if name in CLASSES else "numbers" if name in NUMBERS else "yes or no"
    below = graph.below(graph.data(node))
    return [Comparison(node, sort, below, target, classes=_classes(saved) if sort == "classes" else 0)]


def _classes(saved: dict[str, Tensor]) -> int:
    scores = saved.get("self", saved.get("log_probs"))
    if scores is None:
        return 0
    return scores.shape[1] if scores.ndim in (2, 4) else scores.shape[-1] if scores.ndim else 0


def is_log_probability(node: Node) -> bool:
    """Whether a value is a logarithm of probabilities: a log-softmax, or scores less their log-sum-exp."""
    normalized = kind(node) == "Sub" and any(kind(child) == "Logsumexp" for child in children(node))
    return normalized or kind(node) in ("LogSoftmax", "Log")


def _error(graph: AutogradGraph, node: Node) -> list[Comparison]:
    """Of ``(prediction - target) ** 2`` and such: the difference is saved, and the prediction was recorded.

    It may be divided by a scale that has a gradient, as in the density of a distribution.
    """
    sides = [child for child, _ in node.next_functions]
    if kind(node) == "Mul" and (len(sides) < 2 or sides[0] != sides[1]):
        return []  # a term times its weight
    inner, keeper = children(node), node
    while len(inner) == 1 and kind(inner[0]) in (*VIEWS, "Add", "Clamp", "Mul") and len(children(inner[0])) == 1:
        inner = children(inner[0])  # such as the constant that keeps a norm from zero
    if inner and kind(inner[0]) == "Div" and all(child == inner[0] for child in inner):
        keeper, inner = inner[0], children(inner[0])[:1]
    difference = inner[0] if inner else None
    if difference is None or any(child != difference for child in inner) or kind(difference) != "Sub":
        return []
    sides = [child for child, _ in difference.next_functions]
    if None not in sides:
        return _pair(graph, node, sides) if sides[0] != sides[1] else []
    saved = graph.saved(keeper).get("self")
    edge = next((edge for edge in difference.next_functions if edge[0] is not None), None)
    if saved is None or edge is None:
        return []
    seen = value_of(graph, *edge)
    sample = None if seen is None else _sum(seen, saved, 1 if sides[0] is None else -1)
    return [Comparison(difference, "numbers", graph.below([edge[0]]), None, sample)]


def _sum(prediction: Sample, difference: Tensor, sign: int) -> Sample | None:
    error = sample_of(difference)
    if error is None:
        return None
    if prediction.numel != difference.numel():
        return _sum_of_rows(prediction, error, sign)
    n = min(prediction.values.numel(), error.values.numel())
    values = prediction.values.flatten()[:n] + sign * error.values.flatten()[:n]
    width = difference.numel() // max(len(difference), 1) if difference.ndim else 1
    values = values[: n // width * width].view(-1, *difference.shape[1:]) if difference.ndim else values
    return Sample(tuple(difference.shape), values, False)


def _sum_of_rows(prediction: Sample, error: Sample, sign: int) -> Sample | None:
    """Where predictions of several components, or of fewer dimensions, are stretched over what is compared."""
    rows = min(len(prediction.values), len(error.values)) if prediction.shape and error.shape else 0
    if not rows or prediction.shape[0] != error.shape[0] or len(prediction.shape) != len(error.shape):
        return None
    pairs = zip(prediction.shape[1:], error.shape[1:], strict=True)
    if any(own not in (1, whole) for own, whole in pairs):
        return None
    return Sample(error.shape, prediction.values[:rows] + sign * error.values[:rows], False)


def _product(graph: AutogradGraph, node: Node, name: str) -> list[Comparison]:
    sides = [child for child, _ in node.next_functions[:2]]
    if name not in _PAIRS or len(sides) < 2 or sides[0] is None is sides[1]:
        return []
    if None not in sides:
        return _pair(graph, node, sides)
    saved = graph.saved(node)
    constant = saved.get("self" if sides[0] is None else "other", saved.get("mat2"))
    varying: Any = next(side for side in sides if side is not None)
    if constant is None or constant.numel() < 2:
        return []
    source = varying
    while kind(source) in (*VIEWS, "Neg") and len(children(source)) == 1:
        source = children(source)[0]
    of_probabilities = kind(source) in _PROBABILITIES or is_log_probability(source)
    sort, classes = "probabilities" if of_probabilities else "weight", 0
    if any(_is_exponential(parent, varying) for parent in graph.parents.get(node, ())):
        sort = "numbers"
    if of_probabilities:
        result = graph.saved(source).get("result")
        dim = getattr(source, "_saved_dim", None)
        if result is not None and isinstance(dim, int):
            classes = result.shape[dim - 2**64 if dim > 2**63 else dim]
    return [Comparison(node, sort, graph.below([varying]), constant, classes=classes)]


def _is_exponential(node: Node, scores: Node) -> bool:
    """Whether a product is subtracted from the exponential of its scores, as counts of Poisson are."""
    others = [child for child in children(node) if kind(child) == "Exp"] if kind(node) == "Sub" else []
    return any(scores in children(other) for other in others)


def _pair(graph: AutogradGraph, node: Node, sides: list[Node]) -> list[Comparison]:
    """Both sides are what modules returned, with weights behind them, of two samples, views or networks."""
    parts = [graph.below([side]) for side in sides[:2]]
    if not all(part.ends and part.modules for part in parts) or _are_of_one_pass(graph, node, sides, parts):
        return []
    return [Comparison(node, "pair", graph.below(sides[:2]))]


def _are_of_one_pass(graph: AutogradGraph, node: Node, sides: list[Node], parts: list[Below]) -> bool:
    """Whether two outputs for one and the same row are combined: parameters of a density, or a layer of a flow.

    They are of heads on the same features, or one was computed of the other, and nothing has divided or moved rows.
    """
    if kind(node) in _MIXES or kind(node).endswith("Backward"):
        return False
    shapes = [shape_of(side) for side in sides[:2]]
    if len(shapes[0]) != len(shapes[1]) or not len(shapes[0]) or shapes[0][0] != shapes[1][0]:
        return False
    between = [inner for part in parts for inner in part.between]
    if any(kind(inner) in _MOVES or (kind(inner) in PARTS and not takes_features(inner)) for inner in between):
        return False
    features = [{child for end in part.ends for child in (end, *graph.data(end))} for part in parts]
    if not features[0].isdisjoint(features[1]):
        return True
    upstream = [graph.weights_below(part.ends) for part in parts]
    return any(part.ends.keys() <= above for part, above in zip(parts, reversed(upstream), strict=True))


def _index(graph: AutogradGraph, node: Node) -> list[Tensor]:
    """What chooses one number of each row; not what chooses rows."""
    chosen = [value for name, value in graph.saved(node).items() if name.startswith("ind")]
    if (kind(node) == "Index" and len(chosen) < 2) or kind(node) == "IndexSelect":
        return []
    return [value for value in chosen if value.dtype in (torch.long, torch.int) and value.numel() > 1]
