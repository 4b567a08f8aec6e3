"""Argument checks, each with a ``ValueError`` that names the first one that is wrong, its rule and its value."""

import math
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any


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


def check_layers(layers: Any, everything: str, name: str = "layers") -> None:
    """Refuse what cannot be names of layers; ``everything`` says what is chosen without them, ``name`` the argument.

    Raises:
        ValueError: If it is a string, empty, no collection, or holds anything but strings.
    """
    if layers is None:
        return
    if isinstance(layers, str):
        raise ValueError(f"`{name}` takes a list of names, got the string {layers!r}. Write `{name}=[{layers!r}]`.")
    if not isinstance(layers, Collection) or not all(isinstance(layer, str) for layer in layers):
        raise ValueError(f"`{name}` takes a list of names of submodules, got {layers!r}.")
    if not layers:
        raise ValueError(f"`{name}` is empty. Leave it out to take {everything}.")


def check_reader(read: Any, layers: Any) -> None:
    """Refuse what cannot read calls of the modules that ``layers`` names.

    Raises:
        ValueError: If it is no function, or no layers are named.
    """
    if read is not None and (not callable(read) or layers is None):
        raise ValueError(
            f"`read` takes a function `read(module, args, output)` of the modules that `layers` names, got {read!r}"
            f" and layers={layers!r}."
        )


def did_you_mean(wrong: str, names: Iterable[str]) -> str:
    """A question that names the three that come nearest to a name that does not exist; empty if nothing comes near.

    Example:
        >>> did_you_mean("encoder0", ["encoder", "encoder.0", "head"])
        ' Did you mean `encoder.0` or `encoder`?'
        >>> did_you_mean("Head", ["encoder", "head"]), did_you_mean("tail", ["encoder", "head"])
        (' Did you mean `head`?', '')
    """
    there = {name.lower(): name for name in reversed(list(names))}
    nearest = [f"`{there[name]}`" for name in get_close_matches(wrong.lower(), there, n=3)]
    choice = " or ".join(part for part in (", ".join(nearest[:-1]), *nearest[-1:]) if part)
    return f" Did you mean {choice}?" if choice else ""
