"""Demo: one encoder trained twice on real digits, once so that it collapses and once so that it does not."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from typing_extensions import override

from lightning_collapse import AntiCollapseMixin, CollapseGuard, CollapseMonitor
from lightning_collapse.losses import VICReg

LAYERS = ("encoder", "projector")
MEASURES = (
    "rankme",
    "effective_rank",
    "eigenvalue_effective_rank",
    "feature_std",
    "relative_spread",
    "direction_spread",
)
EVERY_N_STEPS, BATCH_SIZE = 10, 256
DROP = 0.05  # an accuracy shows the collapse where it stays this far below the untrained encoder's, to the end

Curve = Mapping[int, float]


@dataclass(frozen=True)
class Digits:
    """The handwritten digits that ship with scikit-learn; images ``(N, 1, 8, 8)`` in [0, 1], labels ``(N,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(n_test: int = 500) -> Digits:
    """Load the 1797 digits and hold ``n_test`` of them out, always the same ones."""
    bunch = _optional("sklearn.datasets").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:n_test], order[n_test:]
    return Digits(images[train], labels[train], images[test], labels[test])


def augment(images: Tensor) -> Tensor:
    """Another view of images ``(N, C, H, W)``: turned up to 10 degrees, zoomed 10 %, shifted a pixel, with noise."""
    turn, zoom, right, down = (2 * torch.rand(4, len(images), device=images.device) - 1).unbind()
    angle, scale = turn * math.radians(10), 1 + 0.1 * zoom
    cos, sin = angle.cos() * scale, angle.sin() * scale
    transformation = torch.stack([cos, -sin, right / 4, sin, cos, down / 4], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(transformation, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False) + 0.05 * torch.randn_like(images)


class JointEmbedding(AntiCollapseMixin, LightningModule):
    """A convolutional encoder and a projector, trained so that two views of an image agree.

    Args:
        regularized: Add the variance and covariance terms of VICReg to the agreement; all else stays the same.
    """

    def __init__(self, regularized: bool) -> None:
        super().__init__()
        self.regularized = regularized
        self.encoder = nn.Sequential(
            _block(1, 16), _block(16, 64, stride=2), _block(64, 128, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.projector = nn.Sequential(nn.Linear(128, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 128))
        self.set_regularizers({"vicreg": VICReg()})

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Projections ``(N, 128)`` of images ``(N, 1, 8, 8)``."""
        projections: Tensor = self.projector(self.encoder(images))
        return projections

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        first, second = (self(augment(batch[0])) for _ in range(2))
        # the first term of VICReg; alone it has a perfect solution: the same output for every image
        agreement = 25 * functional.mse_loss(first, second)
        loss = self.anti_collapse_loss(first, second) if self.regularized else agreement
        self.log("loss", loss)
        return loss

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=4e-3)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class Probe(Callback):
    """Ask the encoder which digit it sees, on held-out images.

    **Logged metrics**, at step 0 and then at the monitor's steps, of the same weights as the monitor's points:

    - ``probe/few_labels``: accuracy of the nearest of 50 labelled images, the mean over 50 choices of those;
    - ``probe/all_labels``: accuracy of a linear classifier that is given every training label.

    It draws no random number of the run's and leaves train and eval flags as they were. Training never sees a label.
    """

    def __init__(self, digits: Digits) -> None:
        self.digits = digits
        generator = torch.Generator().manual_seed(0)
        self._shots = torch.stack([_choose(digits.train_labels, 5, generator) for _ in range(50)])

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == 0 or (step + 1) % EVERY_N_STEPS == 0:
            accuracies = self.measure(pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(accuracies, step=step)

    @torch.no_grad()
    def measure(self, module: nn.Module) -> dict[str, float]:
        """Both accuracies of ``module.encoder``."""
        digits, encoder, training = self.digits, module.get_submodule("encoder"), module.training
        module.eval()
        train, test = encoder(digits.train_images).double(), encoder(digits.test_images).double()
        module.train(training)
        return {
            "probe/few_labels": nearest_accuracy(train, test, digits, self._shots),
            "probe/all_labels": linear_accuracy(train, test, digits),
        }


def nearest_accuracy(train: Tensor, test: Tensor, digits: Digits, shots: Tensor) -> float:
    """Accuracy of the nearest labelled image by features ``(N, D)``, mean over the choices ``shots`` ``(draws, K)``."""
    center = train.mean(dim=0)  # leaves distances as they are and their rounding error small
    nearest = torch.cdist(test - center, train - center)[:, shots].argmin(dim=2)
    guesses = digits.train_labels[shots].gather(1, nearest.T)
    return float((guesses == digits.test_labels).double().mean())


def linear_accuracy(train: Tensor, test: Tensor, digits: Digits, ridge: float = 0.01) -> float:
    """Accuracy of ridge regression from standardized features ``(N, D)`` to one-hot labels."""
    mean, std = train.mean(dim=0), train.std(dim=0).clamp_min(1e-12)
    train, test = (train - mean) / std, (test - mean) / std
    one_hot = functional.one_hot(digits.train_labels).to(train)
    gram = train.T @ train / len(train) + ridge * torch.eye(train.shape[1], dtype=train.dtype)
    weight = torch.linalg.solve(gram, train.T @ (one_hot - one_hot.mean(dim=0)) / len(train))
    guesses = (test @ weight + one_hot.mean(dim=0)).argmax(dim=1)
    return float((guesses == digits.test_labels).double().mean())


class Curves(DummyLogger):
    """A logger that keeps every curve in memory, as ``{name: {step: value}}``."""

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, dict[int, float]] = {}

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.curves.setdefault(name, {})[step or 0] = float(value)


@dataclass(frozen=True)
class Run:
    """What one training left behind: curves ``{name: {step: value}}`` and what the guard said, in order."""

    title: str
    curves: Mapping[str, Curve]
    verdicts: Sequence[Any]


def train(title: str, model: LightningModule, digits: Digits, folder: Path, steps: int) -> Run:
    """Train ``model`` under the eyes of a monitor and a guard; event files go to a folder of the run's own."""
    curves, guard = Curves(), CollapseGuard()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=EVERY_N_STEPS,
        logger=[TensorBoardLogger(folder, name=title.lower().replace(" ", "_")), curves],
        callbacks=[CollapseMonitor(LAYERS, MEASURES, EVERY_N_STEPS), guard, Probe(digits)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    images = TensorDataset(digits.train_images)
    sampler = RandomSampler(images, replacement=True, num_samples=steps * BATCH_SIZE)
    trainer.fit(model, DataLoader(images, BATCH_SIZE, sampler=sampler))
    return Run(title, curves.curves, list(guard.verdicts))


def run_demo(folder: Path, steps: int = 200, seed: int = 0) -> list[Run]:
    """Train twice from the same weights on the same views, draw ``folder / "collapse.png"`` and return both runs."""
    _optional("matplotlib.figure")  # to fail now and not after the training
    digits = load_digits()
    runs = []
    for title, regularized in (("Invariance alone", False), ("VICReg", True)):
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(seed)
            runs.append(train(title, JointEmbedding(regularized), digits, folder, steps))
    plot(runs, folder / "collapse.png")
    return runs


@dataclass(frozen=True)
class Panel:
    """One row of the picture and its curves, as ``{name: (label, color, line style)}``."""

    title: str
    note: str
    curves: Mapping[str, tuple[str, str, str]]
    scale: str = "log"
    legend: int = -1  # in the column that has room for it


PANELS = (
    Panel(
        "Effective rank",
        "dashed: mean removed, so blind to scale",
        {
            "collapse/encoder/rankme": ("encoder h, RankMe", "tab:blue", "-"),
            "collapse/projector/rankme": ("projector z, RankMe", "tab:orange", "-"),
            "collapse/encoder/effective_rank": ("encoder h, centered", "tab:blue", "--"),
            "collapse/projector/effective_rank": ("projector z, centered", "tab:orange", "--"),
        },
    ),
    Panel(
        "Feature std",
        "mean over features; blind to directions",
        {
            "collapse/encoder/feature_std": ("encoder h", "tab:blue", "-"),
            "collapse/projector/feature_std": ("projector z", "tab:orange", "-"),
        },
    ),
    Panel("Loss", "what is minimized", {"loss": ("training", "black", "-")}),
    Panel(
        "Accuracy",
        "held-out digits, read from h; dotted: untrained",
        {
            "probe/few_labels": ("nearest of 50 labelled images", "tab:green", "-"),
            "probe/all_labels": ("linear classifier, all 1297 labels", "tab:gray", "-"),
        },
        scale="linear",
        legend=0,
    ),
)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw the runs side by side into a PNG."""
    figure = _optional("matplotlib.figure").Figure(figsize=(9.5, 10.5), layout="constrained")
    axes = figure.subplots(len(PANELS), len(runs), sharex=True, sharey="row", squeeze=False)
    for run, column in zip(runs, axes.T, strict=True):
        _write(column[0], run.title, (0, 1), (0, 26), "axes fraction", fontsize=14, fontweight="bold")
        column[-1].set_xlabel("training step")
        for panel, ax in zip(PANELS, column, strict=True):
            _draw(ax, panel, run)
    for panel, row in zip(PANELS, axes, strict=True):
        row[0].set_title(f"{panel.title} ({panel.note})", fontsize=9.5, loc="left")
        row[panel.legend].legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)


def summary(runs: Sequence[Run]) -> str:
    """What was seen: a table, the verdicts, and when one would have known without them."""
    table = [["", "untrained", *(run.title for run in runs)]]
    for panel in PANELS:
        for key, (label, *_) in panel.curves.items():
            curves = [run.curves[key] for run in runs]
            cells = [curves[0].get(0), *(curve[max(curve)] for curve in curves)]
            table.append([f"{panel.title}, {label}", *("" if cell is None else f"{cell:.3g}" for cell in cells)])
    width = max(len(row[0]) for row in table)
    lines = [f"{name:<{width}}" + "".join(f"{cell:>18}" for cell in cells) for name, *cells in table]
    for run in runs:
        lines += ["", f"{run.title}: {_story(run)}"]
    return "\n".join(lines)


def _story(run: Run) -> str:
    """The verdicts, and when the loss and the accuracies showed as much."""
    if not run.verdicts:
        return "the guard found no collapse."
    said = min(verdict.step for verdict in run.verdicts)
    lines = ["", *(f"  {verdict}" for verdict in run.verdicts)]
    lines.append(f"  The guard said so at step {said}, without a label. What else would have?")
    witnesses = {"training loss, where it rises by a tenth of its first value": _rise(run.curves["loss"])}
    for key, (label, *_) in PANELS[-1].curves.items():
        witnesses[f"{label}, where it stays {100 * DROP:.0f} points below untrained"] = _drop(run.curves[key])
    for name, step in witnesses.items():
        order = f"{abs((step or 0) - said)} steps {'after' if (step or 0) >= said else 'before'} the guard"
        lines.append(f"  - {name}: " + ("never" if step is None else f"step {step}, {order}"))
    return "\n".join(lines)


def _drop(curve: Curve) -> int | None:
    """The step from which on an accuracy stays :data:`DROP` below its first value."""
    high = [step for step, value in curve.items() if value >= curve[0] - DROP]
    return min((step for step in curve if step > max(high)), default=None)


def _rise(curve: Curve) -> int | None:
    """The first step at which a loss is above its lowest value so far by a tenth of its first."""
    margin = 0.1 * curve[min(curve)]
    lowest = accumulate(curve.values(), min)
    rises = (step for step, low in zip(curve, lowest, strict=True) if curve[step] > low + margin)
    return next(rises, None)


def _draw(ax: Any, panel: Panel, run: Run) -> None:
    for key, (label, color, line) in panel.curves.items():
        curve = run.curves[key]
        ax.plot(curve.keys(), curve.values(), color=color, linestyle=line, label=label)
        if line == "-":
            end = max(curve), curve[max(curve)]
            _write(ax, f"{end[1]:.3g}", end, (4, 0), "data", color=color, va="center")
        if 0 in curve:
            ax.axhline(curve[0], color=color, linestyle=":", linewidth=1)
    ax.set_yscale(panel.scale)
    if run.verdicts:
        step = min(verdict.step for verdict in run.verdicts)
        ax.axvline(step, color="crimson", linestyle="--", linewidth=1)
        if "loss" in panel.curves:  # has room at the top, where a loss has left
            at, where = (step, 0.97), ("data", "axes fraction")
            _write(ax, f"CollapseGuard:\nstep {step}", at, (5, 0), where, color="crimson", va="top")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _write(ax: Any, text: str, at: tuple[float, float], offset: tuple[float, float], where: Any, **style: Any) -> None:
    ax.annotate(text, at, offset, xycoords=where, textcoords="offset points", annotation_clip=False, **style)


def _block(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    # no running statistics in the encoder: untrained or not, it is one function in train and in eval mode
    convolution = nn.Conv2d(channels, out_channels, kernel_size=3, stride=stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(4, out_channels), nn.ReLU())


def _choose(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:per_class] for label in range(10)])


def _optional(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        message = f"The demo needs `{module.partition('.')[0]}`: pip install 'lightning-collapse[examples]'"
        raise ModuleNotFoundError(message) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's notes, not the guard's; use one thread: two gain little here, and stall a busy machine."""
    logger, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.WARNING)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # the second is Lightning 2.6 with torch 2.13
        warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec.*is deprecated).*")
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            logger.setLevel(level)
