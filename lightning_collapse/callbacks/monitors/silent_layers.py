"""Silent layers: one warning for all of which nothing came at a point, whoever watches them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_collapse.utilities.told_once import listed

if TYPE_CHECKING:
    from lightning_collapse.callbacks.monitors.monitor import Monitor

NOT_RUN = (
    "{} did not run before every point, or on no rows; the curves read NaN there. If that is not meant choose other"
    " `layers`."
)
TIMES = 2
"""Layers that are dropped at random would be news at every point."""
_TOLD: WeakKeyDictionary[Trainer, dict[str, list[list[str]]]] = WeakKeyDictionary()


def say_silent(trainer: Trainer, monitors: Sequence[Monitor]) -> None:
    """Say of which layers nothing came, once for all monitors of a trainer, and once more of others later."""
    told = _TOLD.setdefault(trainer, {})
    silent = {monitor: monitor.pop_silent() for monitor in monitors}
    for kind, text in {kind: text for of in silent.values() for kind, (text, _) in of.items()}.items():
        lists = told.setdefault(kind, [])
        known = {name for names in lists for name in names}
        found = {m: [name for name in of[kind][1] if name not in known] for m, of in silent.items() if kind in of}
        names = list(dict.fromkeys(name for of in found.values() for name in of))
        if names and len(lists) < TIMES:
            lists.append(names)
            who = dict.fromkeys(f"`{type(monitor).__name__}`" for monitor, of in found.items() if of)
            rank_zero_warn(f"{', '.join(who)}: {text.replace('{}', listed(names), 1)}")
