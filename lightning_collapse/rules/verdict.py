"""Verdict: what a rule has found."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PLACES = 8
"""How many other places words name; the data keep all."""


@dataclass(frozen=True)
class Verdict:
    """One failure that was found, wherever it shows.

    Attributes:
        kind: Name of the failure, such as ``"complete_collapse"`` (all rows equal).
        layer: Name of the layer, as in its curves; of several that fail together the first.
        since: Step of the first point that showed it.
        step: Step at which it was held to be true, some points later.
        evidence: The numbers it rests on, in words.
        severity: How far beyond the line of its rule: 1 is on the line, ``inf`` is total.
        advice: What of this library addresses it, in one sentence.
        also: Where else it shows, and as what, in words.
        says: The failure in one plain sentence; empty if its rule has none.
        outcome: Whether the outcome that the guard watches has moved yet, in words; empty if it watches none.

    Example:
        >>> print(Verdict("too_low", "encoder", since=40, step=60, evidence="it is 0.1", advice="Raise it."))
        Too low in `encoder` since step 40, noticed at step 60: it is 0.1. Raise it.
        >>> print(Verdict("too_low", "encoder", 60, 60, "it is 0.1", says="All is low in `encoder`."))
        All is low in `encoder`. Too low since step 60: it is 0.1.
    """

    kind: str
    layer: str
    since: int
    step: int
    evidence: str
    severity: float = 1.0
    advice: str = ""
    also: Sequence[str] = ()
    says: str = ""
    outcome: str = ""

    @property
    def name(self) -> str:
        """The kind and the layer, in words."""
        return f"{self.kind.replace('_', ' ')} in `{self.layer}`"

    def as_dict(self) -> dict[str, Any]:
        """Numbers, strings and a list, for a checkpoint or an event file."""
        return {**asdict(self), "also": list(self.also)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Verdict":
        """The verdict of which :meth:`as_dict` told."""
        return cls(**{**state, "also": tuple(state["also"])})

    def __str__(self) -> str:
        name = self.kind.replace("_", " ") if self.says else self.name
        name = f"{self.says} {name[:1].upper()}{name[1:]}".lstrip()
        noticed = f", noticed at step {self.step}" if self.step != self.since else ""
        also = f"; {also_in_words(self.also)}" if self.also else ""
        also += f"; {self.outcome}" if self.outcome else ""
        advice = f" {self.advice}" if self.advice else ""
        return f"{name} since step {self.since}{noticed}: {self.evidence}{also}.{advice}"


def also_in_words(places: Sequence[str]) -> str:
    """Where else a failure shows; of more than eight places the first eight, and how many more there are.

    Example:
        >>> also_in_words(["in `a`", "in `b`"])
        'also in `a`, in `b`'
        >>> also_in_words([f"in `{i}`" for i in range(299)])[-22:]
        ', in `7`, and 291 more'
    """
    more = f", and {len(places) - PLACES} more" if len(places) > PLACES else ""
    return f"also {', '.join(places[:PLACES])}{more}"
