"""Task scores: how well a module does on the loaders of several tasks, and on every class."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_collapse.callbacks.evaluation.preserved_fit import batches_on_device, preserved_fit
from lightning_collapse.utilities.distributed import all_reduce_sum, max_over_processes
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.targets import call_on, targets_of

Outputs = Callable[[Any, Any], Tensor]
Score = Callable[[Tensor, Tensor], Tensor]


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest output of each sample is at its label: 1 or 0, NaN where the label is negative.

    Args:
        outputs: Logits ``(N, C, ...)``.
        labels: Whole numbers ``(N, ...)``.

    Returns:
        The shape of ``labels``.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> correct(torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1, -100]))
        tensor([1., 0., nan])
    """
    if outputs.ndim < 2 or labels.shape != outputs.shape[:1] + outputs.shape[2:]:
        raise ValueError(
            f"accuracy needs logits (N, C, ...) and labels (N, ...), got {tuple(outputs.shape)} and"
            f" {tuple(labels.shape)}; give another `metric`"
        )
    return torch.where(labels < 0, torch.nan, (outputs.argmax(dim=1) == labels).float())


class Evaluation(NamedTuple):
    """What an evaluation brought, on the host, the same on every process.

    Attributes:
        values: Of every task, ``(T,)``; NaN for those not asked for, and those that failed.
        counts: Numbers of samples.
        classes: Mean score of every class over the tasks that were asked for, ``(C,)``.
        strangers: How many samples had a label beyond the classes.
        problems: What failed, by task.
    """

    values: Tensor
    counts: list[int]
    classes: Tensor
    strangers: int
    problems: dict[int, str]


class TaskScores:
    """Evaluates loaders in eval mode, without gradient, so that the fit does not notice.

    Args:
        loaders: One per task.
        metric: A score per sample, or a ``torchmetrics.Metric`` that is updated with outputs and labels.
        outputs: How the module is called on a batch.
        labels: Labels of a batch.
        num_classes: How many classes are told apart, of scores per sample.
    """

    def __init__(
        self,
        loaders: Sequence[Loader],
        metric: Score | Metric,
        outputs: Outputs | None,
        labels: Callable[[Any], Tensor] | None,
        num_classes: int = 0,
    ) -> None:
        self.loaders, self.metric, self.num_classes = loaders, metric, num_classes
        self.outputs, self.labels = outputs or call_on, labels or targets_of

    def __call__(self, trainer: Trainer, pl_module: LightningModule, tasks: Iterable[int]) -> Evaluation:
        """Evaluate some tasks. Collective."""
        wide = torch.float32 if pl_module.device.type == "mps" else torch.float64
        number = len(self.loaders)
        # a row for every task, for every class, and for labels beyond them: scores and how many there are
        sums = torch.zeros(number + self.num_classes + 1, 2, dtype=wide, device=pl_module.device)
        problems = {}
        with preserved_fit(trainer, pl_module):
            for task in tasks:
                problem = self._add_up(trainer, pl_module, task, sums)
                if problem is not None:
                    problems[task], sums[task] = problem, torch.nan
        # the one transfer of an evaluation; whatever is read from scores afterwards is on the host
        total, count = all_reduce_sum(sums).to("cpu", torch.float64).unbind(dim=1)
        means, counts = (total / count).float(), [int(n) for n in count.nan_to_num(0)]
        return Evaluation(means[:number], counts[:number], means[number:-1], counts[-1], problems)

    def _add_up(self, trainer: Trainer, pl_module: LightningModule, task: int, sums: Tensor) -> str | None:
        """Add scores to the rows of a task and of classes; returns what went wrong on any process. Collective."""
        problem, samples = "", 0
        metric = self.metric.clone().to(pl_module.device) if isinstance(self.metric, Metric) else None
        if metric is not None:
            metric.reset()
        try:
            for batch, counts in batches_on_device(self.loaders[task], trainer, pl_module):
                labels = self.labels(batch)
                with trainer.precision_plugin.forward_context():
                    outputs = self.outputs(pl_module, batch)
                if labels is None:
                    raise ValueError("a batch has no labels where they are looked for; say where with `labels`")
                if metric is not None and counts:
                    metric.update(outputs, labels)
                    samples += len(labels)
                elif metric is None:
                    self._score(sums, task, outputs, labels, counts)
        except Exception as error:  # of the user's loader or model: what is only watched goes on
            problem = f"{type(error).__name__}: {error}"
        [failed] = max_over_processes([bool(problem)], sums.device)
        if metric is not None and not failed:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # a process may have had no batch of its own
                    value = torch.as_tensor(metric.compute()).to(sums)
                # of all processes already: each weighs it by its share
                sums[task] += torch.stack([value.reshape(()) * samples, value.new_tensor(samples)])
            except Exception as error:
                failed, problem = True, f"{type(error).__name__}: {error}"
        return (problem or "in another process") if failed else None

    def _score(self, sums: Tensor, task: int, outputs: Tensor, labels: Tensor, counts: bool) -> None:
        scores = self.metric(outputs, labels).to(sums)
        if not scores.ndim:
            raise ValueError("`metric` returned one number for a batch; return one per sample")
        if not counts:
            return
        known = ~scores.isnan()
        pairs = torch.stack([scores.nan_to_num(0.0), known.to(sums)], dim=-1)
        sums[task] += pairs.flatten(0, -2).sum(dim=0)
        if self.num_classes and scores.shape == labels.shape:
            inside = known & (labels >= 0) & (labels < self.num_classes)
            row = torch.where(inside, labels, self.num_classes).long() + len(self.loaders)
            sums.index_add_(0, row.flatten(), pairs.flatten(0, -2))
