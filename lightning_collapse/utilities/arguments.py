"""Argument checks, each with a ``ValueError`` that names the first one that is wrong, its rule and its value."""

import math
from collections.abc import Sequence
from numbers import Integral


def require_positive(**values: float) -> None:
    """Every value is above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")


def require_not_negative(**values: float) -> None:
    """Every value is 0 or above it."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")


def require_finite(**values: float) -> None:
    """No value is NaN or infinite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"`{name}` must be finite, got {value}.")


def require_whole(least: int, **values: int) -> None:
    """Every value is an integer, and ``least`` or above it."""
    for name, value in values.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")


def require_one_of(options: Sequence[str], **values: str) -> None:
    """Every value is one of the options."""
    for name, value in values.items():
        if value not in options:
            raise ValueError(f"`{name}` must be one of {options}, got {value!r}.")
