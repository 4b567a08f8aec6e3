"""Weight penalties: a pull toward where weights were, as a gradient in closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import inf
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_collapse.penalties.support.state import ParameterState
from lightning_collapse.utilities.loaders import Loader

Parameters = Mapping[str, Tensor]
"""Parameters by name; of a sharded one (``DTensor``) every process works on its own shard."""


class Penalty(ABC):
    """A penalty on weights, with its gradient in closed form: a plain object, for any training loop.

    No term enters the loss: :meth:`add_gradients` adds to ``.grad`` after the backward pass, once per optimizer step.
    So a penalty costs no graph, knows nothing of micro-batches, loss scales or the number of processes, and clipping
    sees its sum with the gradient of the task. A training loop calls::

        penalty.start(parameters)                 # before the first step of a task
        loss.backward()
        penalty.observe(parameters)               # of all penalties, before any adds its own
        penalty.add_gradients(parameters)
        optimizer.step()
        penalty.after_step(parameters)
        penalty.consolidate(model, loader)        # after the last step of a task

    :class:`~lightning_collapse.WeightPenalty` and :class:`~lightning_collapse.ContinualMixin` do so for you.

    Args:
        weight: Strength.

    Attributes:
        needs_data: Whether :meth:`consolidate` reads a model's output on data.
        follows_steps: Whether what is learned comes from the steps of the training.
        remembers: What it keeps of a task, in words, and ``source``: authors, year, identifier; for the tables.
        state: Tables of tensors by kind and name of a parameter, each as large as the parameter.
        rank_one_shares: How near to rank one the Fisher information of the latest task is, by module and for ``"all"``,
            where :meth:`consolidate` has it for little, see
            :func:`~lightning_collapse.functional.sample_gradients.rank_one_share`.

    Raises:
        ValueError: If ``weight`` is negative or not finite.

    Example:
        >>> from lightning_collapse.penalties import L2Init
        >>> import torch
        >>> weights, penalty = {"w": torch.zeros(3)}, L2Init(weight=0.5)
        >>> isinstance(penalty, Penalty)
        True
        >>> penalty.start(weights)
        >>> _ = weights["w"].fill_(2.0)
        >>> penalty.value(weights).item()
        6.0
    """

    remembers: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs_data: ClassVar[bool] = False
    follows_steps: ClassVar[bool] = False

    def __init__(self, weight: float) -> None:
        if not isinstance(weight, float | int) or not 0 <= weight < inf:
            raise ValueError(f"`weight` must be a number, finite and not negative, got {weight!r}.")
        self.weight = weight
        self.state = ParameterState()
        self.rank_one_shares: dict[str, Tensor] = {}

    @property
    def memory(self) -> ParameterState:
        """The name of :attr:`state` in version 0.1.0."""
        return self.state

    @abstractmethod
    def start(self, parameters: Parameters) -> None:
        """Meet the parameters, where they lie now: state is moved to them, starting points are taken.

        Called at the start of every fit, after :meth:`load_state_dict` if there is one. A parameter that grew since,
        such as a head with more classes, is free where it is new; state of a parameter that is gone is dropped with a
        warning.

        Raises:
            ValueError: If a parameter has shrunk or has another number of dimensions.
        """

    def observe(self, parameters: Parameters, scale: Tensor | None = None) -> None:  # noqa: B027 -- few need it
        """See the gradient of the task, before any penalty adds to it; ``scale`` is the factor it carries, if any."""

    @abstractmethod
    def add_gradients(self, parameters: Parameters, scale: Tensor | None = None) -> None:
        """Add the gradient of the penalty to ``.grad``, which is made where the penalty pulls and there is none.

        Args:
            parameters: Those of the optimizer that is about to step.
            scale: Factor that gradients carry at this moment, 0-dimensional, for optimizers that take it out
                themselves; ``None`` for 1.
        """

    def after_step(self, parameters: Parameters) -> None:  # noqa: B027 -- few need it
        """See where an optimizer step has led."""

    def skip_step(self) -> None:  # noqa: B027 -- few need it
        """No step came of what :meth:`observe` saw last, as a gradient scaler decides."""

    @abstractmethod
    def consolidate(self, model: nn.Module, loader: Loader | None = None) -> None:
        """Learn from the task that ends now; from the next step on its weights are remembered. Collective."""

    @abstractmethod
    def value(self, parameters: Parameters) -> Tensor:
        """The penalty, ``weight`` included: a scalar, at least ``float32``, the same on every process.

        Differentiable where nothing is sharded; collective where anything is.
        """

    def curvature(self, parameters: Parameters) -> Tensor | None:
        """The largest second derivative, 0-dimensional; ``None`` where nothing is pulled. Collective if any is sharded.

        Plain gradient descent at a learning rate above two over it diverges.
        """
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that is remembered: tensors, numbers, strings, lists and dicts; sharded tensors whole. Collective."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned, on the host until :meth:`start` knows where it belongs."""
