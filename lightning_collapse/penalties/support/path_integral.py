"""Path integral: which weights have lowered the loss, by the gradient of the task along the steps that were taken."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_collapse.penalties.base import Parameters
from lightning_collapse.penalties.support.quadratic import QuadraticPenalty
from lightning_collapse.penalties.support.shards import wide
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.sharding import local


class PathPenalty(QuadraticPenalty):
    """Follows the parameters through training.

    The gradient is that of the task alone, seen before any penalty adds to it and before clipping; a step that a
    gradient scaler skips, because the gradient is not finite, counts as no step.

    Attributes:
        counts_steps: Whether one in which no weight has moved matters.
    """

    follows_steps = True
    counts_steps: ClassVar[bool] = False

    def __init__(self, weight: float) -> None:
        super().__init__(weight)
        self._pending: _Step | None = None
        self._doubtful = False  # whether the optimizer decides within its step, on the device, if it makes one
        self._buffers: dict[tuple[str, ...], _Step] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_pending": None, "_buffers": {}}  # which hold on to the parameters of a running fit

    @override
    def start(self, parameters: Parameters) -> None:
        self._pending = None
        self._buffers.clear()
        super().start(parameters)
        self._take_anchors(parameters)

    @override
    @torch.no_grad()
    def observe(self, parameters: Parameters, scale: Tensor | None = None) -> None:
        self._settle()  # of several optimizer steps in a batch the one before
        if any(p.grad is not None and name not in self.state["anchor"] for name, p in parameters.items()):
            self._take_anchors(parameters)  # some were frozen until now
        moving = {name: p for name, p in parameters.items() if p.grad is not None and name in self.state["anchor"]}
        if not moving:
            return
        step = self._buffers.get(tuple(moving))
        if step is None:
            step = self._buffers[tuple(moving)] = _Step.for_parameters(moving)
        foreach.copy_(step.gradients, [_dense(p.grad) for p in moving.values() if p.grad is not None])
        foreach.copy_(step.before, [local(parameter) for parameter in moving.values()])
        step.all_gradients.nan_to_num_(0.0, 0.0, 0.0)
        if scale is not None:
            step.all_gradients.div_(scale.to(step.all_gradients))
        self._pending, self._doubtful = step, scale is not None

    @override
    def after_step(self, parameters: Parameters) -> None:
        self._settle()

    @override
    def skip_step(self) -> None:
        self._pending = None

    @override
    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return super().state_dict()

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._pending = None
        super().load_state_dict(state_dict)

    @abstractmethod
    def _advance(self, parameters: Parameters, gradients: list[Tensor], steps: list[Tensor]) -> None:
        """A step was made: gradients before it, and how far it has taken each weight down.

        The product of both is how much a weight has lowered the loss, to first order.
        """

    @torch.no_grad()
    def _settle(self) -> None:
        step, self._pending = self._pending, None
        if step is None:
            return
        foreach.sub_(step.before, [local(parameter) for parameter in step.parameters.values()])
        if self.counts_steps and self._doubtful and not step.all_changes.any():  # waits for the device
            return
        self._advance(step.parameters, step.gradients, step.before)


class _Step(NamedTuple):
    """Copies of all gradients and weights, each in one vector, so that what reads all gradients is one kernel."""

    parameters: Parameters
    all_gradients: Tensor
    all_changes: Tensor
    gradients: list[Tensor]
    before: list[Tensor]

    @classmethod
    def for_parameters(cls, parameters: Parameters) -> _Step:
        parts = [local(parameter) for parameter in parameters.values()]
        size = sum(part.numel() for part in parts)
        dtype = max((wide(part) for part in parts), key=lambda kind: kind.itemsize)
        gradients, before = (torch.zeros(size, dtype=dtype, device=parts[0].device) for _ in range(2))
        shapes = [part.shape for part in parts]
        return cls(parameters, gradients, before, _split(gradients, shapes), _split(before, shapes))


def _dense(gradient: Tensor) -> Tensor:
    part = local(gradient)
    return part.to_dense() if part.is_sparse else part


def _split(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
