"""Pictures and tables of a sequence of tasks: accuracies after every task, of every class, and in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_collapse.reporting import labelled_heat_map, log_image, log_text

MOST = 128
"""Columns of a history, even: when it is full neighbours are merged, and the worse number of each task is kept."""


def markdown(rows: Sequence[str], columns: Sequence[str], values: Tensor) -> str:
    """A table without its empty rows."""
    lines = [["after", *columns], ["---"] * (len(columns) + 1)]
    for name, row in zip(rows, values, strict=True):
        if not row.isnan().all():
            lines.append([name, *("" if value.isnan() else f"{value:.3f}" for value in row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def log_matrix(
    trainer: Trainer,
    name: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Tensor,
    title: str,
    step: int,
    ends: tuple[float | None, float | None] = (None, None),
    table: str | None = None,
) -> None:
    """A table to every logger, as a picture and, if there is one, as text; nothing where it has no number."""
    if values.isnan().all():
        return
    for logger in trainer.loggers:
        log_image(logger, name, labelled_heat_map(values.numpy(), rows, columns, title, "task", *ends), step)
        if table is not None:
            log_text(logger, name, table, step)


class GapHistory:
    """Scores of all tasks over the steps, in bounded memory: no dip is lost, however long the run.

    Args:
        tasks: How many there are.
        sign: 1 where more is better, -1 where less is.

    Attributes:
        steps: Of columns of the picture; each stands for as many evaluations, the last for fewer.
        values: Worst score of every column and task, ``(n, T)``; NaN where a task was not evaluated.
    """

    def __init__(self, tasks: int, sign: int) -> None:
        self.sign = sign
        self.steps: list[int] = []
        self.values = torch.empty(0, tasks)
        self._stride, self._filled = 1, 1  # evaluations in a column, and in the last one
        self._worst, self._at = torch.full((tasks,), torch.nan), [0] * tasks

    def add(self, step: int, values: Tensor) -> None:
        """Take an evaluation in, ``(T,)``, NaN where a task was not evaluated."""
        for task in (self._worse(values, self._worst) != self._worst).nonzero().flatten().tolist():
            if not values[task].isnan():
                self._worst[task], self._at[task] = values[task], step
        if self.steps and self._filled < self._stride:
            self.steps[-1], self.values[-1] = step, self._worse(values, self.values[-1])
            self._filled += 1
            return
        if len(self.steps) == MOST:
            self.steps, self.values = self.steps[1::2], self._worse(self.values[::2], self.values[1::2])
            self._stride *= 2
        self.steps.append(step)
        self.values = torch.cat([self.values, values.unsqueeze(0)])
        self._filled = 1

    def marked(self, names: Sequence[str]) -> list[str]:
        """Names of tasks, each with its worst score since it was learned, and the step of it."""
        found = zip(names, self._worst.tolist(), self._at, strict=True)
        return [name if isnan(value) else f"{name}: {value:.3g} at {step}" for name, value, step in found]

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists."""
        numbers = {"steps": list(self.steps), "at": list(self._at), "stride": self._stride, "filled": self._filled}
        return {**numbers, "values": self.values.clone(), "worst": self._worst.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state of as many tasks, or of the first of them."""
        old = len(state_dict["at"])
        self.steps, self._stride, self._filled = (state_dict[key] for key in ("steps", "stride", "filled"))
        self.steps = list(self.steps)
        self.values = torch.full((len(self.steps), self.values.shape[1]), torch.nan)
        self.values[:, :old], self._worst[:old], self._at[:old] = (state_dict[key] for key in ("values", "worst", "at"))

    def _worse(self, one: Tensor, other: Tensor) -> Tensor:
        return self.sign * torch.fmin(self.sign * one, self.sign * other)
