"""Weight schedules of a loss: linear warm-up and ramp."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from lightning_collapse.utilities.arguments import require_finite, require_not_negative, require_positive

Weight = float | Callable[[int], float]
"""A constant, or a function of the step on the loggers' x-axis (optimizer steps, whatever the accumulation)."""


def require_weight(weight: object) -> None:
    """Raise a ``ValueError`` unless it is a :data:`Weight`, and finite if it is a number."""
    if not isinstance(weight, Real | Tensor) and not callable(weight):
        raise ValueError(
            f"`weight` must be a number or a function of the step, got {weight!r}. For one that changes there are"
            " `LinearWarmup` and `LinearRamp`."
        )
    if not callable(weight):
        require_finite(weight=float(weight))


def weighted(weight: Weight, value: Tensor, step: int) -> Tensor:
    """A loss times its weight at a step; a weight that changes is filled in on the device of the loss."""
    return value * (value.new_full((), weight(step)) if callable(weight) else weight)


@dataclass(frozen=True)
class LinearWarmup:
    """A weight that grows linearly from 0 at step ``start`` to its full value ``steps`` steps later, and stays there.

    Args:
        weight: The full value.
        steps: How many steps the growth takes; 0 switches the weight on at ``start``.
        start: Last step at which the weight is 0.

    Raises:
        ValueError: If ``steps`` or ``start`` is negative, or ``weight`` is not finite.

    Example:
        >>> warmup = LinearWarmup(weight=2.0, steps=4, start=10)
        >>> [warmup(step) for step in (0, 10, 12, 14, 1000)]
        [0.0, 0.0, 1.0, 2.0, 2.0]
    """

    weight: float
    steps: int
    start: int = 0

    def __post_init__(self) -> None:
        require_finite(weight=self.weight)
        require_not_negative(steps=self.steps, start=self.start)

    def __call__(self, step: int) -> float:
        """Weight at a step."""
        if self.steps == 0:
            return self.weight if step >= self.start else 0.0
        return self.weight * min(max((step - self.start) / self.steps, 0.0), 1.0)


@dataclass(frozen=True)
class LinearRamp:
    """A weight that moves linearly from ``first`` at step 0 to ``last`` at step ``steps``, and stays there.

    Args:
        first: The value at step 0.
        last: The value from step ``steps`` on.
        steps: How many steps it takes, usually all that there are.

    Raises:
        ValueError: If ``steps`` is not positive, or a value is not finite.

    Example:
        >>> ramp = LinearRamp(first=1.0, last=2.0, steps=4)
        >>> [ramp(step) for step in (0, 1, 4, 1000)]
        [1.0, 1.25, 2.0, 2.0]
    """

    first: float
    last: float
    steps: int

    def __post_init__(self) -> None:
        require_finite(first=self.first, last=self.last)
        require_positive(steps=self.steps)

    def __call__(self, step: int) -> float:
        """Weight at a step."""
        return self.first + (self.last - self.first) * min(max(step / self.steps, 0.0), 1.0)
