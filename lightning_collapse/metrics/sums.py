"""Metric states: sums that keep their precision, whatever happens to the module that holds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self


class SumsMetric(Metric):
    """A metric whose states stay what they are: counts integers or ``float64``, sums in the precision they began with.

    ``half``, ``to``, ``set_dtype`` and the like move them to a device only. ``update`` works in inference mode and
    after it, in any order with ``reset``, and keeps no graph.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in vars(cls):
            cls.update = _outside_inference_mode(cls.update)  # type: ignore[method-assign]

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Metric:
        def move(tensor: Tensor) -> Tensor:
            # a model in half precision takes its metrics along
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, *args, **kwargs)
        return self


class Statistics(Protocol):
    """Sufficient statistics that merge with those of another stream, and with those of other processes."""

    def states(self) -> dict[str, Tensor]:
        """All there is to save or to send, by name."""
        ...

    def merge(self, other: Self) -> Self:
        """Those of both streams together."""
        ...

    def reduce(self, group: Any = None) -> Self:
        """Those of all processes together. Collective."""
        ...


S = TypeVar("S", bound=Statistics)


class StatisticsMetric(SumsMetric, Generic[S]):
    """A metric whose states are statistics that merge by more than a sum of each, such as sums about an anchor.

    Attributes:
        sizes: Names of the arguments that say how large the states are.
    """

    # two streams merge by more than a sum per state, so `forward` updates twice instead of merging
    full_state_update = True
    sizes: tuple[str, ...] = ("dim",)

    def moments(self) -> S:
        """The accumulated statistics."""
        return self._from_states(self.metric_state)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of this class has seen, exactly."""
        states: Any = incoming_state
        if isinstance(states, Metric):
            states = {name: getattr(states, name, None) for name in self.metric_state}
        own = {name: getattr(state, "shape", None) for name, state in self.metric_state.items()}
        if not isinstance(states, dict) or own != {name: getattr(states.get(name), "shape", None) for name in own}:
            sizes = " and ".join(f"`{name}={getattr(self, name)}`" for name in self.sizes)
            name = type(self).__name__
            raise ValueError(
                f"`incoming_state` must be {'an' if name[0] in 'AEIOU' else 'a'} `{name}` metric, or its states, of"
                f" {sizes}, got {type(incoming_state).__name__}."
            )
        self._set(self.moments().merge(self._from_states(states)))
        self._computed = None
        self._update_count += 1

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        # to reduce each state by itself would be wrong, and the default gathers a copy of every state per process
        self._set(self.moments().reduce(process_group or self.process_group))

    def _from_states(self, states: dict[str, Any]) -> S:
        """The statistics whose states these are."""
        raise NotImplementedError

    def _begin(self, moments: S) -> None:
        """Take these for the states of a stream that has not begun."""
        for name, state in moments.states().items():
            self.add_state(name, state, dist_reduce_fx=None)

    def _set(self, moments: S) -> None:
        for name, state in moments.states().items():
            setattr(self, name, state)


def _outside_inference_mode(update: Callable[..., None]) -> Callable[..., None]:
    """States made in inference mode can never be written to outside of it: make them ordinary, and keep them so."""

    @wraps(update)
    def wrapper(self: Metric, *args: Any, **kwargs: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name in self.metric_state:
                state = getattr(self, name)
                if state.is_inference():
                    setattr(self, name, state.clone())
            update(self, *args, **kwargs)

    return wrapper
