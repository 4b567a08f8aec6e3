"""Task of a loss: what a network is trained for, decided from what the loss compares."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from lightning_collapse.monitoring.autograd_graph import VIEWS, AutogradGraph, Node, children, kind
from lightning_collapse.monitoring.loss_comparisons import CLASSES, YES_OR_NO, Comparison, is_log_probability
from lightning_collapse.monitoring.loss_use import Evidence, LossUse
from lightning_collapse.monitoring.value_comparison import is_masked_part, is_mixture, relation

Said = tuple[dict[str, str], dict[str, tuple[str, ...]]]
VALUE = "it ends in one number, the value of a state"
TARGETS = ("classes", "numbers", "yes or no", "probabilities")
_ORDER = ("language model", "classification", "multi-label", "regression", "reconstruction")


def decide(evidence: Evidence, said: Said, conditioning: dict[str, str]) -> LossUse:
    """The task, where it ends, and what is compared; empty where nothing tells.

    In this order: outputs that actions choose, weighed or compared with returns: reinforcement. Features compared
    with each other, in networks that no target reaches: self-supervised; a probe beside is exempt and changes
    nothing. Targets of the batch: those that are the tokens read, or the next, or of as many classes as there are
    tokens: a language model; classes that exclude each other: classification; several that do not: multi-label;
    what the network receives: reconstruction, also beside features that hang on the same weights; other numbers:
    regression. Noise that was added to what the network receives: denoising. Features compared with each other or
    with those of a network beside: self-supervised. Labels that the step has made itself, such as those of a
    detector's anchors: no name, and outputs that are exempt.
    """
    roles, nodes = dict(said[0]), said[1]
    graph, found = evidence.graph, evidence.found
    actions, chosen = _picks(evidence)
    targets = [one for one in found if one.given and one.sort in TARGETS] + chosen
    blank = LossUse(roles=roles, nodes=nodes, conditioning=conditioning, numbers=_numbers(evidence))
    if actions and not [one for one in targets if one.sort == "classes"]:
        by = next((f"`{name}` of the batch" for one in actions for name in one.given), "what the step has drawn")
        why = f"its loss, which chooses outputs by {by} ({actions[0].name})"
        blank = replace(blank, conditioning={**conditioning, **_of_values(evidence, actions)})
        return replace(_with_layers(replace(blank, task="reinforcement", why=why), evidence, actions, {}), last=())
    names = {id(one): _name(evidence, one) for one in targets}
    for one in targets:
        for name in one.given:
            tokens = names[id(one)] == "language model" and name in evidence.tokens
            own = tokens or names[id(one)] == "reconstruction" or roles[name] == "own target"
            roles[name] = "own target" if own else "target"
    labels = [] if targets else _made_labels(evidence)
    assigned = _assigned(evidence, labels)
    features = _features(evidence, labels)
    reached = graph.weights_below([one.node for one in targets or assigned]) if features else set()
    own = "reconstruction" in names.values()  # beside it two Gaussians may be compared, one of them a prior
    below = [graph.weights_below([one.node]) for one in features]
    apart = [w for w in below if (reached.isdisjoint(w) if own else not w <= reached)]
    if targets and not apart:
        first = min(targets, key=lambda one: _ORDER.index(names[id(one)]))
        name = names[id(first)]
        return _with_layers(replace(blank, task=name, why=_why(first)), evidence, targets, names)
    if labels and not apart:
        why = f"its loss compares outputs with labels that the step itself has made ({labels[0].name})"
        return replace(_with_layers(replace(blank, why=why), evidence, assigned, {}), last=())
    if features:
        names_of = dict.fromkeys(name for one in features for name in one.below.modules)
        use = replace(blank, task="self-supervised", why=_why_features(features[0]), embeddings=tuple(names_of))
        return replace(_with_layers(use, evidence, targets, names), directions=0, last=())
    noise = _noise(evidence)
    if noise:
        why = f"its loss, which compares outputs with noise that was added to the inputs ({noise[0].name})"
        return _with_layers(replace(blank, task="denoising", why=why), evidence, noise, {})
    return replace(blank, why=_why_not(graph))


def _numbers(evidence: Evidence) -> dict[str, tuple[str, ...]]:
    """What is compared with whole tensors of the batch, by their places."""
    found: dict[str, tuple[str, ...]] = {}
    for one in evidence.found:
        rows = one.rows() if one.sort == "numbers" and one.given else None
        for name in one.given if rows is not None else ():
            if rows is not None and evidence.batch[name].shape[:1] == rows.shape[:1]:
                found[name] = (*found.get(name, ()), *one.below.modules)
    return found


def _picks(evidence: Evidence) -> tuple[list[Comparison], list[Comparison]]:
    """Choices by actions, and choices that are a cross-entropy written by hand."""
    actions, chosen = [], []
    graph = evidence.graph
    picks = [one for one in evidence.found if one.sort == "pick" and one.given]
    for one in picks:
        source = _through_views(children(one.node)[0])
        result = graph.saved(source).get("result") if kind(source) == "LogSoftmax" else None
        if is_log_probability(source) and not _is_weighed(graph, evidence.found, one.node):
            classes = result.shape[-1] if result is not None else 0
            chosen.append(replace(one, sort="classes", classes=classes))
        elif is_log_probability(source) or any(
            one.node in other.below.between for other in evidence.found if other.sort == "numbers"
        ):
            actions.append(one)
    # actions that the step itself has drawn
    drawn = [one for one in evidence.found if one.sort == "pick" and not one.given]
    actions += [
        one
        for one in drawn
        if is_log_probability(_through_views(children(one.node)[0]))
        and _is_weighed(graph, evidence.found, one.node, signed=True)
    ]
    numbers = [one for one in evidence.found if one.sort == "numbers" and one.given]
    actions += [one for one in numbers if _is_weighed(graph, evidence.found, one.node, signed=True)]
    return actions, chosen


def _of_values(evidence: Evidence, actions: list[Comparison]) -> dict[str, str]:
    """Layers of a critic, whose features may lie along the one number they end in, and none of the policy's."""
    graph, chosen = evidence.graph, {id(one) for one in actions}
    numbers = [one for one in evidence.found if one.sort == "numbers" and id(one) not in chosen]
    values = [one.node for one in numbers if _outputs(evidence, one) == 1]
    of_values, of_policy = (
        {name for node in graph.weights_below(nodes) for name in graph.returned.get(node, ())}
        for nodes in (values, [one.node for one in actions])
    )
    names = [name for name in of_values - of_policy if name in graph.record.layers]
    return {place: VALUE for name in names for place in (name, f"{name}.input")}


def _through_views(node: Node) -> Node:
    while kind(node) in VIEWS and children(node):
        node = children(node)[0]
    return node


def _is_weighed(graph: AutogradGraph, found: list[Comparison], node: Node, signed: bool = False) -> bool:
    """Whether terms of the loss are multiplied by numbers that are no mask: advantages, or returns."""
    above, queue = set(), [node]
    while queue:
        parent = queue.pop()
        if parent not in above:
            above.add(parent)
            queue += graph.parents.get(parent, [])
    for one in found:
        rows = one.rows() if one.sort == "weight" and one.node in above else None
        if rows is not None and not rows.integer:
            values = rows.values.flatten()
            if signed and bool((values < 0).any() and (values > 0).any()):
                return True
            if not signed and bool(((values != 0) & (values != values.max())).any()):
                return True
    return False


def _name(evidence: Evidence, one: Comparison) -> str:
    names = list(one.given)
    if one.sort in ("classes", "probabilities") and _are_tokens(evidence, one, names):
        return "language model"
    if one.sort == "classes":
        return "classification"
    if any(_is_own(evidence, one, name) for name in names):
        return "reconstruction"
    if one.sort == "probabilities" and not one.classes and _are_counts(one):
        return "regression"
    if one.sort == "probabilities":
        return "classification" if one.classes else "multi-label"
    if one.sort == "numbers":
        return "classification" if set(one.given.values()) <= {"one-hot", "mixed"} else "regression"
    return "classification" if _outputs(evidence, one) == 1 or _exclusive(evidence, one) else "multi-label"


def _are_tokens(evidence: Evidence, one: Comparison, names: list[str]) -> bool:
    if not evidence.tokens or one.classes == 0:
        return False
    if any(name in evidence.tokens or one.given[name] == "shifted" for name in names):
        return True
    sequences = [rows for name, rows in evidence.tokens.items() if evidence.batch[name].ndim > 1]
    if one.classes in sequences and any(evidence.batch[name].ndim > 1 for name in names):
        return True
    for name in names:
        for token in evidence.tokens:
            made, given = evidence.samples[name], evidence.samples[token]
            if made is not None and given is not None and made.shape == given.shape and len(made.shape) > 1:
                return relation(made, given) == "shifted" or is_masked_part(made, given)
    return False


def _is_own(evidence: Evidence, one: Comparison, name: str) -> bool:
    """Whether a target is what the network receives, and not what comes next."""
    given, constant = evidence.batch[name], one.constant
    if constant is not None and one.given[name] == "the same storage" and constant.numel() != given.numel():
        return False
    if given.is_floating_point() or one.sort == "numbers":
        others = [other for other in evidence.fed if other not in one.given]
        same_size = any(sample.numel == given.numel() for sample in evidence.raw)
        return evidence.fed.get(name, "passed") != "passed" or (not others and same_size)
    return False


def _outputs(evidence: Evidence, one: Comparison) -> int:
    """How many numbers there are per row or position of what is compared, 0 if that is not known."""
    layers = evidence.graph.record.layers
    widths = [layers[name] for name in one.below.modules if layers.get(name)]
    if widths:
        return widths[0]
    rows = one.constant if one.constant is not None else None
    return 0 if rows is None else rows.shape[-1] if rows.ndim > 1 else 1


def _are_counts(one: Comparison) -> bool:
    """Whether what probabilities are multiplied by is above 1, as no label is."""
    rows = one.rows()
    return rows is not None and bool((rows.values > 1).any())  # a sample is on the host


def _exclusive(evidence: Evidence, one: Comparison) -> bool:
    """Whether exactly one of several answers is yes in each row."""
    rows = one.rows()
    if rows is None or len(rows.shape) != 2 or len(rows.values) < 8:
        return False
    return bool(torch.allclose(rows.values.sum(dim=1), torch.ones(len(rows.values), dtype=torch.float64)))


def _made_labels(evidence: Evidence) -> list[Comparison]:
    """Outputs compared with labels that are not of the batch; not products of features, compared with their places."""
    found = evidence.found
    products = {one.node for one in found if one.sort in ("pair", "weight")}
    made = [one for one in found if one.sort in ("classes", "yes or no") and not one.given and one.below.modules]
    apart = [one for one in made if products.isdisjoint(evidence.graph.region(one.node))]
    return [one for one in apart if _are_labels(one.constant)]


def _assigned(evidence: Evidence, labels: list[Comparison]) -> list[Comparison]:
    """Such labels, and numbers beside them, such as places of boxes: where no network runs that may have made these."""
    calls = [call for call in evidence.graph.record.calls if call.name in evidence.graph.record.layers]
    alone = bool(labels) and all(call.graph for call in calls)
    return labels + [one for one in evidence.found if alone and one.sort == "numbers" and not one.given]


def _are_labels(values: Tensor | None) -> bool:
    """Whether they are classes, or yes and no, and not all alike, as those of a critic are."""
    if values is None or not values.numel() or not bool((values != values.flatten()[0]).any()):
        return False
    return not values.is_floating_point() or bool(((values == 0) | (values == 1)).all())


def _features(evidence: Evidence, labels: list[Comparison]) -> list[Comparison]:
    """Features compared with each other, or with those of a second pass or of a network beside."""
    pairs = [one for one in evidence.found if one.sort == "pair" and not _is_weighed_term(evidence.graph, one)]
    calls, layers = evidence.graph.record.calls, evidence.graph.record.layers
    times = Counter(call.name for call in calls if call.name in layers)
    beside = [call for call in calls if call.name in layers and not call.graph]
    # heads of a detector run once per level
    if not beside and (labels or not any(count > 1 for count in times.values())):
        return pairs
    return pairs + [one for one in evidence.found if one.sort != "pick" and not one.given and _is_made(one)]


def _is_weighed_term(graph: AutogradGraph, one: Comparison) -> bool:
    """Whether a product is of a term of the loss with its own weight, as in a focal loss, and not of features."""
    return any(kind(node) in (*CLASSES, *YES_OR_NO) for node in graph.region(one.node))


def _is_made(one: Comparison) -> bool:
    """Whether a constant that is not of the batch holds rows of different real numbers, and no labels or masks.

    One number per row is no feature, but a return or an advantage.
    """
    rows = one.rows() if one.sort in ("numbers", "probabilities", "weight") and one.below.modules else None
    if rows is None or rows.integer or rows.numel == torch.Size(rows.shape[:1]).numel():
        return False
    values = rows.values.flatten()
    return bool(((values != values.min()) & (values != values.max())).any())


def _noise(evidence: Evidence) -> list[Comparison]:
    found = []
    for one in evidence.found:
        rows = one.rows() if one.sort == "numbers" and not one.given else None
        if rows is None or rows.integer:
            continue
        clean = [given for given in evidence.samples.values() if given is not None and not given.integer]
        if any(is_mixture(sample, given, rows) for sample in evidence.raw for given in clean):
            found.append(one)
    return found


def _with_layers(use: LossUse, evidence: Evidence, targets: list[Comparison], names: dict[int, str]) -> LossUse:
    graph = evidence.graph
    compared: dict[str, None] = {}
    last: dict[str, None] = {}
    ends: dict[tuple[str, ...], int] = {}
    for one in targets:
        compared |= one.below.modules
        before = graph.below([child for end in one.below.ends for child in graph.data(end)])
        inputs = [f"{name}.input" for name in one.below.modules if name in graph.record.layers]
        last |= before.modules | one.below.modules | dict.fromkeys(inputs)
        ends[tuple(one.below.modules)] = _directions(evidence, one, names.get(id(one), ""))
    directions = sum(ends.values()) if all(ends.values()) else 0
    width = _width_before(evidence, list(compared))
    directions = min(directions, width) if width else directions
    return replace(use, directions=directions, compared=tuple(compared), last=tuple(last))


def _directions(evidence: Evidence, one: Comparison, name: str) -> int:
    outputs = _outputs(evidence, one)
    if name == "classification":
        return max((one.classes or outputs) - 1, 1)
    return outputs if name in ("multi-label", "regression") else 0


def _width_before(evidence: Evidence, compared: list[str]) -> int:
    """How many features the last weights multiply, 0 if that is not known."""
    layers = evidence.graph.record.layers
    for call in evidence.graph.record.calls:
        if call.name in compared and call.name in layers and call.inputs and len(call.inputs[0].shape) == 2:
            return call.inputs[0].shape[-1]
    return 0


def _why(one: Comparison) -> str:
    given = ", ".join(f"`{name}`" for name in one.given)
    how = next(iter(one.given.values()))
    made = "" if how == "the same storage" else f", {how}"
    output = f"the output of `{next(iter(one.below.modules))}`" if one.below.modules else "outputs"
    return f"its loss, which compares {output} with {given} of the batch ({one.name}{made})"


def _why_features(one: Comparison) -> str:
    other = "each other" if one.sort == "pair" else "those of another pass or network"
    return f"its loss, which compares outputs of `{next(iter(one.below.modules))}` with {other} ({one.name})"


def _why_not(graph: AutogradGraph) -> str:
    opaque = [kind(node) for node in graph.region() if kind(node).endswith("Backward")]
    if opaque:
        return f"a part of the loss cannot be looked into ({opaque[0]}: compiled, or with a derivative of its own)"
    return "nothing that the loss compares was found in the batch"
