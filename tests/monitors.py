"""Every monitor that the package exports, and arguments for those that need one, or have points of their own time."""

from inspect import isabstract
from typing import Any

from lightning.pytorch import Callback

from lightning_collapse import callbacks

ARGUMENTS: dict[str, dict[str, Any]] = {
    "ScalarMonitor": {"scalars": ["loss"]},
    "VariancePropagationMonitor": {"first_steps": 0},
}
OTHERS = {"FirstNonFinite"}
"""Monitors that are not called so."""
MONITORS: dict[str, type[Callback]] = {
    name: getattr(callbacks, name)
    for name in callbacks.__all__
    if (name.endswith("Monitor") or name in OTHERS) and not isabstract(getattr(callbacks, name))
}


def make(name: str, **arguments: Any) -> Callback:
    """A new one at its defaults, but for these arguments."""
    return MONITORS[name](**{**ARGUMENTS.get(name, {}), **arguments})
