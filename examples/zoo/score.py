"""Runs specimens, reads simple baselines in the same runs, and says who saw what, when."""

import logging
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_collapse import CollapseGuard, fit_tasks
from lightning_collapse.callbacks import Verdict

from .specimen import Habitat, Specimen

CALM, WINDOW, LOSS, GRADIENT, DROP = 20, 100, 2.0, 3.0, 0.1
STDS = tuple(round(0.02 * 1.3**i, 3) for i in range(15))
"""Thresholds to choose the one of the normalized standard deviation from."""


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

    def _hear(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._embedding = output.detach()

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
    """Mean standard deviation of rows of unit length, times the root of their width: 1 where they fill the sphere."""
    units = nn.functional.normalize(rows.flatten(0, -2).double(), dim=-1)
    return float(units.std(dim=0, correction=0).mean()) * math.sqrt(units.shape[-1])


@dataclass(frozen=True)
class Run:
    """What was seen in one run; steps count from 1.

    Attributes:
        specimen: Name.
        seed: Seed.
        sick: Whether the fault was planted.
        steps: Its length.
        verdicts: Kind, layer and step of every verdict, in order.
        loss: First step at which the loss was twice the median of the last hundred steps.
        gradient: The same, for the gradient's norm and three times.
        score: First step at which the held-out score was 0.1 below its best so far.
        std: Step and value of the normalized standard deviation.
    """

    specimen: str
    seed: int
    sick: bool
    steps: int
    verdicts: tuple[tuple[str, str, int], ...]
    loss: int | None
    gradient: int | None
    score: int | None
    std: tuple[tuple[int, float], ...]

    @property
    def shown(self) -> int:
        """The first step at which loss, gradient or held-out score show it; the last step if none does."""
        return min((step for step in (self.loss, self.gradient, self.score) if step is not None), default=self.steps)

    def below(self, threshold: float) -> int | None:
        """First step at which the normalized standard deviation is below a threshold."""
        return next((step for step, value in self.std if value < threshold), None)


def exceeds(curve: Sequence[float], factor: float) -> int | None:
    """First step, from 1, at which a curve is above ``factor`` times its running median, or not finite."""
    for i, value in enumerate(curve):
        if not math.isfinite(value):
            return i + 1
        if i >= CALM and value > factor * statistics.median(curve[max(0, i - WINDOW) : i]):
            return i + 1
    return None


def dropped(curve: dict[int, float]) -> int | None:
    """First step at which a score is 0.1 below its best so far."""
    best = -math.inf
    for step, value in curve.items():
        best = max(best, value)
        if not value >= best - DROP:
            return step
    return None


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

    # the guard acts before `plain` has counted the step, so that comes first
    callbacks = [plain, *habitat.monitors, CollapseGuard(action=note), score]

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
        exceeds(plain.loss, LOSS),
        exceeds(plain.gradient, GRADIENT),
        dropped(score.held_out),
        tuple(plain.std.items()),
    )
