"""Continual-learning metrics: accuracy on every task after every task, transfer and forgetting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite, nan
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_collapse.callbacks.continual.monitored_curves import require_available
from lightning_collapse.callbacks.continual.step_offset import StepsAcrossTasks
from lightning_collapse.callbacks.continual.task_pictures import GapHistory, log_matrix, markdown
from lightning_collapse.callbacks.continual.task_scores import Evaluation, Outputs, Score, TaskScores, correct
from lightning_collapse.callbacks.evaluation.evaluation_pass import check_forward
from lightning_collapse.functional.continual import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from lightning_collapse.functional.stability_gap import min_accuracy, worst_case_accuracy
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.told_once import kind_of
from lightning_collapse.utilities.trainer import is_due

GAP_MEASURES = ("min_accuracy", "worst_case_accuracy")
MEASURES = ("accuracy", "learning_accuracy", "backward_transfer", "forward_transfer", "forgetting", *GAP_MEASURES)
MOST_CLASSES = 1000


class ContinualMetrics(StepsAcrossTasks):
    """Measure every task after every task: accuracy, transfer, forgetting and, in between, the stability gap.

    **Logged metrics**, to every logger and to ``trainer.callback_metrics``, when a task ends:

    - ``continual/{task}/accuracy`` of every task that was evaluated; ``n`` of the point is the number of samples, its
      null the same before the first step, if that is known;
    - ``continual/accuracy``, ``continual/learning_accuracy``, ``continual/backward_transfer`` and
      ``continual/forgetting``, and ``continual/forward_transfer`` if it is asked for; NaN where not defined yet;
    - a picture ``continual/accuracies``, one row per task learned, and a table of the same name as text; the same of
      classes, ``continual/class_accuracies``, with ``num_classes``;
    - with ``every_n_steps``, then and while later tasks are learned: ``continual/min_accuracy`` and
      ``continual/worst_case_accuracy``, the curves of all tasks so far, and when a task ends a picture of them,
      ``continual/stability_gap``, with the worst reading of each task and its step.

    With another ``metric`` all of these are of that one, under the same names. Where less is better, ``mode="min"``,
    transfer and forgetting are of its negative: forgetting is positive, and backward transfer negative, if earlier
    tasks have become worse, whatever the metric; the lowest accuracy is the highest loss.

    The x-axis goes on from task to task, although a new ``Trainer`` counts its steps from 0. Every submodule is in eval
    mode meanwhile, without gradient; flags, buffers, random states and the generators of loaders are put back. Scores
    are summed over processes, which may hold unequal shares of the data; every one reads what its own loaders give. A
    loader that fails is a warning and leaves NaN. Reuse one object for all tasks, see :class:`~TaskAware`.

    Args:
        loaders: For every task a loader, or a function that returns one, in the order in which they are learned; as a
            mapping they bring the names of tasks, else these are ``task0``, ``task1`` and so on.
        every_n_steps: Optimizer steps between two evaluations while later tasks are learned; ``None`` for none. The
            paper takes 1, on small loaders.
        outputs: How the model is called on a batch, a function of the module and the batch;
            ``utilities.targets.call_on`` by default.
        labels: Labels of a batch; ``utilities.targets.targets_of`` by default.
        metric: A function of outputs and labels that returns one score per sample, NaN for a sample that does not
            count; by default 1 for the correct class and 0 for others. Or a ``torchmetrics.Metric`` of one number,
            which is updated with outputs and labels; every task gets a copy.
        forward_transfer: Whether to evaluate tasks to come, too, and all of them before the first step: the model is
            taken for one of random initialization then.
        mode: Whether more (``"max"``) or less (``"min"``, of a loss or a perplexity) is better; ``None`` goes by
            ``higher_is_better`` of a ``torchmetrics.Metric``, and is ``"max"`` otherwise.
        num_classes: How many classes to tell apart, at most 1000, of scores per sample.

    Attributes:
        names: Names of the tasks.

    Raises:
        ValueError: If there is no loader, an argument is of the wrong kind, or a task has no name, that of another one
            or that of a curve such as ``accuracy``.
        MisconfigurationException: When the fit starts, if the module has no ``forward`` and ``outputs`` is not given,
            or if an ``EarlyStopping`` or ``ModelCheckpoint`` waits for a curve that begins when the task ends.

    References:
        See :func:`~lightning_collapse.functional.backward_transfer`, :func:`~lightning_collapse.functional.forgetting`
        and :func:`~lightning_collapse.functional.worst_case_accuracy`.

    Example::

        metrics = ContinualMetrics([test_loader_of_task_0, test_loader_of_task_1])
        for task in tasks:
            Trainer(callbacks=[metrics]).fit(model, task)
        print(metrics.table())
    """

    family = "continual"

    def __init__(
        self,
        loaders: Sequence[Loader] | Mapping[str, Loader],
        every_n_steps: int | None = None,
        *,
        outputs: Outputs | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        metric: Score | Metric = correct,
        forward_transfer: bool = True,
        mode: Literal["max", "min"] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.names, self.loaders = _named(loaders)
        if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise ValueError(f"`every_n_steps` must be a whole number of at least 1, or None, got {every_n_steps!r}.")
        for name, function in (("outputs", outputs), ("labels", labels), ("metric", metric)):
            if function is not None and not callable(function):
                raise ValueError(f"`{name}` must be a function, got {function!r}.")
        if mode not in (None, "max", "min"):
            raise ValueError(f"`mode` must be 'max', 'min' or None, got {mode!r}.")
        _check_classes(num_classes, metric)
        self.every_n_steps = every_n_steps
        self.outputs, self.labels, self.metric = outputs, labels, metric
        self.forward_transfer, self.num_classes = forward_transfer, num_classes
        self.mode = mode or ("min" if getattr(metric, "higher_is_better", None) is False else "max")
        self._sign = 1 if self.mode == "max" else -1
        self._values = torch.full((len(self.names), len(self.names)), nan)
        self._baseline = torch.full((len(self.names),), nan)
        self._lowest = torch.full((len(self.names),), nan)  # worst, since the end of each task
        self._classes = torch.full((len(self.names), num_classes or 0), nan)
        self._gap = GapHistory(len(self.names), self._sign)
        self._warned: set[str] = set()

    @property
    def values(self) -> Tensor:
        """Score on task ``j`` after learning task ``i``, shape ``(T, T)``, on the host; NaN where unknown."""
        return self._values.clone()

    @property
    def baseline(self) -> Tensor:
        """Score on every task before the first step, shape ``(T,)``, on the host; NaN where unknown."""
        return self._baseline.clone()

    def table(self) -> str:
        """Markdown: a row per task learned, after one for the start, and a column per task."""
        return markdown(["before", *self.names], self.names, torch.cat([self._baseline.unsqueeze(0), self._values]))

    @property
    def class_values(self) -> Tensor:
        """Score on class ``c`` after learning task ``i``, shape ``(T, C)``, on the host; NaN where unknown."""
        return self._classes.clone()

    def class_table(self) -> str:
        """Markdown: a row per task learned, and a column per class."""
        return markdown(self.names, [str(label) for label in range(self._classes.shape[1])], self._classes)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        check_forward(pl_module, self.outputs, "`ContinualMetrics`", "outputs")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._announce(trainer)
        if self.forward_transfer and self.task_index == 0 and trainer.global_step == 0:
            with self.containment("the evaluation before the first step", "forward transfer stays unknown"):
                baseline = self._evaluate(trainer, pl_module, range(len(self.names))).values
                self._baseline = self._baseline if trainer.fast_dev_run else baseline

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.every_n_steps and 0 < self.task_index < len(self.names) and is_due(trainer, self.every_n_steps):
            with self.containment("an evaluation while a task is learned", "its points are missing"):
                seen = range(self.task_index + 1)
                found = self._evaluate(trainer, pl_module, seen)
                points = self._points_of_tasks(trainer, seen, found.values, found.counts)
                publish(trainer, pl_module, points + self._points_of_gap(trainer, found.values))
                self._remember(trainer, found.values, self.task_index)

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tasks = len(self.names)
        if self.task_index >= tasks:
            self._warn_once(f"task {self.task_index} has ended, and `loaders` has {tasks}: it is not measured.")
            return
        evaluated = range(tasks if self.forward_transfer else self.task_index + 1)
        found = self._evaluate(trainer, pl_module, evaluated)
        self._values[self.task_index], self._classes[self.task_index] = found.values, found.classes
        learned = self._values[: self.task_index + 1]
        signed = self._sign * learned  # more is better
        readings = {
            "accuracy": average_accuracy(learned),
            "learning_accuracy": learning_accuracy(learned),
            "backward_transfer": backward_transfer(signed),
            "forgetting": forgetting(signed),
        }
        if self.forward_transfer:
            readings["forward_transfer"] = forward_transfer(signed, self._sign * self._baseline)
        step = self._steps.step(trainer)
        points = self._points_of_tasks(trainer, evaluated, learned[-1], found.counts)
        points += [Point("continual", "", name, step, value.item()) for name, value in readings.items()]
        if self.every_n_steps:
            points += self._points_of_gap(trainer, learned[-1])
            self._remember(trainer, learned[-1], self.task_index + 1)
        publish(trainer, pl_module, points)
        with self.containment("the picture of accuracies"):
            self._draw(trainer, step)

    @override
    def state_dict(self) -> dict[str, Any]:
        tensors = {"values": self._values, "baseline": self._baseline, "lowest": self._lowest}
        tensors["classes"] = self._classes
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        histories = {"gap": self._gap.state_dict()}
        return {**super().state_dict(), **copies, **histories, "names": list(self.names)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict["names"] != self.names[: len(state_dict["names"])]:
            self._warn_once(
                f"a checkpoint of the tasks {', '.join(state_dict['names'])} is read by one of"
                f" {', '.join(self.names)}; its numbers are left out. Add loaders at the end only."
            )
            return
        old = len(state_dict["names"])
        self._values[:old, :old] = state_dict["values"]
        self._baseline[:old], self._lowest[:old] = state_dict["baseline"], state_dict["lowest"]
        if "gap" in state_dict:  # version 0.1.0 has none
            self._gap.load_state_dict(state_dict["gap"])
            both = min(state_dict["classes"].shape[1], self._classes.shape[1])
            self._classes[:old, :both] = state_dict["classes"][:, :both]

    def _remember(self, trainer: Trainer, values: Tensor, learned: int) -> None:
        """Scores of tasks that were learned, for the picture; that of the running one rises, and is no dip."""
        kept = torch.full_like(values, nan)
        kept[:learned] = values[:learned]
        self._gap.add(self._steps.step(trainer), kept)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, tasks: Iterable[int]) -> Evaluation:
        """Scores of tasks; what has failed is a warning. Collective."""
        scores = TaskScores(self.loaders, self.metric, self.outputs, self.labels, self.num_classes or 0)
        found = scores(trainer, pl_module, tasks)
        for task, problem in found.problems.items():
            self._warn_once(f"the evaluation of `{self.names[task]}` failed and reads NaN: {problem}.")
        if self.num_classes and found.strangers:
            self._warn_once(
                f"{found.strangers} samples have labels that are none of `num_classes={self.num_classes}` classes, and"
                " are left out of the table of classes."
            )
        return found

    def _points_of_tasks(
        self, trainer: Trainer, tasks: Iterable[int], values: Tensor, counts: Sequence[int]
    ) -> list[Point]:
        step, numbers, untrained = self._steps.step(trainer), values.tolist(), self._baseline.tolist()
        return [
            Point(
                "continual",
                self.names[task],
                "accuracy",
                step,
                numbers[task],
                counts[task],
                null=untrained[task],
                flag=Flag.OK if counts[task] else Flag.NOT_CALLED,
            )
            for task in tasks
        ]

    def _points_of_gap(self, trainer: Trainer, values: Tensor) -> list[Point]:
        """Lowest readings, this one included."""
        if self.task_index == 0:
            return []
        signed = self._sign * values
        earlier, now = self._lowest[: self.task_index], values[: self.task_index]
        self._lowest[: self.task_index] = self._sign * torch.fmin(self._sign * earlier, self._sign * now)
        lowest, step = self._lowest[: self.task_index].unsqueeze(1), self._steps.step(trainer)
        readings = {
            "min_accuracy": self._sign * min_accuracy(self._sign * lowest),
            "worst_case_accuracy": self._sign * worst_case_accuracy(signed[self.task_index], self._sign * lowest),
        }
        return [Point("continual", "", name, step, value.item()) for name, value in readings.items()]

    def _draw(self, trainer: Trainer, step: int) -> None:
        """Draw what lies on the host, when a task has ended."""
        ends = (0.0, 1.0) if self.metric is correct else (None, None)
        rows, what = [f"after {name}" for name in self.names], "accuracy" if self.metric is correct else "score"
        if self._sign < 0:
            what += " (less is better)"
        title = f"{what} of every task, by what was learned before"
        log_matrix(trainer, "continual/accuracies", rows, self.names, self._values, title, step, ends, self.table())
        classes = [str(label) for label in range(self._classes.shape[1])]
        title, table = f"{what} of every class, by what was learned before", self.class_table()
        log_matrix(trainer, "continual/class_accuracies", rows, classes, self._classes, title, step, ends, table)
        names, steps = self._gap.marked(self.names), [str(at) for at in self._gap.steps]
        title = f"{what} since each task was learned, with the worst and its step"
        log_matrix(trainer, "continual/stability_gap", names, steps, self._gap.values.T, title, step, ends)

    def _announce(self, trainer: Trainer) -> None:
        """Give curves that go on what they read last, and refuse to have others waited for."""
        if self.every_n_steps and 0 < self.task_index <= len(self.names):
            latest = self._values[self.task_index - 1, : self.task_index]
            points = self._points_of_tasks(trainer, range(self.task_index), latest, [1] * self.task_index)
            trainer.callback_metrics.update({p.key: torch.tensor(p.value) for p in points if isfinite(p.value)})
        late = [Point("continual", name, "accuracy", 0, nan).key for name in self.names]
        late += [f"continual/{measure}" for measure in MEASURES]
        if self.every_n_steps and self.task_index:
            late = [curve for curve in late if curve not in (f"continual/{measure}" for measure in GAP_MEASURES)]
        require_available(trainer, late, "a task ends, and so does the fit", type(self).__name__)

    def _warn_once(self, message: str) -> None:
        if (kind := kind_of(message)) not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(f"`ContinualMetrics`: {message}")


def _named(loaders: Sequence[Loader] | Mapping[str, Loader]) -> tuple[list[str], list[Loader]]:
    if isinstance(loaders, str) or not isinstance(loaders, Sequence | Mapping):
        raise ValueError(f"`loaders` takes a list of loaders, one per task, or a mapping by name, got {loaders!r}.")
    if not loaders:
        raise ValueError("`loaders` is empty. Pass one loader per task.")
    named = loaders if isinstance(loaders, Mapping) else {f"task{i}": loader for i, loader in enumerate(loaders)}
    for name, loader in named.items():
        if isinstance(loader, str) or not (isinstance(loader, Iterable) or callable(loader)):
            raise ValueError(
                f"`loaders` takes iterables of batches, or functions that return one, got {loader!r} for {name!r}."
            )
    names = [str(name) for name in named]
    if len(set(names)) < len(names):
        raise ValueError(f"`loaders` has two tasks of one name: {', '.join(map(repr, named))}.")
    if taken := [name for name in names if name in (*MEASURES, "accuracies") or not name.strip(". ")]:
        raise ValueError(
            f"`loaders` has a task called {taken[0]!r}, which is no name, or that of a curve. Take another."
        )
    return names, list(named.values())


def _check_classes(num_classes: int | None, metric: Score | Metric) -> None:
    if num_classes is None:
        return
    require_whole(1, num_classes=num_classes)
    if num_classes > MOST_CLASSES:
        raise ValueError(f"`num_classes` must be at most {MOST_CLASSES}, the columns of a picture, got {num_classes}.")
    if isinstance(metric, Metric):
        raise ValueError(
            "`num_classes` tells scores of samples apart, and `metric` is of all. Pass a function instead."
        )


def _register() -> None:
    gem, matrix = "Lopez-Paz & Ranzato, NeurIPS 2017, arXiv 1706.08840", "accuracies after every task"
    mer = "Riemer et al., ICLR 2019, arXiv 1810.11910"
    gap = "De Lange et al., ICLR 2023, arXiv 2205.13452"
    for name, reads, span, collapsed, source in (
        ("accuracy", matrix, "0 to 1", "near chance", gem),
        ("learning_accuracy", matrix, "0 to 1", "falling: plasticity is lost", mer),
        ("backward_transfer", matrix, "-1 to 1", "far below 0: forgetting", gem),
        ("forward_transfer", matrix, "-1 to 1", "below 0", gem),
        ("forgetting", matrix, "-1 to 1", "near 1", "Chaudhry et al., ECCV 2018, arXiv 1801.10112"),
        ("min_accuracy", "accuracies at a cadence", "0 to 1", "near 0, far below accuracy", gap),
        ("worst_case_accuracy", "accuracies at a cadence", "0 to 1", "near 0, far below accuracy", gap),
    ):
        register_curve("continual", name, reads=reads, range=span, collapsed=collapsed, source=source)


_register()
