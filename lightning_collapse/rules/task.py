"""Task: what a network is trained for, as far as it changes what counts as a failure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

TaskName = Literal[
    "classification",
    "multi-label",
    "regression",
    "language model",
    "self-supervised",
    "reconstruction",
    "denoising",
    "reinforcement",
]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
"""Classes that exclude each other; several answers that do not; numbers; tokens; features compared with features; what
the network receives; noise that was added to it; outputs that actions choose."""


@dataclass(frozen=True)
class Task:
    """A task, and where it ends.

    Attributes:
        name: One of :data:`TASKS`; empty if it is not known, which changes nothing.
        why: What it was inferred from, in words; empty if it was told. Of an unknown one, why it is not known.
        directions: How many directions the last features keep when training succeeds: neural collapse leaves ``C - 1``
            of ``C`` classes (Papyan, Han & Donoho, 2020, arXiv 2008.08186), regression as many as there are targets
            (Andriopoulos et al., 2024, arXiv 2409.04180), and so do several labels that do not exclude each other,
            whose scores are as many; never more than there are features. 0 where there is no such end.
        last: Names of the layers from the one before the output layer on.
        outputs: Those of them whose outputs the loss compares with targets, so that nothing is said of how they lie.
        conditioning: Names of layers that hold few directions by design: what embeds one number or a position,
            routers, heads of a variance.
        reasons: Why, for each of these, in words.
        embeddings: Names of the layers whose outputs the loss compares with each other; empty if that is not known.

    Example:
        >>> str(Task("regression", directions=2)), str(Task())
        ('regression, which may end in 2 direction(s)', 'an unknown task')
    """

    name: str = ""
    why: str = ""
    directions: int = 0
    last: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    conditioning: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict, compare=False)
    embeddings: frozenset[str] = frozenset()

    def __str__(self) -> str:
        ends = f", which may end in {self.directions} direction(s)" if self.directions else ""
        return f"{self.name or 'an unknown task'}{ends}"
