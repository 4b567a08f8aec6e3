"""What a loss compares: roles of the batch's tensors and the layer that is compared with the targets, read once.

Between ``training_step`` and ``backward`` the autograd graph of the loss is alive, and its nodes keep what their
derivative needs: ``NllLoss`` and ``MseLoss`` their target, ``Gather`` its index. A tensor of the batch whose storage
or values one of them keeps has the role that the node tells, and one that none keeps does not reach the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.monitoring.autograd_graph import AutogradGraph, kind
from lightning_collapse.monitoring.call_record import Call, CallRecord, Seen, storage_of
from lightning_collapse.monitoring.conditioning import ROUTER, conditioned_layers, without_gradient
from lightning_collapse.monitoring.loss_comparisons import Comparison, comparisons
from lightning_collapse.monitoring.loss_task import decide
from lightning_collapse.monitoring.loss_use import ROLES, Evidence, LossUse
from lightning_collapse.monitoring.softmax_heads import softmax_heads
from lightning_collapse.monitoring.value_comparison import Sample, correlation, narrowed, relation, sample_of
from lightning_collapse.utilities.private_torch import table_rows
from lightning_collapse.utilities.targets import targets_of

_ROLE_OF = {"classes": "target", "numbers": "target", "yes or no": "target", "probabilities": "target"}
_ALIKE = 0.3
"""Correlation of an input with a tensor of the batch that it was made of, such as by adding noise."""
_DEEP = 6


def tensors_of(batch: Any, name: str = "", depth: int = _DEEP) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a batch, with their places.

    Example:
        >>> import torch
        >>> [name for name, _ in tensors_of((torch.ones(2), {"y": [torch.ones(1)]}))]
        ['0', '1.y.0']
    """
    if isinstance(batch, Tensor):
        yield name or "batch", batch
        return
    if depth == 0 or isinstance(batch, str):
        return
    items: Any = ()
    if isinstance(batch, Mapping):
        items = batch.items()
    elif isinstance(batch, Sequence):
        items = enumerate(batch)
    elif is_dataclass(batch):
        items = [(one.name, getattr(batch, one.name)) for one in fields(batch)]
    elif hasattr(batch, "__dict__"):
        items = vars(batch).items()
    for key, value in items:
        yield from tensors_of(value, f"{name}.{key}" if name else str(key), depth - 1)


def read_loss(loss: Tensor, batch: Any, record: CallRecord) -> LossUse:
    """Read what a loss compares, before its backward pass.

    It looks at the graph of one loss, and compares values where storages differ. That waits for the device, for what
    the modules received and for each tensor that is compared: it is for the first batch of a run. Compiled
    steps, functions with a derivative of their own and most losses written by hand tell nothing: the task stays
    unknown.

    Args:
        loss: A number whose graph is alive.
        batch: What the training step received.
        record: What modules were called; see :class:`~lightning_collapse.monitoring.CallRecord`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> record, x, y = CallRecord(net), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> record.armed = True
        >>> loss = nn.functional.cross_entropy(net(x), y)
        >>> use = read_loss(loss, (x, y), record)
        >>> use.task, use.directions, use.compared, use.roles
        ('classification', 2, ('2',), {'0': 'input', '1': 'target'})
        >>> record.clear()
    """
    if loss.grad_fn is None:
        return LossUse(why="the loss has no gradient")
    record.to_host()
    graph = AutogradGraph(loss, record)
    tensors = dict(tensors_of(batch))
    evidence = _match(graph, tensors, comparisons(graph))
    use = decide(evidence, _roles(evidence), without_gradient(record) | conditioned_layers(graph))
    routers = [name for name, reason in use.conditioning.items() if reason == ROUTER]
    return replace(use, heads=(*softmax_heads(graph, use.compared), *routers))


def target_of_loss(use: LossUse | None, batch: Any, head: str) -> Tensor | None:
    """The tensor of a batch that the outputs of a head are compared with as numbers.

    Where the loss does not tell, it is where :func:`~lightning_collapse.utilities.targets.targets_of` looks, or if the
    model receives that one, the only tensor of numbers that it does not receive.

    Args:
        use: What the first loss uses, if it was read.
        batch: The batch.
        head: Name of the layer; of several tensors that of its own outputs is meant, and then the usual one.

    Example:
        >>> use = LossUse(roles={"0": "input", "1": "input", "2": "target"}, numbers={"2": ("head",)})
        >>> batch = (torch.tensor([0, 1]), torch.zeros(2, 3), torch.tensor([5.0, 6.0]))
        >>> target_of_loss(use, batch, "head"), target_of_loss(None, batch, "head").shape
        (tensor([5., 6.]), torch.Size([2, 3]))
    """
    usual = targets_of(batch)
    if use is None:
        return usual
    tensors = dict(tensors_of(batch))
    place = next((name for name, tensor in tensors.items() if tensor is usual), "")
    compared = [name for name in use.numbers if name in tensors]
    compared = [name for name in compared if head in use.numbers[name]] or compared
    if not compared and use.roles.get(place) == "input" and use.task in ("", "regression"):
        compared = [name for name, x in tensors.items() if x.is_floating_point() and use.roles.get(name) != "input"]
    return tensors[compared[0]] if len(compared) == 1 and place not in compared else usual


def _match(graph: AutogradGraph, batch: dict[str, Tensor], found: list[Comparison]) -> Evidence:
    storages: dict[int, list[str]] = {}
    for name, tensor in batch.items():
        if (pointer := storage_of(tensor)) and tensor.numel():
            storages.setdefault(pointer, []).append(name)
    samples = {name: sample_of(tensor) for name, tensor in batch.items()}
    for one in found:
        one.given = _by_storage(one, batch, storages) or _by_values(one, samples)
    raw = _raw(graph.record.calls)
    layers = _layers(graph)
    fed, tokens = _fed(graph, storages, layers)
    received = [sample for seen in raw if (sample := _sample(seen)) is not None]
    at_layers = [sample for seen in _raw(layers) if (sample := _sample(seen)) is not None]
    for name, given in samples.items():
        if given is not None and fed.get(name) != "input":
            how = _likeness(given, at_layers) or fed.get(name, "passed" if _likeness(given, received) else "")
            fed |= {name: how} if how else {}
    _tokens_by_value(graph, storages, samples, tokens)
    fed |= dict.fromkeys(tokens, "input")
    return Evidence(graph, found, batch, fed, tokens, samples, received)


def _by_storage(one: Comparison, batch: dict[str, Tensor], storages: dict[int, list[str]]) -> dict[str, str]:
    if one.constant is None:
        return {}
    shared = storages.get(storage_of(one.constant), [])
    exact = [name for name in shared if one.constant.data_ptr() == batch[name].data_ptr()]
    return dict.fromkeys(exact or shared, "the same storage")


def _by_values(one: Comparison, samples: dict[str, Sample | None]) -> dict[str, str]:
    rows = one.rows() if one.sort != "pair" else None
    if rows is None:
        return {}
    ways = [rows, *([narrow] if (narrow := narrowed(rows)) is not None else [])]
    known = {name: given for name, given in samples.items() if given is not None}
    hows = {name: next(filter(None, (relation(way, given) for way in ways)), "") for name, given in known.items()}
    exact = {"weight": ["the same values"], "pick": ["the same values", "shifted"]}.get(one.sort, [])
    return {name: how for name, how in hows.items() if how and (not exact or how in exact)}


def _layers(graph: AutogradGraph) -> list[Call]:
    """Calls of modules that call no other and are no part of the loss: a model may be given its targets, too."""
    calls, terms = graph.record.calls, {node for node in graph.region() if not graph.has_weight(node)}
    around = {name[:dot] for name in {call.name for call in calls} for dot, mark in enumerate(name) if mark == "."}
    return [c for c in calls if c.name not in around and not any(output.node in terms for output in c.outputs)]


def _raw(calls: Sequence[Call]) -> list[Seen]:
    return [seen for call in calls for seen in call.inputs if seen.node is None]


def _likeness(given: Sample, received: list[Sample]) -> str:
    hows = {relation(sample, given) for sample in received if sample.integer == given.integer} - {""}
    if "the same values" in hows or (hows and (given.integer or _has_features(given))):
        return "input"
    alike = [one for one in received if _may_be_noised(given, one)]
    return "noised input" if any(abs(correlation(one, given)) > _ALIKE for one in alike) else ""


def _has_features(sample: Sample) -> bool:
    """Whether rows hold several numbers: of single ones, targets may have the order of what predicts them."""
    return sample.numel > torch.Size(sample.shape[:1]).numel()


def _may_be_noised(clean: Sample, received: Sample) -> bool:
    """Whether one may be the other but for noise: targets correlate with what predicts them, too.

    Such as classes, a single number, and the regions of an image.
    """
    if clean.integer or received.integer or not _has_features(clean):
        return False
    return received.is_binary or not clean.is_binary


def _fed(
    graph: AutogradGraph, storages: dict[int, list[str]], layers: list[Call]
) -> tuple[dict[str, str], dict[str, int]]:
    fed: dict[str, str] = {}
    tokens: dict[str, int] = {}
    for seen in _raw(graph.record.calls):
        fed |= dict.fromkeys(storages.get(seen.pointer, ()), "passed")
    for call in layers:
        for seen in call.inputs:
            for name in storages.get(seen.pointer, ()) if seen.node is None else ():
                fed[name] = "input"
                if call.name in graph.record.tables:
                    tokens[name] = graph.record.tables[call.name]
    terms = {node for node in graph.region() if not graph.has_weight(node)}
    for node in graph.nodes.keys() - terms:
        looked_up = kind(node) == "Embedding"
        for saved in graph.saved(node).values():
            for name in storages.get(storage_of(saved), ()):
                fed[name] = "input"
                if looked_up:
                    tokens.setdefault(name, table_rows(node))
    return fed, tokens


def _tokens_by_value(
    graph: AutogradGraph, storages: dict[int, list[str]], samples: dict[str, Sample | None], tokens: dict[str, int]
) -> None:
    """Copies of tokens that were cut, such as those that a decoder receives."""
    for call in graph.record.calls:
        rows = graph.record.tables.get(call.name, 0)
        for seen in call.inputs if rows else ():
            looked_up = None if seen.pointer in storages else _sample(seen)
            for name, given in samples.items():
                if given is not None and looked_up is not None and given.integer and relation(looked_up, given):
                    tokens.setdefault(name, rows)


def _sample(seen: Seen) -> Sample | None:
    if seen.values is None or seen.values.is_complex():
        return None
    return Sample(seen.shape, seen.values.cpu().double(), not seen.values.is_floating_point())


def _roles(evidence: Evidence) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    roles: dict[str, str] = {}
    nodes: dict[str, list[str]] = {}
    for one in evidence.found:
        for name, how in one.given.items():
            role = _ROLE_OF.get(one.sort, "index" if one.sort == "pick" else "weight")
            nodes.setdefault(name, []).append(f"{one.name} ({how})")
            if name not in roles or ROLES.index(role) < ROLES.index(roles[name]):
                roles[name] = role
    for name in evidence.batch:
        roles.setdefault(name, "input" if name in evidence.fed else "unused")
    return {name: roles[name] for name in evidence.batch}, {name: tuple(said) for name, said in nodes.items()}
