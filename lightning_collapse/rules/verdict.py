"""What a rule has found."""

from collections.abc import Sequence
from dataclasses import dataclass


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
    """

    kind: str
    layer: str
    since: int
    step: int
    evidence: str
    severity: float = 1.0
    advice: str = ""
    also: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The kind and the layer, in words."""
        return f"{self.kind.replace('_', ' ')} in `{self.layer}`"

    def __str__(self) -> str:
        also = f"; also {', '.join(self.also)}" if self.also else ""
        advice = f" {self.advice}" if self.advice else ""
        return f"{self.name} since step {self.since}: {self.evidence}{also}.{advice}"
