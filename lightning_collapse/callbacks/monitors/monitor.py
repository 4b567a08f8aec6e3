"""Monitor: the cadence, lifecycle and publication that all monitors share, and the promise never to end a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.monitors.closing_line import say_unjudged
from lightning_collapse.callbacks.monitors.point_publication import publish_together
from lightning_collapse.callbacks.monitors.silent_layers import NOT_RUN, say_silent
from lightning_collapse.monitoring.feature_window import FeatureWindow
from lightning_collapse.monitoring.function_calls import has_fused_layers
from lightning_collapse.monitoring.to_host import to_host
from lightning_collapse.reporting import HEALTH, log_text, publish, try_again
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.modules import Tap, classification_head, clean_name, find_taps, is_compiled
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import CURVES, Curve, register_monitor
from lightning_collapse.utilities.told_once import kind_of
from lightning_collapse.utilities.trainer import batches_until, is_due, is_resumed, lighten_results, logging_step

Detail = Literal["high", "low"]
Name = tuple[str, str]
"""Of a reading: the layer and the measure."""

_IN_STEP = {"on_before_backward", "on_after_backward", "on_before_optimizer_step"}
"""Hooks of Lightning that the compiler would take for a part of such a step, and make graphs of."""


class Monitor(Callback, ABC):
    """Watches a fit and publishes points at a cadence; subclass it to watch something new.

    A subclass declares its curves, chooses what to watch in :meth:`start`, says in :meth:`read` what there is to read
    and in :meth:`points` what becomes of the numbers. If it sets ``window`` the rest is here: hooks, the batches
    that a point rests on, the state in checkpoints. It watches from ``on_fit_start``, when the model is built, moved
    and sharded, to the end or the failure of the fit; ``trainer.validate``, ``test`` and ``predict`` do not concern it.

    The first optimizer step of a run ends in a point, of the network as it was made; further ones follow at the
    cadence. What all monitors of a trainer read in a step leaves the device in one transfer, and reaches every logger,
    ``trainer.callback_metrics`` and every callback with ``on_points``
    (:class:`~lightning_collapse.reporting.PointReader`). Only construction and :meth:`start` raise; what fails later is
    a warning, once.

    Args:
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        detail: ``"high"``, or ``"low"`` to keep from loggers the curves that say how far to trust the others, ``n``,
            ``flag`` and ``nonfinite_fraction``; rules, readers of points and ``callback_metrics`` have them.

    Attributes:
        family: First part of the names of the curves it draws.
        declares: The curves; ``{curves}`` in the docstring of the class stands for their list.
        identity: Names of the arguments that tell two monitors of one trainer apart.
        window: The rows of the layers it watches, if :meth:`start` has made one.

    Raises:
        ValueError: If ``every_n_steps`` is not positive, or ``detail`` is neither.

    Example::

        class WeightNorm(Monitor):
            family, declares = "length", (Curve("norm", "all weights"),)
            def start(self, trainer, pl_module): ...
            def read(self, trainer, pl_module):
                return {("all", "norm"): torch.stack([p.norm() for p in pl_module.parameters()]).norm()}

        trainer = Trainer(callbacks=[WeightNorm()])
    """

    family: ClassVar[str] = ""
    declares: ClassVar[tuple[Curve, ...]] = ()
    identity: ClassVar[tuple[str, ...]] = ("every_n_steps",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _IN_STEP & vars(cls).keys():  # manual optimization in a step that is compiled as a whole
            setattr(cls, name, torch.compiler.disable(vars(cls)[name]))  # type: ignore[no-untyped-call]
        if cls.family:
            register_monitor(cls, cls.family, cls.declares)
            lines = (curve.line for curve in cls.declares)
            cls.__doc__ = (cls.__doc__ or "").replace("    {curves}", "\n".join(f"    {line}" for line in lines))

    def __init__(self, every_n_steps: int | None = None, detail: Detail = "high") -> None:
        if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise ValueError(
                f"`every_n_steps` must be a whole number of at least 1, or None to follow the trainer's, got"
                f" {every_n_steps!r}."
            )
        if detail not in get_args(Detail):
            raise ValueError(f"`detail` must be 'high' or 'low', got {detail!r}.")
        self.every_n_steps = every_n_steps
        self.detail = detail
        self.window: FeatureWindow | None = None
        self.contained = Containment(type(self).__name__)
        self._left = self._every = -1
        self._due = self._publishes = False
        self._points = 0
        self._warned: set[str] = set()
        self._silent: dict[str, tuple[str, list[str]]] = {}
        self._restored: dict[str, Any] = {}
        self._state_key, self._given = "", False
        self._paused: list[HookOwner] = []

    @property
    def curves(self) -> list[str]:
        """Last parts of the names of the curves it draws."""
        return [curve.name for curve in self.declares if curve.family in ("", self.family)]

    @property
    def families(self) -> set[str]:
        """First parts of the names of the curves it draws."""
        return {curve.family or self.family for curve in self.declares} | {self.family}

    @abstractmethod
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch. The only place that may raise."""

    def stop(self) -> None:
        """Cease to watch whatever ``window`` does not; called more than once."""

    def read(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[Name, Tensor]:
        """What there is to read, on its device: 0-dimensional tensors, or vectors, by layer and measure.

        Collective: every process calls it, and every process must return the same.
        """
        return {}

    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        """Points of ``step`` from what :meth:`read` returned, which is on the host now."""
        return [Point(self.family, layer, measure, step, value) for (layer, measure), value in numbers.items()]

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> Sequence[Point]:
        """Points of ``step``: :meth:`points` of :meth:`read`. Collective."""
        return self.points(step, to_host(self.read(trainer, pl_module)))

    def draw(self, trainer: Trainer, step: int) -> None:
        """Called after points were published, for pictures and text."""

    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        """Called before every training batch; ``batches_left`` is 0 if it ends in a point."""
        if self.window is not None:
            self.window.before_batch(batch, batches_left)

    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        """Called after every training batch, before :meth:`read` if it ends in a point."""
        if self.window is not None:
            self.window.after_batch(batches_left, self.between(trainer))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the window: tensors, numbers, strings, lists and dicts."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned; called after :meth:`start`."""

    def cadence(self, trainer: Trainer) -> int:
        """Optimizer steps between two points; 0 for never."""
        return trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps

    def usual_cadence(self, trainer: Trainer) -> int:
        """What :meth:`cadence` is for most of the run, where it is another one at the beginning."""
        return self.cadence(trainer)

    def between(self, trainer: Trainer) -> int:
        """Training batches from one point to the next."""
        return (self.cadence(trainer) or 1) * trainer.accumulate_grad_batches

    @property
    @override
    def state_key(self) -> str:
        if not self._state_key:  # Lightning asks for it at every hook
            values = {name: getattr(self, name) for name in self.identity}
            lists = {
                name: list(v) for name, v in values.items() if isinstance(v, Collection) and not isinstance(v, str)
            }
            self._state_key = self._generate_state_key(**values | lists)
        return self._state_key

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.window is None and not self._points:
            return dict(self._restored)  # saved before it has begun
        return {
            "points": self._points,
            "window": {} if self.window is None else self.window.state_dict(),
            "state": self.state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._given = bool(self._restored)  # by the user, and not by a tuner, which loads states after this

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in `setup`: `configure_model` and sharding come later, and SWA deep-copies hooks registered there
        self._stop()
        self.contained = Containment(type(self).__name__)
        self._points, self._due = 0, False
        self.start(trainer, pl_module)
        state, self._restored = self._restored, {}
        if state and (self._given or is_resumed(trainer)):
            with self.contained("the state in the checkpoint", "its curves go on without what came before"):
                self._points = state["points"]
                if self.window is not None and state["window"]:
                    self.window.load_state_dict(state["window"])
                self.restore(state["state"])
        self._explain_names(trainer, pl_module)
        self._publishes = [callback for callback in trainer.callbacks if isinstance(callback, Monitor)][-1] is self

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._left, self._due = -1, False
        every = self.cadence(trainer)
        if not every:
            return
        self._every = every if logging_step(trainer) else 1  # the first step of a run ends in a point
        self._left = batches_until(trainer, self._every)
        try:  # at every step, where a context costs as much as what is inside
            self.before_batch(trainer, batch, self._left)
        except Exception as error:
            self.contained.catch("what it does before a batch", "points may be missing", error)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._left >= 0:
            # that it was an epoch's last batch can be known only now, and only where that ends an accumulation early
            self._due = is_due(trainer, self._every) if trainer.accumulate_grad_batches > 1 else self._left == 0
            try:
                self.after_batch(trainer, pl_module, 0 if self._due else self._left)
            except Exception as error:
                self.contained.catch("what it does after a batch", "points may be missing", error)
        if self._publishes:
            due = [c for c in trainer.callbacks if getattr(c, "_due", False) and isinstance(c, Monitor)]
            if due:
                publish_together(due, trainer, pl_module)

    @property
    def listeners(self) -> list[HookOwner]:
        """All that has hooks on the model."""
        return [] if self.window is None else self.window.listeners

    def hears_validation(self) -> bool:
        """Whether its hooks stay on the model while it is validated."""
        return False

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # hooks keep torch from its fast path through a transformer, which rounds otherwise; other graphs keep them
        if not self.hears_validation() and (not is_compiled(pl_module) or has_fused_layers(pl_module)):
            with self.contained("taking its hooks off for the validation", "they stay"):
                for owner in self.listeners:
                    owner.pause()
                    self._paused.append(owner)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        paused, self._paused = self._paused, []
        with self.contained("putting its hooks on again after the validation", "its curves end here"):
            for owner in paused:
                owner.resume()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the point of the first step does not count
        if self._points < (1 if self.cadence(trainer) == 1 else 2):
            self.warn_of_no_point(trainer)
        say_unjudged(trainer, {c: c._points for c in trainer.callbacks if isinstance(c, Monitor)}, self._publishes)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()  # `teardown` is not called when the trainer fails
        try_again(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()
        try_again(trainer)
        if stage == "fit" and lighten_results(trainer, _is_detail):
            rank_zero_info(
                "`callback_metrics` leave out the curves of single layers in the main process: a spawned process cannot"
                " hand back so many. Loggers have them all."
            )

    def publish(self, trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> None:
        """Hand points on; see :func:`~lightning_collapse.reporting.publish`."""
        publish(trainer, pl_module, self.in_detail(points))
        say_silent(trainer, [self])

    def choose_taps(self, layers: Sequence[str] | None, default: Sequence[Tap], root: nn.Module) -> list[Tap]:
        """Taps by the names or patterns that the argument ``layers`` holds, or the default ones without any.

        Raises:
            MisconfigurationException: If a pattern matches nothing.
        """
        if layers is None:
            return list(default)
        try:
            return find_taps(root, layers)
        except ValueError as error:
            call = f"`{type(self).__name__}(layers={list(layers)!r})`"
            raise MisconfigurationException(f"{call}: {error}") from error

    find_head = staticmethod(classification_head)

    def choose_tap(self, argument: str, name: str | None, root: nn.Module, suffix: str = "") -> Tap:
        """The one tap that the argument names, or without a name what the head of the model receives.

        Raises:
            MisconfigurationException: If there is none, or if there are several.
        """
        call = f"`{type(self).__name__}({argument}={name!r})`"
        if name is None:
            head = self.find_head(root)
            if head is None:
                raise MisconfigurationException(f"{call}: the model has no Linear layer to end with. Name one.")
            return head
        try:
            taps = find_taps(root, [name + suffix])
        except ValueError as error:
            raise MisconfigurationException(f"{call}: {error}") from error
        if len(taps) != 1:
            found = ", ".join(tap.name for tap in taps)
            raise MisconfigurationException(f"{call}: it matches {len(taps)} layers, {found}. Name one.")
        return taps[0]

    def warn_of_no_point(self, trainer: Trainer) -> None:
        """Say that the fit was too short for a point, unless none was wanted."""
        if self.cadence(trainer) and not trainer.fast_dev_run:
            self.warn_once(
                f"the fit ended before the first point, due after {self.cadence(trainer)} steps."
                " Set `every_n_steps` to less."
            )

    def warn_once(self, message: str) -> None:
        """Say something once per callback, on the first process; what differs in numbers alone is no news."""
        if (kind := kind_of(message)) not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(f"`{type(self).__name__}`: {message}")

    def warn_of_layer(self, layer: str, text: str = NOT_RUN) -> None:
        """Have one warning say of layers, ``{}``, that nothing came of them, unless a hook has said already why."""
        if self.window is None or layer not in self.window.hooks.left_out:
            self._silent.setdefault(kind_of(text), (text, []))[1].append(layer)

    def pop_silent(self) -> dict[str, tuple[str, list[str]]]:
        """What :meth:`warn_of_layer` was told since the last time: a text and its layers, by kind."""
        silent, self._silent = self._silent, {}
        return silent

    def _explain_names(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log which layer is meant by a curve whose name not every logger could have shown as it is."""
        watched = {id(tap.module): tap.name for tap in (self.window.taps if self.window is not None else ())}
        names = {clean_name(name): watched.get(id(module), "") for name, module in pl_module.named_modules()}
        foreign = [f"- `{curve}` is `{name}`" for name, curve in names.items() if curve and not name.isascii()]
        for logger in trainer.loggers if foreign else ():
            log_text(logger, f"{self.family}/names", "\n".join(foreign), step=0)

    @property
    def measures_itself(self) -> bool:
        """Whether it brings its own numbers to the host, and not with those of the other monitors."""
        return type(self).measure is not Monitor.measure

    def in_detail(self, points: Sequence[Point]) -> Sequence[Point]:
        """Points as ``detail`` has them drawn."""
        if self.detail == "high":
            return points
        return [point._replace(drawn=False) if point.measure in HEALTH else point for point in points]

    def _stop(self) -> None:
        self._paused = []
        with self.contained("what it does at the end"):
            self.stop()
        if self.window is not None:
            self.window.close()
        self.window = None


def _is_detail(name: str) -> bool:
    """Whether a curve is one of a single layer."""
    family, _, rest = name.removeprefix("val/").partition("/")
    return (
        "/" in rest
        and not rest.startswith("all/")
        and family in {curve.family for curve in CURVES.values()} | {"collapse"}
    )
