"""A trial: one setting fitted twice, bare and watched, and how the two differ."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from tests.faults.fit import ROOM, Outcome, fit
from tests.faults.setting import Setting, simpler


@dataclass
class Trial:
    """A setting and what a watched fit of it did otherwise than a bare one.

    Attributes:
        failures: One line each; empty if the trial passed.
        kind: The first of them without its numbers and names, and the place in the package that it points at.
        end: How the bare fit ended.
        refused: Names of the watchers that the fit would not start with; it was repeated without them.
    """

    setting: Setting
    failures: list[str] = field(default_factory=list)
    kind: str = ""
    end: str = ""
    points: int = 0
    refused: list[str] = field(default_factory=list)


Fit = Callable[[Setting, bool], Outcome]


def run(setting: Setting, fit: Fit = fit) -> Trial:
    """Fit twice and compare."""
    bare, refused = fit(setting, False), []
    watched = fit(setting, True)
    while watched.refused is not None and watched.refused < len(setting.watchers):
        refused.append(setting.watchers[watched.refused][0])
        kept = setting.watchers[: watched.refused] + setting.watchers[watched.refused + 1 :]
        setting = replace(setting, watchers=kept)
        watched = fit(setting, True)
    failures = compare(bare.facts, watched.facts)
    if watched.held > ROOM:
        failures.append(f"memory: the watchers held {watched.held >> 10} KB")
    if watched.keeps_graph:
        failures.append("memory: the watchers held a graph")
    legs = 1 if setting.legs in ("once", "sanity checked") else 2
    for message in sorted(set(watched.said)):
        if watched.said.count(message) > legs * sum(name in message[:40] for name, _ in setting.watchers):
            failures.append(f"said {watched.said.count(message)} times: {message[:200]}")
    kind = " ".join(failures[0].split(":")[0].split()[:3]) + f" [{watched.trace}]" if failures else ""
    return Trial(setting, failures, kind, str(bare.facts["end"]), watched.points, refused)


def compare(bare: dict[str, Any], watched: dict[str, Any]) -> list[str]:
    """What differs, by name; tensors bit by bit."""
    failures = []
    for name, value in bare.items():
        if name not in watched:
            failures.append(f"{name}: only bare")
        elif not _same(value, watched[name]):
            failures.append(f"{name}: bare {_brief(value)}, watched {_brief(watched[name])}")
    return failures + [f"{name}: only watched" for name in watched if name not in bare]


def shrink(trial: Trial, seconds: float = 120, fit: Fit = fit) -> Trial:
    """The plainest setting that fails in the same way, as far as one thing less at a time leads."""
    until = monotonic() + seconds
    going = True
    while going and monotonic() < until:
        going = False
        for setting in simpler(trial.setting):
            if (other := run(setting, fit)).kind == trial.kind:
                trial, going = other, True
                break
    return trial


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) != isinstance(other, Tensor):
        return False
    if isinstance(one, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or one.layout != other.layout:
            return False
        return one.layout != torch.strided or torch.equal(_bits(one), _bits(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "tobytes") and hasattr(other, "tobytes"):
        return bool(one.tobytes() == other.tobytes())
    return bool(one == other or (one != one and other != other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _brief(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > 4:
        return f"{value.flatten()[:3].tolist()}..."
    return repr(value)[:160]
