"""Geometry phases: those that the rank of a language model's representations goes through."""

from __future__ import annotations

from enum import IntEnum
from math import inf, isfinite, log
from typing import Any


class Phase(IntEnum):
    """Where a run is; logged as the curve ``geometry/{layer}/phase``.

    Example:
        >>> Phase(2).name, Phase.COMPRESSION_SEEKING > Phase.ENTROPY_SEEKING
        ('ENTROPY_SEEKING', True)
    """

    WARM_UP = 1
    """The rank falls from its random beginning."""
    ENTROPY_SEEKING = 2
    """The rank rises: more directions are used, n-grams are memorized."""
    COMPRESSION_SEEKING = 3
    """The rank falls again: variance gathers in the leading directions."""


class PhaseTracker:
    """Reads the phase of a run off its curve of effective ranks, with hysteresis, in constant memory.

    A phase ends when the rank has turned: when it is ``hysteresis`` above the lowest value of a falling phase, or below
    the highest of a rising one, for ``patience`` readings in a row. After the warm-up the two other phases may
    alternate. The paper names the phases and shows their curves; this rule for reading them off is ours.

    Args:
        hysteresis: Relative change that counts as a turn.
        patience: Readings in a row it takes.

    Attributes:
        phase: The present :class:`Phase`.

    Raises:
        ValueError: If ``hysteresis`` or ``patience`` is not positive.

    References:
        Li et al., *Tracing the Representation Geometry of Language Models from Pretraining to Post-training*,
        NeurIPS 2025. https://arxiv.org/abs/2509.23024

    Example:
        >>> tracker = PhaseTracker(patience=1)
        >>> [int(tracker.update(rank)) for rank in (40, 20, 10, 15, 30, 31, 25, 20)]
        [1, 1, 1, 2, 2, 2, 3, 3]
    """

    def __init__(self, hysteresis: float = 0.1, patience: int = 2) -> None:
        if not hysteresis > 0:
            raise ValueError(f"`hysteresis` is the relative change that counts as a turn: positive, got {hysteresis}.")
        if patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {patience}.")
        self.hysteresis = hysteresis
        self.patience = patience
        self.phase = Phase.WARM_UP
        self._extreme = inf
        self._turned = 0

    def update(self, rank: float) -> Phase:
        """Take the next reading, a positive rank, and say which phase it is; anything else is left out."""
        if not (isfinite(rank) and rank > 0):
            return self.phase
        rising = self.phase == Phase.ENTROPY_SEEKING
        extreme = max if rising else min
        self._extreme = extreme(self._extreme, rank)
        away = abs(log(rank / self._extreme)) > log(1 + self.hysteresis)
        self._turned = self._turned + 1 if away else 0
        if self._turned >= self.patience:
            self.phase = Phase.COMPRESSION_SEEKING if rising else Phase.ENTROPY_SEEKING
            self._extreme, self._turned = rank, 0
        return self.phase

    def state_dict(self) -> dict[str, Any]:
        """All there is to remember."""
        return {"phase": int(self.phase), "extreme": self._extreme, "turned": self._turned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another tracker left off."""
        self.phase = Phase(state_dict["phase"])
        self._extreme, self._turned = state_dict["extreme"], state_dict["turned"]
