"""Scalar monitor: named metrics and the training loss as points, so that a rule can watch a perplexity or a reward."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.logged_scalars import COUNT, VALUE, LoggedScalars
from lightning_collapse.callbacks.monitors.monitor import Monitor, Name
from lightning_collapse.monitoring.to_host import to_host
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.trainer import logging_step

LOSS = "loss"


class ScalarMonitor(Monitor):
    """Republishes named scalars of ``trainer.callback_metrics``, and the loss, as points that rules can read.

    The name of the scalar is the layer of its points, and their measure is ``"value"``. What validation logs is
    published at the end of validation, everything else at the monitor's own cadence, and each only if it was logged
    since: a value of long ago is no point. The mean over processes is published.

    **Logged metrics**, ``scalars/{name}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    Args:
        scalars: Keys of ``trainer.callback_metrics``, such as ``"val/perplexity"``. ``"loss"`` is what the running
            training step returned, unless the module logs another one of that name.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.

    Raises:
        ValueError: If ``scalars`` is a string, empty, or holds anything but strings, or ``every_n_steps`` is not
            positive.

    Example::

        @register_rule
        class PerplexityExplosion(Rule):
            kind, family, measures = "perplexity_explosion", "scalars", ("value",)

            def applies_to(self, layer, task):
                return layer == "val/perplexity"

            def update_baseline(self, so_far, value, count):
                return min(so_far, value)

            def severity(self, points, baseline):
                return points["value"].value / (2 * baseline["value"])

            def evidence(self, points, baseline):
                return f"the perplexity is {points['value'].value:.3g}, and began with {baseline['value']:.3g}"

        trainer = Trainer(callbacks=[ScalarMonitor(["val/perplexity"]), CollapseGuard(rules=["perplexity_explosion"])])
    """

    family = "scalars"
    declares = (Curve(VALUE, "a logged metric, or the loss", "any", "up to its rule"),)
    identity = ("scalars", "every_n_steps")

    def __init__(self, scalars: Sequence[str], every_n_steps: int | None = None) -> None:
        if isinstance(scalars, str) or not scalars or not all(isinstance(name, str) for name in scalars):
            raise ValueError(f"`scalars` takes a list of names of logged metrics, such as ['loss'], got {scalars!r}.")
        super().__init__(every_n_steps)
        self._logged = LoggedScalars(scalars)
        self.scalars = self._logged.names
        self._forget()

    def _forget(self) -> None:
        self._loss: Tensor | None = None
        self._logged.forget()
        self._of_validation: set[str] = set()

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get(LOSS) if isinstance(outputs, Mapping) else outputs
        self._loss = loss.detach() if isinstance(loss, Tensor) else None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._logged.note(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        with self.contained("reading the metrics of validation", "the point is left out"):
            now = self._logged.present(trainer)
            self._of_validation |= {name for name in now if self._logged.is_fresh(name, now)}
            numbers = to_host(self._logged.readings(pl_module, now, self._of_validation))
            self.publish(trainer, pl_module, self.points(logging_step(trainer), numbers))

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[Name, Tensor]:
        now = self._logged.present(trainer)
        if self._loss is not None and LOSS in self.scalars:
            now.setdefault(LOSS, self._loss)
        return self._logged.readings(pl_module, now, set(self.scalars) - self._of_validation)

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        counts = {layer: int(n) for (layer, measure), n in numbers.items() if measure == COUNT and n}
        return [Point(self.family, name, VALUE, step, numbers[name, VALUE] / n, n) for name, n in counts.items()]

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        there = {*trainer.callback_metrics} | ({LOSS} if self._loss is not None else set())
        if missing := [name for name in self.scalars if name not in there]:
            named, others = ", ".join(map(repr, missing)), ", ".join(sorted(there)) or "none"
            self.warn_once(f"nothing was logged as {named}; there is {others}.")
