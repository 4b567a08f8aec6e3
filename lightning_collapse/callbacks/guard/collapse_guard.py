"""Collapse guard: which collapse, in which layer, since which step, on what evidence, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.callbacks.guard.action import Action, FollowsReturns, action_name, load_states, states_of
from lightning_collapse.callbacks.guard.arguments import ActionLike, check_rules, make_actions, make_outcome
from lightning_collapse.callbacks.guard.outcome_reader import Source
from lightning_collapse.callbacks.guard.required_monitors import require_available
from lightning_collapse.callbacks.guard.task_inference import infer_task
from lightning_collapse.callbacks.guard.training_health import TrainingHealth, planned_points
from lightning_collapse.callbacks.loss_reader import LossReader, reader_of
from lightning_collapse.reporting import publish, try_again
from lightning_collapse.rules import OUTCOME, RULES, TASKS, Judge, Judgement, OutcomeDrop, Rule, Task, Verdict
from lightning_collapse.rules.outcome import Mode
from lightning_collapse.rules.task import TaskName
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.trainer import is_resumed


class CollapseGuard(Callback):
    """Says what fails, in which layer and since when, and acts; reads the points of every monitor of the trainer.

    Each verdict compares with what noise of the same size reads and with the run's own beginning; the rules
    (:mod:`lightning_collapse.rules`) say how, and of which paper. With ``CollapseMonitor``: *complete collapse*
    (:class:`~lightning_collapse.rules.CompleteCollapse`), *dimensional collapse*
    (:class:`~lightning_collapse.rules.DimensionalCollapse`) and *non finite* features
    (:class:`~lightning_collapse.rules.NonFinite`); with ``SpectralAlignmentMonitor`` *loss explosion*
    (:class:`~lightning_collapse.rules.LossExplosion`); with ``AttentionEntropyMonitor`` *attention entropy collapse*
    (:class:`~lightning_collapse.rules.AttentionEntropyCollapse`) and *attention overload*
    (:class:`~lightning_collapse.rules.AttentionOverload`); with ``PlasticityMonitor`` *plasticity loss*
    (:class:`~lightning_collapse.rules.PlasticityLoss`); with ``WeightSpectrumMonitor`` *layer collapse* under pruning
    (:class:`~lightning_collapse.rules.LayerCollapse`); with ``ContinualMetrics`` *catastrophic forgetting*
    (:class:`~lightning_collapse.rules.CatastrophicForgetting`); with ``RegressionCollapseMonitor`` *regression
    over-compression* (:class:`~lightning_collapse.rules.RegressionOverCompression`); with ``NeuralCollapseMonitor``
    *minority collapse* (:class:`~lightning_collapse.rules.MinorityCollapse`), and as a notice without any action
    *neural collapse reached* (:class:`~lightning_collapse.rules.NeuralCollapseReached`); with ``StabilityMonitor``
    *loss spike* (:class:`~lightning_collapse.rules.LossSpike`), *non finite step*
    (:class:`~lightning_collapse.rules.NonFiniteStep`), *skipped steps*
    (:class:`~lightning_collapse.rules.SkippedSteps`), and as a notice *divergence ahead*
    (:class:`~lightning_collapse.rules.DivergenceAhead`). Rules of your own can watch any scalar, such as a perplexity
    or a reward, with :class:`~lightning_collapse.ScalarMonitor`.

    A verdict is triggered after ``patience`` points in a row on the wrong side of the line, and is over only after as
    many on the right side of twice the line, where a rule does not know better, see
    :class:`~lightning_collapse.rules.Judge`. What fails together, or soon after, is one verdict that names the first
    layer and then the others, see :class:`~lightning_collapse.rules.VerdictGrouper`.

    The task decides which rules apply and what is expected: the last features of a classifier or of a regression may
    end in as few directions as there are classes less one, or targets, and that is a notice and no failure. It is given
    with ``task``, or inferred from what the first loss compares, and said, see
    :func:`~lightning_collapse.callbacks.guard.task_inference.infer_task`; an unknown one changes nothing. The attribute
    ``task`` is the :class:`~lightning_collapse.rules.Task` that the fit is taken for.

    With ``outcome``, the name of a metric that the module logs, every verdict also says whether that has moved yet:
    that a layer has failed before the score did is what the guard is for. The score is read whenever it is logged, and
    a lasting fall is a verdict of its own, *outcome drop* (:class:`~lightning_collapse.rules.OutcomeDrop`).

    When a fit ends one line says what was found, in how many layers and over how many points, and which layers were
    not judged and why.

    **Logged metrics**: ``guard/{kind}``, such as ``guard/complete_collapse``, the number of layers so judged; with a
    ``SwitchOn`` also ``guard/switch_on/{name}``, the share of the weight; with an outcome ``outcome/{name}/value``,
    ``best``, ``shift`` (1 or more is a fall) and ``onset`` (since when). Plain stopping on a single curve is
    ``EarlyStopping``'s business.

    Args:
        action: What to do at a new verdict: ``"warn"`` (a warning of the logger ``lightning_collapse``, on ``stderr``
            unless ``logging`` is told otherwise), ``"log"`` (as text and data to every logger that takes them),
            ``"checkpoint"`` (save one into ``dirpath``), ``"stop"`` (the fit), a ``Rollback``, a ``SkipStep``, a
            ``SwitchOn``, a callable that is given the trainer, the module and the ``Verdict``, an ``Action`` of your
            own, or a list of these, done in order. One that raises an exception is left out from then on, with one
            warning.
        patience: Points in a row it takes, where a rule does not know better.
        calibration: How many first points make the baseline that later ones are compared with, likewise.
        dirpath: Where ``"checkpoint"`` and a rollback save; a folder ``guard`` beside the run's logs by default.
        rules: Kinds to judge, a list out of ``activation_outliers``, ``attention_entropy_collapse``,
            ``attention_logit_growth``, ``attention_logit_limit``, ``attention_overload``, ``catastrophic_forgetting``,
            ``codebook_collapse``, ``complete_collapse``, ``dimensional_collapse``, ``divergence_ahead``, ``headroom``,
            ``layer_collapse``, ``log_partition_growth``, ``loss_explosion``, ``loss_spike``, ``minority_collapse``,
            ``neural_collapse_reached``, ``non_finite``, ``non_finite_origin``, ``non_finite_step``, ``outcome_drop``,
            ``output_entropy_collapse``, ``partial_collapse``, ``plasticity_loss``, ``point_collapse``,
            ``posterior_collapse``, ``prediction_collapse``, ``prototype_collapse``, ``regression_over_compression``,
            ``router_collapse``, ``skipped_steps``, ``state_collapse``, ``token_collapse`` and your own; ``None`` for
            all that monitors draw the curves of.
        task: What the network is trained for; ``None`` to infer it.
        outcome: Name of the logged metric that counts in the end, such as ``"val_acc"``; ``None`` to watch none.
        mode: ``"max"`` if a higher ``outcome`` is better, ``"min"`` if a lower one is.

    Attributes:
        judge: The :class:`~lightning_collapse.rules.Judge` that it hands all points to.
        verdicts: Every :class:`~lightning_collapse.rules.Verdict` so far, in order.
        notices: What rules found that is no failure, as verdicts; each layer's once.

    Raises:
        ValueError: On an unknown action, kind, task or mode, on ``outcome`` without ``mode`` or the other way round, or
            a rule about an outcome without one, on two actions that exclude each other, on a rule that is not
            about the task, or a number that is not positive; as ``MisconfigurationException`` when the fit starts
            without a monitor that draws the curves of any rule, or of one that was asked for.

    Example::

        trainer = Trainer(callbacks=[CollapseMonitor(), CollapseGuard(action=["warn", "stop"])])
    """

    def __init__(
        self,
        action: Sequence[ActionLike] | ActionLike = ("warn", "log"),  # in this order: the first that fits saves a list
        patience: int = 2,
        calibration: int = 3,
        dirpath: str | None = None,
        rules: Sequence[str] | None = None,
        task: TaskName | None = None,
        outcome: str | None = None,
        mode: Mode | None = None,
    ) -> None:
        for name, number in (("patience", patience), ("calibration", calibration)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        check_rules(rules, task)
        self.action = action
        self.patience = patience
        self.calibration = calibration
        self.dirpath = dirpath
        self.rules = rules
        self.outcome = outcome
        self.mode = mode
        self.task = Task(task or "")
        self._requested = task
        self.judge = Judge(rules, patience, calibration)
        self._actions = make_actions(action, list(self._rules))
        self._fresh = deepcopy(states_of(self._actions))
        self._outcome = make_outcome(outcome, mode, rules)
        self._health = TrainingHealth()
        self._containment = Containment(type(self).__name__)
        self._reader: LossReader | None = None
        self._loaded = self._given = False

    @property
    def verdicts(self) -> list[Verdict]:
        """Every verdict so far, in order."""
        return self.judge.verdicts

    @property
    def notices(self) -> list[Verdict]:
        """What was found that is no failure; each layer's once."""
        return self.judge.notices

    @property
    def _rules(self) -> dict[str, Rule]:
        return self.judge.rules_for(self.task)

    @override
    def state_dict(self) -> dict[str, Any]:
        outcome = {} if self._outcome is None else self._outcome.state_dict()
        return {"judge": self.judge.state_dict(), "actions": states_of(self._actions), "outcome": outcome}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "judge" not in state_dict:
            rank_zero_warn("`CollapseGuard`: the checkpoint is of version 0.1.0; what it knew of the run is dropped.")
            return
        self._loaded = True
        self.judge.load_state_dict(state_dict["judge"])
        load_states(self._actions, state_dict["actions"])
        if self._outcome is not None and state_dict.get("outcome"):
            self._outcome.load_state_dict(state_dict["outcome"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._given = self._loaded  # by the user and not by a tuner, which loads states between this and the start

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        goes_on = self._given or is_resumed(trainer)
        if self._outcome is not None:
            self._outcome.start(goes_on)
        if not goes_on:
            # of several tasks, each a fit, the later ones are compared with the baseline of the first
            if not any(isinstance(callback, TaskAware) and callback.task_index for callback in trainer.callbacks):
                self.judge.reset()
            load_states(self._actions, deepcopy(self._fresh))
        self._loaded = self._given = False
        self._containment = Containment(type(self).__name__)
        self._reader = reader_of(pl_module, self._containment)
        self._health = TrainingHealth()
        self.task = Task(self._requested or "")
        # a task that is inferred later may arm rules of its own
        rules = RULES if self.rules is None and self._requested is None else self._rules
        require_available(rules, trainer.callbacks, requested=self.rules is not None)
        for action in self._actions:
            action.attach(trainer, pl_module, self.dirpath)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._reader is not None:
            with self._containment("listening to the loss", "the task stays unknown", self._reader.remove):
                self._reader.before_batch(batch)

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        try:  # at every step, where a context costs as much as what is inside
            self._health.note_loss(loss)
        except Exception as error:
            self._containment.catch("adding up the loss", "rules do not know how it goes", error)
        if self._reader is not None:
            self._reader.before_backward(loss)
            self._infer_task(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._reader is not None:
            self._reader.after_batch()
            self._infer_task(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # what the module itself has logged when the last epoch ended came after the callbacks
        self._read_outcome(trainer, pl_module, "late")
        self._warn_if_missing(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_outcome(trainer, pl_module, "epoch")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_outcome(trainer, pl_module, "late")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._outcome is not None and _is_in_fit(trainer):
            self._warn_if_missing(trainer)
            with self._containment(_READING, _MISSED):
                self._outcome.before_validation(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_outcome(trainer, pl_module, "validation")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        self._warn_if_missing(trainer, at_last=True)
        outcome = "" if self._outcome is None else f"; {self._outcome.outcome.in_words()}"
        rank_zero_info(f"`CollapseGuard`: {self.judge.coverage.in_words(self.verdicts)}{outcome}.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach(trainer)  # `teardown` is not called when the trainer fails

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach(trainer)

    def on_points(self, trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> None:
        """Judge the points of one step; called on every process with the same points."""
        if points[0].family == "guard":
            return  # its own
        health: list[Point] = []
        if points[0].family != OUTCOME:
            if trainer.training:  # else validation, whose own metrics come next
                self._read_outcome(trainer, pl_module, "step")
            with self._containment("asking whether training is finite", "every row that is not counts as a failure"):
                health = self._health.points(trainer, pl_module, points)
        self.judge.planned = self.judge.planned or planned_points(trainer) or None
        judgement = self._with_outcome(self.judge.update([*points, *health], self.task))
        if not judgement.judged:
            return
        self._say(judgement)
        counts = [Point("guard", "", kind, judgement.step, float(count)) for kind, count in judgement.counts.items()]
        publish(trainer, pl_module, counts)
        for action in self._actions:
            self._run(action, lambda action: action.on_points(trainer, pl_module, judgement))
        for action in self._actions if judgement.new else ():
            if self._run(action, lambda action: action.on_verdict(trainer, pl_module, judgement)):
                self._restart(trainer, pl_module)

    def _restart(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training was turned back: what fails next is new."""
        self.judge.restart()
        if self._outcome is not None:
            self._outcome.outcome.restart()
        for callback in trainer.callbacks:
            if isinstance(callback, FollowsReturns):
                with self._containment(f"telling `{type(callback).__name__}` of a return", "it goes on as it did"):
                    callback.on_turned_back(trainer, pl_module)

    def _read_outcome(self, trainer: Trainer, pl_module: LightningModule, source: Source) -> None:
        """Publish the outcome, of which :meth:`on_points` hears then, if it was logged since. Collective."""
        if self._outcome is None or not _is_in_fit(trainer):
            return
        points: list[Point] = []
        with self._containment(_READING, _MISSED):
            points = self._outcome.read(trainer, pl_module, source)
        publish(trainer, pl_module, points)

    def _warn_if_missing(self, trainer: Trainer, at_last: bool = False) -> None:
        if self._outcome is not None and not trainer.fast_dev_run:
            with self._containment("looking for the outcome", "nothing is said if it is missing"):
                self._outcome.warn_if_missing(trainer, at_last)

    def _with_outcome(self, judgement: Judgement) -> Judgement:
        """The judgement whose new verdicts, those that the judge keeps too, say whether the outcome has moved."""
        if self._outcome is None or not judgement.new:
            return judgement
        words = self._outcome.outcome.in_words()
        new = [v if v.kind == OutcomeDrop.kind else replace(v, outcome=words) for v in judgement.new]
        self.verdicts[-len(new) :] = new
        return replace(judgement, new=tuple(new))

    def _infer_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._reader is None or self._reader.waits:
            return
        use, self._reader = self._reader.use, None
        with self._containment("inferring the task", "the task stays unknown"):
            self.task = infer_task(trainer, pl_module, use, self._requested)
        if not self._requested:
            self._say_task()

    def _say_task(self) -> None:
        outputs = ", ".join(f"`{layer}`" for layer in sorted(self.task.outputs))
        said = f" How the outputs of {outputs} lie is up to the targets, and not judged." if outputs else ""
        told = f"`task=`: {', '.join(TASKS)}."
        if self.task.name:
            taken = f"takes this for {self.task}, from {self.task.why}. Say otherwise with {told}{said}"
        else:
            taken = f"does not know the task: {self.task.why}.{said or ' Every layer is judged.'} Say it with {told}"
        rank_zero_info(f"`CollapseGuard` {taken}")

    @staticmethod
    def _say(judgement: Judgement) -> None:
        """What is over, and what is no failure."""
        for kind, layer in judgement.recovered:
            rank_zero_info(f"`CollapseGuard`: {kind.replace('_', ' ')} in `{layer}` is over at step {judgement.step}.")
        for notice in judgement.notices:
            rank_zero_info(f"`CollapseGuard` at step {judgement.step}: {notice}")

    def _run(self, action: Action, call: Callable[[Action], bool | None]) -> bool:
        """Let an action do something, unless it has failed before."""
        place, done = f"action `{action_name(action)}`", False
        if place not in self._containment.failed:
            with self._containment(place, "it is left out from now on", action.detach):
                done = bool(call(action))
        return done

    def _detach(self, trainer: Trainer) -> None:
        if self._reader is not None:
            self._reader.remove()
            self._reader = None
        for action in self._actions:
            with self._containment(f"the end of action `{action_name(action)}`", "it may leave something behind"):
                action.detach()
        try_again(trainer)


_READING, _MISSED = "reading the outcome", "points of it may be missing"


def _is_in_fit(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking
