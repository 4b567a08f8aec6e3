"""What a specimen is: a run that fails, and the twin that differs from it in one setting and does not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

KINDS = frozenset(
    {
        "attention_entropy_collapse",
        "attention_logit_growth",
        "attention_logit_limit",
        "attention_overload",
        "catastrophic_forgetting",
        "codebook_collapse",
        "complete_collapse",
        "dimensional_collapse",
        "headroom",
        "layer_collapse",
        "loss_explosion",
        "loss_spike",
        "minority_collapse",
        "non_finite",
        "non_finite_origin",
        "non_finite_step",
        "output_entropy_collapse",
        "partial_collapse",
        "plasticity_loss",
        "point_collapse",
        "posterior_collapse",
        "prediction_collapse",
        "prototype_collapse",
        "regression_over_compression",
        "router_collapse",
        "state_collapse",
        "token_collapse",
    }
)
"""What may be wrong with a run, whether or not there is a rule that says so."""


@dataclass(frozen=True)
class Habitat:
    """All that one run needs.

    Attributes:
        model: What trains.
        tasks: A training loader each, one after the other.
        monitors: The monitors that a user of such a model would add.
        steps: Optimizer steps of each task.
        embedding: The layer whose outputs the baseline of the normalized standard deviation reads.
        held_out: Accuracy on held-out data, or another score of which 1 is best.
        every: Steps between two points, as ``Trainer(log_every_n_steps)``.
        trainer: Further arguments of the ``Trainer``.
        outcome: What became of the model, read once after training; higher is better, ``held_out`` by default. It
            reads the model and held-out data only, so it does not know what any monitor saw.
    """

    model: LightningModule
    tasks: Sequence[Any]
    monitors: Sequence[Callback]
    steps: int
    embedding: nn.Module
    held_out: Callable[[], float]
    every: int = 5
    trainer: Mapping[str, Any] = field(default_factory=dict)
    outcome: Callable[[Any], float] | None = None

    def result(self) -> float:
        """The outcome, in evaluation mode and without gradients; a twin fails if its own is clearly lower."""
        training = [module.training for module in self.model.modules()]
        self.model.eval()
        with torch.no_grad():
            result = self.held_out() if self.outcome is None else self.outcome(self.model)
        for module, flag in zip(self.model.modules(), training, strict=True):
            module.training = flag
        return result


@dataclass(frozen=True)
class Specimen:
    """A planted failure and its twin, or (``kind=None``) a healthy run that looks dangerous.

    Attributes:
        name: What it is called.
        make: Builds a run from a seed, and the one setting by its name.
        says: What goes wrong, or what looks dangerous.
        kind: The verdict that is right.
        setting: The argument of ``make`` in which the twins differ; none for a run without a twin.
        healthy: Its healthy value.
        sick: Its value that causes the failure.
        layers: Glob patterns of the layers that count as right.
        develops: Whether it begins healthy; else it is sick from the first step, and there is no lead to win.
        family: What it trains, to group specimens in tables.
        claims: All kinds of verdict that are right of the sick run; ``kind`` alone by default.
        onset: Step at which the fault is planted.
    """

    name: str
    make: Callable[..., Habitat]
    says: str
    kind: str | None = None
    setting: str | None = None
    healthy: Any = None
    sick: Any = None
    layers: tuple[str, ...] = ("*",)
    develops: bool = True
    family: str = "basic"
    claims: tuple[str, ...] = ()
    onset: int = 0

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in self.claims:
            object.__setattr__(self, "claims", (self.kind, *self.claims))  # the class is frozen

    def build(self, seed: int, sick: bool) -> Habitat:
        """The failing run, or its twin."""
        if self.setting is None:
            return self.make(seed)
        return self.make(seed, **{self.setting: self.sick if sick else self.healthy})

    def is_right(self, layer: str) -> bool:
        """Whether a verdict names a layer in which the failure is."""
        return any(fnmatchcase(layer, pattern) for pattern in self.layers)
