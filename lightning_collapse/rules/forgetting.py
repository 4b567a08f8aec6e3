"""Catastrophic forgetting: a task that was learned and is not known any more."""

from collections.abc import Mapping
from math import inf, sqrt

from lightning_collapse.rules.base import Rule, register_rule
from lightning_collapse.rules.task import Task
from lightning_collapse.utilities.points import Point


@register_rule
class CatastrophicForgetting(Rule):
    """Half of what was learned of a task is lost while others are learned.

    Learned is what the best accuracy of the run has above that of the untrained network, the null of the point, or
    above zero where that is unknown; a task counts as learned once this is half of all that can be. The loss must also
    be more than three standard errors. One point is enough: it rests on a whole data set, and few are drawn. The term
    is McCloskey and Cohen's (1989); the numbers are ours. Scores outside 0 to 1 are not judged.

    Example:
        >>> values = {"accuracy": 0.4}
        >>> points = {name: Point("continual", "task0", name, 9, value, n=256) for name, value in values.items()}
        >>> CatastrophicForgetting().severity(points, {"accuracy": 0.9}) > 1
        True
    """

    kind = "catastrophic_forgetting"
    says = "Half of what was learned of task `{layer}` is forgotten."
    family = "continual"
    measures = ("accuracy",)
    lower_is_worse = ("accuracy",)
    calibration = inf
    patience = 1
    share = 0.5
    errors = 3.0
    advice = "Keep what was learned with `Distillation`, or with `CLASSP` as the optimizer."
    paper = "McCloskey & Cohen, 1989, Psychology of Learning and Motivation 24"

    def applies_to(self, layer: str, task: Task) -> bool:
        """Every task, but not the mean over them."""
        return bool(layer)

    def severity(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> float:
        """What was lost over half of what was learned, or over three standard errors if that is less."""
        now, best = points["accuracy"], baseline["accuracy"]
        null = max(0.0, now.null)  # in this order 0 for NaN
        if now.n < 1 or not (0 <= now.value <= best <= 1) or best < (1 + null) / 2:
            return 0.0
        error = self.errors * sqrt((best * (1 - best) + now.value * (1 - now.value)) / now.n)
        return (best - now.value) / max(self.share * (best - null), error, 1e-300)

    def evidence(self, points: Mapping[str, Point], baseline: Mapping[str, float]) -> str:
        """The accuracy, now and at its best, and that of the untrained network."""
        now = points["accuracy"]
        null = f", and the untrained network's {now.null:.2f}" if now.null >= 0 else ""
        return (
            f"over {now.n} samples the accuracy on this task is {now.value:.2f}, where its best was"
            f" {baseline['accuracy']:.2f}{null}"
        )
