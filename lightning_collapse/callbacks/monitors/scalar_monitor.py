"""Scalar monitor: named metrics and the training loss as points, so that a rule can watch a perplexity or a reward."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Monitor
from lightning_collapse.utilities.distributed import all_reduce_sum
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.trainer import logging_step

FAMILY, VALUE, LOSS = "scalars", "value", "loss"
register_curve(FAMILY, VALUE, reads="a logged metric, or the loss", range="any", collapsed="up to its rule", source="")


class ScalarMonitor(Monitor):
    """Republishes named scalars of ``trainer.callback_metrics``, and the loss, as points that rules can read.

    The name of the scalar is the layer of its points, and their measure is ``"value"``. What validation logs is
    published at the end of validation, everything else at the monitor's own cadence, and each only if it was logged
    since: a value of long ago is no point. The mean over processes is published.

    **Logged metrics**: ``scalars/{name}/value``.

    Args:
        names: Keys of ``trainer.callback_metrics``, such as ``"val/perplexity"``. ``"loss"`` is what the running
            training step returned, unless the module logs another one of that name.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.

    Raises:
        ValueError: If ``names`` is a string, empty, or holds anything but strings, or ``every_n_steps`` is not
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

    family: ClassVar[str] = FAMILY

    def __init__(self, names: Sequence[str], every_n_steps: int | None = None) -> None:
        if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"`names` takes a list of names of logged metrics, such as ['loss'], got {names!r}.")
        super().__init__(every_n_steps)
        self.names = list(dict.fromkeys(names))
        self.stop()

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    @override
    def stop(self) -> None:
        self._outputs: Any = None
        self._found: set[str] = set()
        # the tensors that were there when a metric was last published: one that was logged since is another
        self._seen: dict[str, Any] = {}
        self._of_validation: set[str] = set()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._outputs = outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._outputs = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = self._metrics(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            now = self._metrics(trainer)
            self._of_validation |= {name for name in now if now[name] is not self._seen.get(name)}
            self.publish(trainer, pl_module, self._points(pl_module, now, self._of_validation, logging_step(trainer)))

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> Sequence[Point]:
        now = self._metrics(trainer)
        loss = self._outputs.get(LOSS) if isinstance(self._outputs, Mapping) else self._outputs
        if LOSS in self.names and LOSS not in now and isinstance(loss, Tensor):
            now[LOSS] = loss
        return self._points(pl_module, now, set(self.names) - self._of_validation, step)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if missing := [name for name in self.names if name not in self._found]:
            there = ", ".join(sorted({*trainer.callback_metrics} - {*missing})) or "none"
            self.warn_once(
                f"nothing was logged as {', '.join(map(repr, missing))} when a point was due; there is {there}."
            )

    def _metrics(self, trainer: Trainer) -> dict[str, Any]:
        metrics = trainer.callback_metrics
        return {name: metrics[name] for name in self.names if name in metrics}

    def _points(self, pl_module: LightningModule, now: dict[str, Any], names: set[str], step: int) -> list[Point]:
        """Points of those that were logged since the last ones; the one wait for the device. Collective."""
        fresh = {name for name in names if name in now and now[name] is not self._seen.get(name)}
        self._seen |= now
        # not every process need have logged the same
        values = [torch.as_tensor(now[name]).detach().float().mean() if name in fresh else None for name in self.names]
        zero = torch.zeros((), device=pl_module.device)
        sums = torch.stack([zero if value is None else value.to(pl_module.device) for value in values])
        counts = torch.tensor([float(value is not None) for value in values], device=pl_module.device)
        total, count = all_reduce_sum(torch.stack([sums, counts])).tolist()
        self._found |= {name for name, n in zip(self.names, count, strict=True) if n}
        return [
            Point(FAMILY, name, VALUE, step, value / n, int(n))
            for name, value, n in zip(self.names, total, count, strict=True)
            if n
        ]
