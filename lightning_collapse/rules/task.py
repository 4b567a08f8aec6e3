"""Task: what a network is trained for, as far as it changes what counts as a failure."""

from dataclasses import dataclass

TASKS = ("classification", "regression", "self-supervised", "language model")


@dataclass(frozen=True)
class Task:
    """A task, and where it ends.

    Attributes:
        name: One of :data:`TASKS`; empty if it is not known, which changes nothing.
        why: What it was inferred from, in words; empty if it was told.
        directions: How many directions the last features keep when training succeeds: neural collapse leaves ``C - 1``
            of ``C`` classes (Papyan, Han & Donoho, 2020, arXiv 2008.08186), regression as many as there are targets
            (Andriopoulos et al., 2024, arXiv 2409.04180). 0 where there is no such end.
        last: Names of the layers from the one before the output layer on.
        outputs: Those of them whose outputs follow targets, so that nothing is said of how they lie.
        kinds: What is judged: kinds of the rules whose curves are drawn.
    """

    name: str = ""
    why: str = ""
    directions: int = 0
    last: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()

    def __str__(self) -> str:
        ends = f", which may end in {self.directions} direction(s)" if self.directions else ""
        return f"{self.name or 'an unknown task'}{ends}"
