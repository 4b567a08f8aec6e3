"""The engine of all importances: gradients of every sample of a batch, from one forward pass of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_collapse.penalties.support.grad_samplers import Rule, rule_of
from lightning_collapse.penalties.support.output_gradients import Columns
from lightning_collapse.penalties.support.sample_gradients import Power, SampleGradients, concatenated, wide
from lightning_collapse.penalties.support.vmap_gradients import OneByOne
from lightning_collapse.utilities.modules import is_to_be_ignored

METHODS = ("unused", "rule", "vmap", "loop")
"""How the gradients of a parameter were found, the later the slower."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far a rule may be from autograd, in norm; what is wrong is wrong by far more."""
COARSE = 0.05
"""The same in 16 bits."""


class Call(NamedTuple):
    """One call of a layer: what it received, and where in the graph the gradient of its output arrives."""

    inputs: Tensor
    edge: GradientEdge


class Layer(NamedTuple):
    """A module with a rule, and the names that its parameters have in the model."""

    module: nn.Module
    rule: Rule
    names: Mapping[str, str]


class PerSampleGradients:
    """Gradients of every sample, layer by layer, without a gradient of any weight.

    Forward hooks keep what each layer receives and the gradient edge of what it returns: the place in the graph, which
    no later in-place operation moves. A backward pass to these edges gives the rest, see
    :func:`~lightning_collapse.penalties.layer_rules.rule_of`.

    Before a rule is used it is compared with autograd on the first batch that a parameter takes part in: the gradient
    of random numbers at the even samples must reach the even rows of a layer only, that at the odd ones the odd rows
    only, and the samples' gradients must sum to autograd's. Parameters that fail (tied or used in a function, packed
    projections of attention, recurrent weights, tables that are looked up once for all samples) are computed sample by
    sample, see :class:`~lightning_collapse.penalties.one_by_one.OneByOne`.

    Use it as a context: hooks are removed at its end.

    Args:
        model: In eval mode.
        outputs: How it is called on a batch; returns ``(B, ...)``.
        parameters: Whose gradients, by their names in the model.
        chunk_size: Samples at a time where no rule helps.
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
        self.one_by_one = OneByOne(model, outputs, chunk_size)
        self._axes: dict[nn.Module, int] = {}
        self._ruled: set[str] = set()
        self._known: set[str] = set()
        self._slow: list[str] = []
        self._calls: dict[nn.Module, list[Call]] = {}
        self._batch: Any = None
        self._samples = 0

    def __enter__(self) -> PerSampleGradients:
        self._handles = [layer.module.register_forward_hook(self._hear, with_kwargs=True) for layer in self.layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._calls.clear()
        self._batch = None

    @property
    def methods(self) -> dict[str, str]:
        """How the gradients of each parameter were found, one of :data:`METHODS`."""
        slow = self.one_by_one.method
        found = dict.fromkeys(self._ruled, "rule") | dict.fromkeys(self._slow, slow)
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
        self._learn(outputs)
        return outputs

    def add_to(self, totals: Mapping[str, Tensor], outputs: Tensor, columns: Columns, rows: int, power: Power) -> None:
        """Add sums over the first ``rows`` samples and all columns to ``totals``; the graph is gone then."""
        for sent in self.backward(outputs, columns, rows):
            for name, gradients in self.gradients(sent):
                gradients.add_to(totals[name], power)
        if self._slow and rows:
            slow = {name: self.parameters[name] for name in self._slow}
            for found in self.one_by_one(slow, self._batch, columns, self._samples, rows, power):
                for name, value in found.items():
                    totals[name] += value
        self._calls.clear()

    def backward(self, outputs: Tensor, columns: Columns, rows: int) -> Iterator[dict[nn.Module, list[Tensor | None]]]:
        """What arrives at each call of each layer, column by column; the graph is gone then."""
        heard = {module: calls for module, calls in self._calls.items() if module in self._axes}
        if not heard:
            return
        for k in range(columns.number):
            column = columns.make(k)
            column[rows:] = 0
            yield _backward(outputs, heard, column, retain_graph=k + 1 < columns.number)

    def gradients(self, sent: Mapping[nn.Module, list[Tensor | None]]) -> Iterator[tuple[str, SampleGradients]]:
        """Gradients of samples of the parameters that a rule holds for, from what arrived at each call."""
        for layer in self.layers:
            if layer.module in sent:
                found = self._apply(layer, sent[layer.module], self._axes[layer.module])
                yield from ((name, gradients) for name, gradients in found.items() if name in self._ruled)

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        received = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if is_to_be_ignored() or received is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        self._calls.setdefault(module, []).append(Call(received.detach(), get_gradient_edge(output)))

    def _learn(self, outputs: Tensor) -> None:
        """Compare the rules with autograd for parameters that take part for the first time."""
        new = [name for name in self.parameters if name not in self._known]
        reached = _reached(outputs) if new else set()
        new = [name for name in new if id(self.parameters[name]) in reached]
        if not new:
            return
        generator = torch.Generator().manual_seed(0)
        column = torch.randn(outputs.shape, generator=generator).to(outputs)
        even = (torch.arange(len(outputs), device=outputs.device) % 2 == 0).view(-1, *[1] * (outputs.ndim - 1))
        sent = [_backward(outputs, self._calls, torch.where(side, column, 0)) for side in (even, ~even)]
        expected = torch.autograd.grad(
            outputs, [self.parameters[name] for name in new], torch.where(even, column, 0), retain_graph=True
        )
        truth = dict(zip(new, expected, strict=True))
        ruled: set[str] = set()
        axes: dict[nn.Module, int] = {}
        for layer in self.layers:
            if layer.module in self._calls and not truth.keys().isdisjoint(layer.names.values()):
                axis, names = self._compare(layer, [s[layer.module] for s in sent], truth, even.flatten())
                ruled |= names
                axes |= {layer.module: axis} if names else {}
        self._ruled = (self._ruled - set(new)) | ruled
        self._axes |= axes
        self._slow = [name for name in self.parameters if name in {*self._slow, *new} - self._ruled]
        # of a single sample every axis is that of the samples, and zero gradients tell nothing
        if len(outputs) > 1:
            self._known |= {name for name in new if name in self._slow or truth[name].any()}

    def _compare(
        self, layer: Layer, sent: list[list[Tensor | None]], truth: Mapping[str, Tensor], even: Tensor
    ) -> tuple[int, set[str]]:
        """The axis of the samples, and of which parameters the rule finds the gradients."""
        names = layer.names.values() & truth.keys()
        scale = torch.stack([torch.linalg.vector_norm(_dense(truth[name])) for name in names]).norm()
        for axis in (0, 1):
            try:
                if not all(self._stays(s, mask, axis) for s, mask in zip(sent, (even, ~even), strict=True)):
                    continue
                found = self._apply(layer, sent[0], axis)
                agree = {name for name in names & found.keys() if _agrees(found[name], truth[name], scale)}
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
                continue  # the layer is not what the rule takes it for
            if agree:
                return axis, agree
        return 0, set()

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

    def _stays(self, sent: list[Tensor | None], mask: Tensor, axis: int) -> bool:
        """Whether what was sent to some samples has arrived at their rows only."""
        return not any(_arranged(g, self._samples, axis)[~mask].any() for g in sent if g is not None)


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
    outputs: Tensor, calls: Mapping[nn.Module, list[Call]], column: Tensor, retain_graph: bool = True
) -> dict[nn.Module, list[Tensor | None]]:
    edges = [call.edge for heard in calls.values() for call in heard]
    if not edges:
        return {}
    arrived = iter(
        torch.autograd.grad(outputs, edges, column.to(outputs.dtype), retain_graph=retain_graph, allow_unused=True)
    )
    return {module: [next(arrived) for _ in heard] for module, heard in calls.items()}


def _reached(outputs: Tensor) -> set[int]:
    """Identities of the leaves that a graph ends in."""
    leaves, seen, waiting = set(), set(), [outputs.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return leaves if outputs.grad_fn is not None else {id(outputs)}


def _arranged(tensor: Tensor, samples: int, axis: int) -> Tensor:
    """Samples first, then what there are several of per sample, ``(B, K, ...)``."""
    if axis == 0:
        return tensor.reshape(samples, -1, *tensor.shape[1:])
    if tensor.ndim < 2 or tensor.shape[1] != samples:
        raise ValueError("the samples do not lie along the second axis")
    return tensor.movedim(1, 0)


def _agrees(gradients: SampleGradients, truth: Tensor, scale: Tensor) -> bool:
    """Whether samples add up to autograd; ``scale`` is that of the layer, beside which what cancels is rounding."""
    expected = _dense(truth)
    total = torch.zeros_like(expected)
    gradients.add_to(total, "signed")
    tolerance = TOLERANCE.get(truth.dtype, COARSE)
    error = torch.linalg.vector_norm(total - expected)
    return bool(error <= tolerance * (torch.linalg.vector_norm(expected) + 0.01 * scale))


def _dense(gradient: Tensor) -> Tensor:
    return wide(gradient.to_dense() if gradient.is_sparse else gradient)
