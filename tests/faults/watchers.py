"""Random watchers: the callbacks that promise to change nothing, found where the package exports them."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_collapse import callbacks
from lightning_collapse.utilities.registry import MEASURES, register_measure
from tests.faults.data import loader
from tests.faults.faults import Case
from tests.monitors import MONITORS, make

Watcher = tuple[str, dict[str, Any]]
"""Name of a callback and its arguments, all of them plain."""


def _overwrite(values: Tensor) -> Tensor:
    return values.zero_().sum(dim=-1)


MEASURES_OF_USERS: dict[str, Callable[[Tensor], Any]] = {
    "user_raises": lambda values: 1 / 0,
    "user_nan": lambda values: values.sum(dim=-1) * torch.nan,
    "user_shape": lambda values: values,
    "user_text": lambda values: "large",
    "user_none": lambda values: None,
    "user_overwrites": _overwrite,
}


class Reader(Callback):
    """Counts the points that are published, as a user's callback would read them."""

    def __init__(self, fails: bool = False) -> None:
        self.points, self.fails = 0, fails

    def on_points(self, trainer: Any, pl_module: Any, points: Any) -> None:
        self.points += len(points)
        if self.fails:
            raise ValueError("what is that?")


def draw(rng: random.Random) -> tuple[Watcher, ...]:
    """Some of the monitors, and sometimes a guard, in any order."""
    chosen = rng.sample(sorted(MONITORS), rng.choice([1, 1, 2, 3, len(MONITORS)]))
    watchers = [_monitor(rng, name) for name in chosen]
    if rng.random() < 0.5:
        watchers += [("CollapseMonitor", {"every_n_steps": 1})] if "CollapseMonitor" not in chosen else []
        action = rng.choice([["warn", "log"], ["log"], ["checkpoint"], ["checkpoint", "nowhere"], ["warn", "ignores"]])
        watchers.append(("CollapseGuard", {"action": action, "patience": rng.randint(1, 2), "calibration": 1}))
    if rng.random() < 0.1:
        watchers.append(("ContinualMetrics", {"loaders": ["whole", "short last"], "every_n_steps": 2}))
    if rng.random() < 0.1:
        watchers.append(("Reader", {"fails": True}))
    rng.shuffle(watchers)
    return tuple(watchers)


def _monitor(rng: random.Random, name: str) -> Watcher:
    takes = signature(MONITORS[name]).parameters
    arguments: dict[str, Any] = {}
    if "layers" in takes:
        arguments["layers"] = rng.choice([None, None, ["*"], ["front*", "middle*"], ["middle:input"]])
    if "every_n_steps" in takes:
        arguments["every_n_steps"] = rng.choice([1, 1, 2, 3, 5])
    if "rows" in takes and rng.random() < 0.3:
        arguments["rows"] = rng.choice([8, 40])
    if name == "CollapseMonitor" and rng.random() < 0.4:
        own = rng.sample(sorted(MEASURES_OF_USERS), 2)
        arguments["measures"] = rng.choice(["all", ["effective_rank", *own]])
    if "validation" in takes:
        arguments["validation"] = rng.random() < 0.4
    if "loader" in takes and rng.random() < 0.4:
        arguments["loader"] = "whole"
    return name, {key: value for key, value in arguments.items() if value is not None}


def _codes(module: Any, args: Any, output: Any) -> Any:
    """As if the largest entry were the code that was chosen; of most outputs it fails."""
    return output.argmax(dim=-1), output.shape[-1]


def build(watchers: tuple[Watcher, ...], case: Case, mapping: bool) -> list[Callback]:
    """New callbacks, the counting reader last."""
    made: list[Callback] = []
    for name, plain in watchers:
        arguments = dict(plain)
        if "loader" in arguments:
            arguments["loader"] = loader(arguments["loader"], 2, mapping)
        if "loaders" in arguments:
            arguments["loaders"] = [loader(habit, 2, mapping) for habit in arguments["loaders"]]
        if "action" in arguments:
            blocked = "nowhere" in arguments["action"]
            arguments["dirpath"] = str(case.folder / ("file" if blocked else "guard"))
            (case.folder / "file").write_text("a file where a folder is expected")
            does = [_ignore if each == "ignores" else each for each in arguments["action"] if each != "nowhere"]
            arguments["action"] = does
        if name == "CodebookMonitor" and "layers" in arguments:
            arguments["read"] = _codes
        if name in MONITORS:
            made.append(make(name, **arguments))
        else:
            made.append(Reader(**arguments) if name == "Reader" else getattr(callbacks, name)(**arguments))
    return [*made, Reader()]


def _ignore(*args: Any) -> None:
    """An action of a user's own."""


@contextmanager
def measures_of_users() -> Iterator[None]:
    """The measures that users registered, some of them wrong."""
    for name, function in MEASURES_OF_USERS.items():
        function.__name__ = name  # most are lambdas
        register_measure(range="any number", collapsed="none")(function)
    try:
        yield
    finally:
        for name in MEASURES_OF_USERS:
            MEASURES.pop(name, None)
