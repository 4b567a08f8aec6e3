"""Every penalty, an independent reference for it, and how it is to be judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.penalties.references import (
    EWCReference,
    KFACEWCReference,
    L2InitReference,
    L2SPReference,
    MASReference,
    RankOneEWCReference,
    Reference,
    RWalkReference,
    SoftOrthogonalityReference,
    SynapticIntelligenceReference,
)


@dataclass(frozen=True)
class Case:
    """A penalty in the battery.

    Attributes:
        reference: The same of a linear softmax classifier, from its weight.
        weight: Strength in the battery, such that the penalty matters in a fit of the toy.
        arguments: Others, of the penalty as the reference is.
        consolidates: Whether it is zero until a task has ended, and right after one.
        toy: Arguments in the toy, if not these.
        separable: Whether the pull on a parameter depends on no other one.
        remembers: Whether it keeps anything of weights; else only matrices are pulled, wherever they come from.
    """

    reference: Callable[[float], Reference]
    weight: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    consolidates: bool = True
    toy: Mapping[str, Any] | None = None
    separable: bool = True
    remembers: bool = True


CASES = {
    "EWC": Case(EWCReference, 5.0, {"n_samples": None}),
    "KFACEWC": Case(KFACEWCReference, 5.0, {"n_samples": None}),
    "MAS": Case(MASReference, 0.02),
    "L2Init": Case(L2InitReference, 0.05, consolidates=False),
    "L2SP": Case(
        L2SPReference, 0.1, {"new": ["bias"], "new_weight": 0.05}, consolidates=False, toy={"new": ["head.*"]}
    ),
    "RankOneEWC": Case(RankOneEWCReference, 0.5, separable=False),
    "RWalk": Case(RWalkReference, 0.1, {"every_n_steps": 3}, toy={"every_n_steps": 4}),
    "SoftOrthogonality": Case(SoftOrthogonalityReference, 0.02, consolidates=False, remembers=False),
    "SynapticIntelligence": Case(SynapticIntelligenceReference, 1.0),
}
