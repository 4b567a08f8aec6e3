"""Runs of specimens: all that a guard and its opponents may read, recorded once."""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_collapse import CollapseGuard, fit_tasks
from lightning_collapse.rules import Judge, Judgement, Task, Verdict
from lightning_collapse.utilities.points import Point

from .specimen import Habitat, Specimen

UNKNOWN = Task()


@dataclass
class Plain(Callback):
    """What one would look at without this library; steps go on from task to task."""

    habitat: Habitat
    loss: list[float] = field(default_factory=list)
    gradient: list[float] = field(default_factory=list)
    std: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.habitat.embedding.register_forward_hook(self._hear)
        self._embedding = torch.zeros(2, 1)

    def _hear(self, module: nn.Module, args: Any, output: Any) -> None:
        # a recurrent layer returns its state beside
        self._embedding = (output[0] if isinstance(output, tuple) else output).detach()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The gradient's norm."""
        norms = [torch.linalg.vector_norm(p.grad.float()) for p in pl_module.parameters() if p.grad is not None]
        self.gradient.append(float(torch.linalg.vector_norm(torch.stack(norms))))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The loss; at the cadence of the monitors also the spread of the embedding."""
        self.loss.append(float(outputs["loss"]))
        step = len(self.loss)
        if step % self.habitat.every == 0:
            self.std[step] = normalized_std(self._embedding)


@dataclass
class Score(Callback):
    """The held-out score; a forward pass that no monitor may take for training, so this comes behind all of them."""

    plain: Plain
    held_out: dict[int, float] = field(default_factory=dict)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The score, at the cadence of the monitors."""
        step = len(self.plain.loss)
        if step % self.plain.habitat.every == 0:
            training = [module.training for module in pl_module.modules()]
            pl_module.eval()
            with torch.no_grad():
                self.held_out[step] = self.plain.habitat.held_out()
            for module, flag in zip(pl_module.modules(), training, strict=True):
                module.training = flag


def normalized_std(rows: Tensor) -> float:
    """Mean standard deviation of rows of unit length, times the root of their width: 1 where they fill the sphere.

    Of maps ``(N, C, H, W)`` a row is the mean over places.
    """
    if rows.ndim == 4:
        rows = rows.mean(dim=(2, 3))
    units = nn.functional.normalize(rows.flatten(0, -2).double(), dim=-1)
    return float(units.std(dim=0, correction=0).mean()) * math.sqrt(units.shape[-1])


@dataclass(frozen=True)
class Run:
    """What was seen in one run; steps count from 1, on from task to task.

    Attributes:
        specimen: Name.
        seed: Seed.
        sick: Whether the fault was planted.
        steps: Its length.
        verdicts: Kind, layer and step of every verdict, in order.
        turns: What the judge was given: the step, the task and the points; ``None`` where a fit began anew.
        loss: Of every step.
        gradient: Norm of the gradient at every step.
        std: Step and value of the normalized standard deviation of the embedding.
        outcome: Step and value of the held-out score.
        result: What became of the model, by an outcome that knows no monitor.
    """

    specimen: str
    seed: int
    sick: bool
    steps: int
    verdicts: tuple[tuple[str, str, int], ...] = ()
    turns: tuple[tuple[int, Task, tuple[Point, ...]] | None, ...] = field(default=(), repr=False, compare=False)
    loss: tuple[float, ...] = field(default=(), repr=False)
    gradient: tuple[float, ...] = field(default=(), repr=False)
    std: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    outcome: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    result: float = math.nan


class Recorder(Judge):
    """A judge that keeps what it is given, so that other rules can be tried on it."""

    def __init__(self, plain: Plain) -> None:
        self.turns: list[tuple[int, Task, tuple[Point, ...]] | None] = []
        self.plain = plain
        super().__init__()

    def reset(self) -> None:
        """A fit begins anew."""
        self.turns.append(None)
        super().reset()

    def update(self, points: Sequence[Point], task: Task = UNKNOWN) -> Judgement:
        """Judge, and keep."""
        self.turns.append((len(self.plain.loss), task, tuple(points)))
        return super().update(points, task)


def replay(run: Run, judge: Judge) -> Iterator[tuple[int, Judgement | None]]:
    """What another judge says of the same points, with the steps; ``None`` where a fit began anew."""
    seen = {(turn[0], point.family) for turn in run.turns if turn is not None for point in turn[2]}
    planned = Counter(family for _, family in seen)
    for turn in run.turns:
        if turn is None:
            judge.reset()
            yield 0, None
        else:
            step, task, points = turn
            judge.planned = planned
            yield step, judge.update(points, task)


def run(specimen: Specimen, seed: int, sick: bool) -> Run:
    """Train once."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # sums in the same order on every machine
    seed_everything(seed, verbose=False)
    habitat = specimen.build(seed, sick)
    plain, verdicts = Plain(habitat), list[tuple[str, str, int]]()
    score = Score(plain)

    def note(trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        verdicts.append((verdict.kind, verdict.layer, len(plain.loss)))

    guard = CollapseGuard(action=note)
    guard.judge = recorder = Recorder(plain)
    # the guard acts before `plain` has counted the step, so that comes first
    callbacks = [plain, *habitat.monitors, guard, score]

    def make_trainer() -> Trainer:
        settings: dict[str, Any] = {"accelerator": "cpu", "max_epochs": -1, "logger": False, **habitat.trainer}
        return Trainer(
            max_steps=habitat.steps,
            log_every_n_steps=habitat.every,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        fit_tasks(make_trainer, habitat.model, habitat.tasks)
    return Run(
        specimen.name,
        seed,
        sick,
        len(plain.loss),
        tuple(verdicts),
        tuple(recorder.turns),
        tuple(plain.loss),
        tuple(plain.gradient),
        tuple(plain.std.items()),
        tuple(score.held_out.items()),
        habitat.result(),
    )
