"""Per-sample gradients: of every sample of a batch, from one forward pass of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_collapse.penalties.support.grad_samplers import Rule, rule_of
from lightning_collapse.penalties.support.output_gradients import Columns
from lightning_collapse.penalties.support.sample_gradients import Power, SampleGradients, concatenated, dense, wide
from lightning_collapse.penalties.support.sample_sums import is_near, mixed_column, sample_weights
from lightning_collapse.penalties.support.vmap_gradients import OneByOne
from lightning_collapse.utilities.modules import is_to_be_ignored

METHODS = ("unused", "rule", "vmap", "loop")
"""How the gradients of a parameter were found, the later the slower."""


class Call(NamedTuple):
    """One call of a layer: what it received, and where in the graph the gradient of its output arrives."""

    inputs: Tensor
    edge: GradientEdge


class Layer(NamedTuple):
    """A module with a rule, and the names that its parameters have in the model."""

    module: nn.Module
    rule: Rule
    names: Mapping[str, str]


Sent = dict[nn.Module, list[Tensor | None]]
"""What a backward pass has brought to each call of each layer."""


class PerSampleGradients:
    """Gradients of every sample, layer by layer, without a gradient of any weight.

    Forward hooks keep what each layer receives and the gradient edge of what it returns: the place in the graph, which
    no later in-place operation moves. A backward pass to these edges gives the rest, see
    :func:`~lightning_collapse.penalties.support.grad_samplers.rule_of`.

    Nothing is taken for granted. On every batch a second backward pass, in which each sample has a weight of its own,
    must bring each row of a layer times the weight of the sample it is taken for, along the first axis or the second:
    else rows are another sample's (of experts that choose their tokens), or depend on several (of statistics of the
    batch, or a table that is looked up once for all). And the samples' gradients must sum to autograd's, on the first
    batch and whenever the graph has another structure. What fails (also parameters that are tied or used in a
    function, packed projections of attention, recurrent weights) is computed sample by sample, see
    :class:`~lightning_collapse.penalties.support.vmap_gradients.OneByOne`, which refuses samples that depend on each
    other.

    Use it as a context: hooks are removed at its end.

    Args:
        model: In eval mode.
        outputs: How it is called on a batch; returns ``(B, ...)``.
        parameters: Whose gradients, by their names in the model.
        chunk_size: Samples at a time where no rule helps.

    Attributes:
        sums: If there is a tensor for every parameter, autograd's sums over samples are added to them; of one column.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Callable[[Any, Any], Tensor],
        parameters: Mapping[str, Tensor],
        chunk_size: int,
    ) -> None:
        self.model, self.outputs, self.parameters = model, outputs, parameters
        self.layers = _layers(model, parameters)
        self.one_by_one = OneByOne(model, outputs, parameters, chunk_size)
        self.sums: Mapping[str, Tensor] = {}
        self._holds: dict[tuple[str, int], bool] = {}  # whether a rule does, of a parameter, in a kind of graph
        self._used: dict[str, set[str]] = {"rule": set(), "slow": set()}
        self._slow: list[str] = []  # of the running batch
        self._calls: dict[nn.Module, list[Call]] = {}
        self._batch: Any = None
        self._samples = 0

    def __enter__(self) -> PerSampleGradients:
        self._handles = [layer.module.register_forward_hook(self._capture, with_kwargs=True) for layer in self.layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._calls.clear()
        self._batch = None

    @property
    def methods(self) -> dict[str, str]:
        """How the gradients of each parameter were found, one of :data:`METHODS`."""
        found = dict.fromkeys(self._used["rule"], "rule") | dict.fromkeys(self._used["slow"], self.one_by_one.method)
        return {name: found.get(name, "unused") for name in self.parameters}

    def forward(self, batch: Any) -> Tensor:
        """Outputs ``(B, ...)`` with their graph.

        Raises:
            ValueError: If they are no tensor with a graph to any of the parameters.
        """
        self._calls.clear()
        self._batch = batch
        outputs = self.outputs(self.model, batch)
        check_outputs(outputs)
        self._samples = len(outputs)
        return outputs

    def add_to(self, totals: Mapping[str, Tensor], outputs: Tensor, columns: Columns, rows: int, power: Power) -> None:
        """Add sums over the first ``rows`` samples and all columns to ``totals``; the graph is gone then.

        Raises:
            ValueError: If samples are not independent.
        """
        for found in self.by_rule(outputs, columns, rows):
            for name, gradients in found:
                gradients.add_to(totals[name], power)
        self._calls.clear()
        if self._slow:
            for name, value in self.one_by_one(self._slow, self._batch, columns, self._samples, rows, power).items():
                totals[name] += value
            self._calls.clear()

    def by_rule(self, outputs: Tensor, columns: Columns, rows: int) -> Iterator[Iterator[tuple[str, SampleGradients]]]:
        """Column by column the gradients of samples of those parameters that a rule holds for; the graph is gone then.

        Args:
            outputs: What :meth:`forward` has returned.
            columns: What is sent back.
            rows: How many samples count.
        """
        mixed = mixed_column(columns, rows)
        more = columns.number > 1
        axes, ruled, sent = self._examine(outputs, mixed, retain_graph=more)
        calls = {module: self._calls[module] for module in axes}
        for k in range(columns.number if axes else 0):
            if more:
                column = columns.make(k)
                column[rows:] = 0
                sent = _backward(outputs, calls, column, retain_graph=k + 1 < columns.number)[0]
            yield (
                (name, gradients)
                for layer in self.layers
                if layer.module in axes
                for name, gradients in self._apply(layer, sent[layer.module], axes[layer.module]).items()
                if name in ruled
            )

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        received = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if is_to_be_ignored() or received is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        self._calls.setdefault(module, []).append(Call(received.detach(), get_gradient_edge(output)))

    def _examine(
        self, outputs: Tensor, column: Tensor, retain_graph: bool
    ) -> tuple[dict[nn.Module, int], set[str], Sent]:
        """Layers whose rows are those of samples, with the axis; parameters that a rule holds for; what has arrived."""
        reached, structure = _graph(outputs)
        weights = sample_weights(outputs)
        names = [name for name, parameter in self.parameters.items() if id(parameter) in reached]
        unknown = names if self.sums else [name for name in names if (name, structure) not in self._holds]
        sent, truth = _backward(outputs, self._calls, column, [self.parameters[name] for name in unknown])
        expected = dict(zip(unknown, truth, strict=True))
        for name, gradient in expected.items() if self.sums else ():
            self.sums[name].add_(dense(gradient) if gradient is not None else 0.0)
        expected = {name: g for name, g in expected.items() if (name, structure) not in self._holds}
        weighted, _ = _backward(outputs, self._calls, column * weights, retain_graph=retain_graph)
        axes: dict[nn.Module, int] = {}
        ruled: set[str] = set()
        for layer in self.layers:
            for axis in (0, 1) if layer.module in self._calls else ():
                if not self._is_apart(sent[layer.module], weighted[layer.module], weights.flatten(), axis):
                    continue
                agreeing = self._agreeing(layer, sent[layer.module], axis, expected, structure)
                if agreeing:
                    axes[layer.module] = axis
                    ruled |= agreeing
                    break
        self._slow = [name for name in names if name not in ruled]
        self._used["rule"] |= ruled
        self._used["slow"] |= set(self._slow)
        return axes, ruled, sent

    def _is_apart(self, sent: list[Tensor | None], weighted: list[Tensor | None], weights: Tensor, axis: int) -> bool:
        """Whether each row has received what its sample sends, and nothing else."""
        for gradient, times in zip(sent, weighted, strict=True):
            if gradient is None or times is None:
                if gradient is not times:
                    return False
                continue
            try:
                rows, found = (wide(_arranged(part, self._samples, axis)) for part in (gradient, times))
            except (RuntimeError, ValueError):
                return False
            found = found / weights.view(-1, *[1] * (found.ndim - 1)).to(found)
            if not is_near(found, rows, torch.zeros_like(weights[0]), gradient.dtype):
                return False
        return True

    def _agreeing(
        self, layer: Layer, sent: list[Tensor | None], axis: int, truth: Mapping[str, Tensor | None], structure: int
    ) -> set[str]:
        """Of which parameters the rule finds the gradients: compared with autograd once in every kind of graph."""
        expected = {name: g for name in layer.names.values() if (g := truth.get(name)) is not None}
        agreeing = {name for name in layer.names.values() if self._holds.get((name, structure))}
        if not expected:
            return agreeing
        try:
            found = self._apply(layer, sent, axis)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            found = {}  # the layer is not what the rule takes it for
        scale = torch.stack([torch.linalg.vector_norm(dense(gradient)) for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            agrees = name in found and _agrees(found[name], gradient, scale)
            if not agrees or gradient.any():  # zero proves nothing
                self._holds[name, structure] = agrees
            agreeing |= {name} if agrees else set()
        return agreeing

    def _apply(self, layer: Layer, sent: list[Tensor | None], axis: int) -> dict[str, SampleGradients]:
        calls = zip(self._calls[layer.module], sent, strict=True)
        found = [
            layer.rule(layer.module, _arranged(call.inputs, self._samples, axis), _arranged(g, self._samples, axis))
            for call, g in calls
            if g is not None
        ]
        return {
            name: concatenated([gradients[local] for gradients in found])
            for local, name in layer.names.items()
            if found and local in found[0]
        }


def check_outputs(outputs: Any) -> None:
    """Refuse what no gradient of samples can come from.

    Raises:
        ValueError: If it is no tensor ``(B, ...)`` with a graph.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim == 0:
        raise ValueError(
            f"The model must return a tensor of shape (B, ...), it returned {type(outputs).__name__}. Choose what"
            " counts with `outputs=lambda module, batch: module(batch[0]).logits`."
        )
    if not outputs.requires_grad:
        raise ValueError(
            "The outputs of the model do not depend on any parameter that requires a gradient. Were they detached,"
            " or is all that `parameters` names frozen?"
        )


def _layers(model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Layer]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = []
    for module in model.modules():
        own = {
            local: names[id(parameter)]
            for local, parameter in module.named_parameters(recurse=False)
            if id(parameter) in names and owners[id(parameter)] == 1
        }
        rule = rule_of(module) if own else None
        if rule is not None:
            layers.append(Layer(module, rule, own))
    return layers


def _backward(
    outputs: Tensor,
    calls: Mapping[nn.Module, list[Call]],
    column: Tensor,
    parameters: Sequence[Tensor] = (),
    retain_graph: bool = True,
) -> tuple[Sent, list[Tensor | None]]:
    """What arrives at each call of each layer, and at parameters."""
    edges = [call.edge for captured in calls.values() for call in captured]
    ends: list[Any] = [*edges, *parameters]
    if not ends:
        return {}, []
    found = torch.autograd.grad(outputs, ends, column.to(outputs.dtype), retain_graph=retain_graph, allow_unused=True)
    arrived = iter(found)
    return {module: [next(arrived) for _ in captured] for module, captured in calls.items()}, list(arrived)


def _graph(outputs: Tensor) -> tuple[set[int], int]:
    """Identities of the leaves that a graph ends in, and a number for its structure: kinds of nodes and their edges."""
    if outputs.grad_fn is None:
        return {id(outputs)}, 0
    leaves: set[int] = set()
    places: dict[Any, int] = {outputs.grad_fn: 0}
    waiting: list[Any] = [outputs.grad_fn]
    structure: list[object] = []
    for node in waiting:
        structure.append(node.name())
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
            structure.append(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in places:
                places[following] = len(places)
                waiting.append(following)
            structure.append(places.get(following))
    return leaves, hash(tuple(structure))


def _arranged(tensor: Tensor, samples: int, axis: int) -> Tensor:
    """Samples first, then what there are several of per sample, ``(B, K, ...)``."""
    if axis == 0:
        return tensor.reshape(samples, -1, *tensor.shape[1:])
    if tensor.ndim < 2 or tensor.shape[1] != samples:
        raise ValueError("the samples do not lie along the second axis")
    return tensor.movedim(1, 0)


def _agrees(gradients: SampleGradients, truth: Tensor, scale: Tensor) -> bool:
    """Whether samples add up to autograd; ``scale`` is that of the layer, beside which what cancels is rounding."""
    expected = dense(truth)
    total = torch.zeros_like(expected)
    gradients.add_to(total, "signed")
    return is_near(total, expected, scale, truth.dtype)
