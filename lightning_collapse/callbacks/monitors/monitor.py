"""What every monitor shares: cadence, lifecycle, publication and a promise never to end a run."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_collapse.reporting import dashboard_layout, legend, log_dashboard, log_text, publish
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import CURVES
from lightning_collapse.utilities.trainer import batches_until, is_due, lighten_results, logging_step


class Monitor(Callback, ABC):
    """Watches a fit and publishes points at a cadence; subclass it to watch something new.

    A subclass listens in :meth:`start`, stops in :meth:`stop`, and turns what it heard into points in :meth:`measure`;
    the rest of the lifecycle is here. It listens from ``on_fit_start``, when the model is built, moved and sharded, to
    the end or the failure of the fit; ``trainer.validate``, ``test`` and ``predict`` do not concern it. Points reach
    every logger, ``trainer.callback_metrics`` and every callback with ``on_points``
    (:class:`~lightning_collapse.reporting.PointReader`).

    Args:
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.

    Attributes:
        family: First part of the names of the curves it draws.

    Raises:
        ValueError: If ``every_n_steps`` is not positive.
    """

    family: ClassVar[str] = ""

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise ValueError(
                f"`every_n_steps` must be a whole number of at least 1, or None to follow the trainer's, got"
                f" {every_n_steps!r}."
            )
        self.every_n_steps = every_n_steps
        self._left = -1
        self._warned: set[str] = set()

    @property
    def curves(self) -> list[str]:
        """Last parts of the names of the curves it draws."""
        return [curve.name for curve in CURVES.values() if curve.family == self.family]

    @abstractmethod
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen. The only place that may raise."""

    @abstractmethod
    def stop(self) -> None:
        """Cease to listen and forget what was heard; called more than once."""

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> Sequence[Point]:
        """Turn what was heard into points of ``step``.

        Collective: every process calls it, and every process must return the same points.
        """

    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        """Called before every training batch; ``batches_left`` is 0 if it ends in a point."""

    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        """Called after every training batch, before :meth:`measure` if it ends in a point."""

    def cadence(self, trainer: Trainer) -> int:
        """Optimizer steps between two points; 0 for never."""
        return trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in `setup`: `configure_model` and sharding come later, and SWA deep-copies hooks registered there
        self.stop()
        self.start(trainer, pl_module)
        if next(c for c in trainer.callbacks if isinstance(c, Monitor)) is self:  # a run has one dashboard
            for logger in trainer.loggers:
                log_dashboard(logger, dashboard_layout())
                log_text(logger, "collapse/legend", legend(), step=0)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._left = -1
        if every := self.cadence(trainer):
            self._left = batches_until(trainer, every)
            self.before_batch(trainer, batch, self._left)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._left < 0:
            return
        # that it was an epoch's last batch can be known only now, and only where that ends an accumulation early
        due = is_due(trainer, self.cadence(trainer)) if trainer.accumulate_grad_batches > 1 else self._left == 0
        self.after_batch(trainer, pl_module, 0 if due else self._left)
        if due:
            self.publish(trainer, pl_module, self.measure(trainer, pl_module, logging_step(trainer)))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()  # `teardown` is not called when the trainer fails

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.stop()
        if stage == "fit" and lighten_results(trainer, _is_detail):
            rank_zero_info(
                "`callback_metrics` leave out the curves of single layers in the main process: a spawned process cannot"
                " hand back so many. Loggers have them all."
            )

    @staticmethod
    def publish(trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> None:
        """Hand points on; see :func:`~lightning_collapse.reporting.publish`."""
        publish(trainer, pl_module, points)

    def warn_of_no_point(self, trainer: Trainer) -> None:
        """Say that the fit was too short for a point, unless none was wanted."""
        if self.cadence(trainer) and not trainer.fast_dev_run:
            self.warn_once(
                f"the fit ended before the first point, due after {self.cadence(trainer)} steps."
                " Set `every_n_steps` to less."
            )

    def warn_once(self, message: str) -> None:
        """Say something once per callback, on the first process."""
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(f"`{type(self).__name__}`: {message}")


def check_layers(layers: Any, everything: str) -> None:
    """Refuse what cannot be names of layers; ``everything`` says what is watched without them.

    Raises:
        ValueError: If it is a string, empty, no collection, or holds anything but strings.
    """
    if layers is None:
        return
    if isinstance(layers, str):
        raise ValueError(f"`layers` takes a list of names, got the string {layers!r}. Write `layers=[{layers!r}]`.")
    if not isinstance(layers, Collection) or not all(isinstance(name, str) for name in layers):
        raise ValueError(f"`layers` takes a list of names of submodules, got {layers!r}.")
    if not layers:
        raise ValueError(f"`layers` is empty. Leave it out to watch {everything}.")


def _is_detail(name: str) -> bool:
    """Whether a curve is one of a single layer."""
    family, _, rest = name.removeprefix("val/").partition("/")
    return (
        "/" in rest
        and not rest.startswith("all/")
        and family in {curve.family for curve in CURVES.values()} | {"collapse"}
    )
