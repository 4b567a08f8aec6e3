"""What announces a loss explosion, and what saves the run? A small GPT on English text, driven into failure five ways.

Run: ``python examples/loss_explosion.py`` (an hour on one core; with ``--quick`` two short runs).
"""

import argparse
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from failing_gpt import COURSES, GPT, HEALTHY, WARM_UP, Characters
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_collapse import (
    AttentionEntropyMonitor,
    AttentionLogitMonitor,
    CollapseGuard,
    QKClip,
    Rollback,
    SkipStep,
    SpectralAlignmentMonitor,
    StabilityMonitor,
)
from lightning_collapse.callbacks import Action
from lightning_collapse.rules import Judgement
from lightning_collapse.utilities.points import Point

EVERY = 10
"""Steps between two points, and between two looks at held-out text."""
TAU = 20.0
"""Bound of the logits."""
QUICK = ("healthy", "biased rounding")
"""The runs of the short form."""
RESCUES: dict[str, Callable[[], list[Callback]]] = {
    "nothing": list,
    "SkipStep": lambda: [StabilityMonitor(EVERY), CollapseGuard(action=SkipStep())],
    "Rollback": lambda: [
        *(monitor(every_n_steps=EVERY) for monitor in (SpectralAlignmentMonitor, AttentionEntropyMonitor)),
        StabilityMonitor(EVERY),
        CollapseGuard(action=Rollback(factor=0.25, every_n_steps=50, margin=20)),
    ],
    "QKClip": lambda: [QKClip(tau=TAU)],
}
Scores = Sequence[tuple[int, float]]
"""Steps, and how bad a signal looks there; higher is worse, in any unit."""


@dataclass
class Trace:
    """What was seen in one run.

    Attributes:
        plain: Curves of every step.
        points: Of all monitors.
        severities: Of every rule, by kind, with their steps.
        held_out: Loss on text that is not trained on, with its steps.
    """

    plain: dict[str, list[float]] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    severities: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    held_out: list[tuple[int, float]] = field(default_factory=list)


class Witness(Callback):
    """Writes down what one would look at without this library, at every step, and the points of its monitors."""

    def __init__(self, seed: int) -> None:
        self.trace = Trace({name: [] for name in ("loss", "gradient norm", "weight norm", "largest activation")})
        self.text = next(iter(Characters(1000 + seed, COURSES["healthy"], rows=64)))
        self._gradient = self._peak = torch.zeros(())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to what enters the last norm."""
        pl_module.norm.register_forward_pre_hook(self._hear)  # type: ignore[union-attr]

    def _hear(self, module: Any, args: tuple[Tensor]) -> None:
        self._peak = args[0].detach().abs().amax()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The gradient's norm."""
        self._gradient = _norm([p.grad for p in pl_module.parameters() if p.grad is not None])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note all four, and how the model does on other text; a run whose loss is no number any more is over."""
        weights = _norm([p.detach() for p in pl_module.parameters()])
        values = (outputs["loss"], self._gradient, weights, self._peak)
        for curve, value in zip(self.trace.plain.values(), values, strict=True):
            curve.append(float(value) if math.isfinite(value) else math.inf)
        if (batch_idx + 1) % EVERY == 0:
            with torch.no_grad():
                loss = float(pl_module.loss(self.text))  # type: ignore[operator]
            self.trace.held_out.append((batch_idx, loss if math.isfinite(loss) else math.inf))

    def on_points(self, trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> None:
        """Keep them."""
        self.trace.points += points


class Severities(Action):
    """Writes down how far beyond its line everything is that a guard judges."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def on_points(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> None:
        """The largest over the layers."""
        worst: dict[str, float] = {}
        for (kind, _), severity in judgement.severities.items():
            worst[kind] = max(severity, worst.get(kind, 0.0))
        for kind, severity in worst.items():
            self.trace.severities.setdefault(kind, []).append((judgement.step, severity))


def _norm(tensors: list[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))
    return norm


def train(course: str, seed: int, steps: int, callbacks: Callable[[], list[Callback]] = list) -> Trace:
    """One run; without callbacks of its own it is watched by every monitor that could announce its end."""
    seed_everything(seed, verbose=False)
    witness = Witness(seed)
    watchers = callbacks() or [
        *(monitor(every_n_steps=EVERY) for monitor in (SpectralAlignmentMonitor, AttentionEntropyMonitor)),
        AttentionLogitMonitor(every_n_steps=EVERY, heads=4),
        StabilityMonitor(every_n_steps=EVERY),
        CollapseGuard(action=Severities(witness.trace)),
    ]
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tempfile.mkdtemp(),
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[*watchers, witness],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Characters(seed, COURSES[course]), batch_size=None)
    trainer.fit(GPT(COURSES[course]), loader)
    return witness.trace


def failed_at(trace: Trace) -> int | None:
    """When the model fails: the step from which the held-out loss stays a tenth above its best until the end."""
    best, failed = math.inf, None
    for step, loss in trace.held_out:
        if loss <= 1.1 * best:
            failed = None
        elif failed is None:
            failed = step
        best = min(best, loss)
    return failed


def deviation(curve: Scores) -> Scores:
    """How far a curve is from its own median since the warm-up, in logarithms."""
    scores, seen = list[tuple[int, float]](), list[float]()
    for step, value in curve:
        log = math.log(min(max(value, 1e-12), 1e300))
        if seen:
            scores.append((step, abs(log - statistics.median(seen))))
        if step >= WARM_UP:
            seen.append(log)
    return scores


def of_layers(family: str, measure: str, read: Callable[[Scores], Scores] = deviation) -> Callable[[Trace], Scores]:
    """The worst over the layers of a curve of a monitor."""

    def worst(trace: Trace) -> Scores:
        curves: dict[str, list[tuple[int, float]]] = {}
        for point in trace.points:
            if (point.family, point.measure) == (family, measure) and not math.isnan(point.value):
                curves.setdefault(point.layer, []).append((point.step, point.value))
        found: dict[int, float] = {}
        for curve in curves.values():
            for step, score in read(curve):
                found[step] = max(score, found.get(step, score))
        return sorted(found.items())

    return worst


def as_it_is(curve: Scores) -> Scores:
    """Of a curve that is a score already."""
    return curve


def of_steps(name: str) -> Callable[[Trace], Scores]:
    """A curve of every step."""
    return lambda trace: deviation(list(enumerate(trace.plain[name])))


SIGNALS: dict[str, Callable[[Trace], Scores]] = {
    **{name: of_steps(name) for name in ("loss", "gradient norm", "weight norm", "largest activation")},
    "loss, CUSUM": of_layers("stability", "loss_cusum", as_it_is),
    "gradient norm, CUSUM": of_layers("stability", "grad_norm_cusum", as_it_is),
    "loss, burst": of_layers("stability", "loss_z", as_it_is),
    "gradient norm, burst": of_layers("stability", "grad_norm_z", as_it_is),
    "sign diversity": of_layers("spectral_alignment", "sign_diversity"),
    "spectral norm": of_layers("spectral_alignment", "spectral_norm"),
    "attention entropy": of_layers("attention", "entropy_mean"),
    "largest logit": of_layers("attention", "max_logit"),
    "bound of the logits": of_layers("attention", "qk_bound"),
    **{
        f"{name} of the increment of {order} order": of_layers("attention", f"delta{number}_{measure}")
        for number, order in ((2, "first"), (3, "second"))
        for name, measure in (("norm", "norm"), ("effective rank", "erank"))
    },
    "rule: loss explosion": lambda trace: trace.severities.get("loss_explosion", []),
    "rule: attention entropy collapse": lambda trace: trace.severities.get("attention_entropy_collapse", []),
    "rule: attention logit growth": lambda trace: trace.severities.get("attention_logit_growth", []),
}


def fires(scores: Scores, threshold: float) -> int | None:
    """The first step, twice the warm-up behind it, at which a score is above the threshold."""
    return next((step for step, score in scores if step >= 2 * WARM_UP and score > threshold), None)


def leads(runs: dict[tuple[str, int], Trace]) -> str:
    """Every signal at the threshold that is silent in all healthy runs: where it fires, and how long before failure."""
    courses = [course for course in COURSES if course not in HEALTHY]
    lines = [f"| signal | {' | '.join(courses)} | fired | median lead |", "|---" * (3 + len(courses)) + "|"]
    for name, read in SIGNALS.items():
        calm = [
            score
            for (course, _), trace in runs.items()
            if course in HEALTHY
            for step, score in read(trace)
            if step >= 2 * WARM_UP
        ]
        threshold = max(calm, default=math.inf)
        found: dict[str, list[float]] = {course: [] for course in courses}
        for (course, _), trace in runs.items():
            failed = failed_at(trace)
            if course in found and failed is not None:
                fired = fires(read(trace), threshold)
                found[course].append(-math.inf if fired is None or fired > failed else failed - fired)
        everything = [lead for of in found.values() for lead in of]
        cells = [_lead(of) for of in found.values()]
        fired_in = f"{sum(lead > -math.inf for lead in everything)} of {len(everything)}"
        lines.append(f"| {name} | {' | '.join(cells)} | {fired_in} | {_lead(everything)} |")
    return "\n".join(lines)


def _lead(found: Sequence[float]) -> str:
    """Median with what was missed as minus infinity."""
    if not found:
        return "no failure"
    median = statistics.median_low(found)
    return "missed" if median == -math.inf else f"{median:.0f}"


def rescues(runs: dict[tuple[str, str, int], Trace]) -> str:
    """Held-out loss in the end, by course and rescue: the median over seeds."""
    lines = [f"| run | {' | '.join(RESCUES)} |", "|---" * (1 + len(RESCUES)) + "|"]
    for course in dict.fromkeys(course for course, _, _ in runs):
        cells = []
        for rescue in RESCUES:
            last = [trace.held_out[-1][1] for (of, by, _), trace in runs.items() if (of, by) == (course, rescue)]
            cells.append(f"{statistics.median(last):.3g}" if last else "")
        lines.append(f"| {course} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    steps: int = 800, seeds: int = 5, first_seed: int = 3, saved_seeds: int = 3, courses: Sequence[str] = tuple(COURSES)
) -> None:
    """Train all runs and print both tables."""
    for name in ("lightning.pytorch", "lightning_collapse"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    some = range(first_seed, first_seed + seeds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        watched = {(course, seed): train(course, seed, steps) for course in courses for seed in some}
        print(leads(watched), flush=True)
        saved = {
            (course, rescue, seed): train(course, seed, steps, make) if rescue != "nothing" else watched[course, seed]
            for course in courses
            for rescue, make in RESCUES.items()
            for seed in some[:saved_seeds]
        }
    print()
    print(rescues(saved))
    failed = [course for (course, _), trace in watched.items() if failed_at(trace) is not None]
    driven = sum(course not in HEALTHY for course, _ in watched)
    healthy = sum(course in HEALTHY for course in failed)
    print(
        f"\nAfter {steps} steps {len(failed) - healthy} of {driven} runs that were driven to it had failed, and"
        f" {healthy} of {len(watched) - driven} healthy ones."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short runs: to see that it works")
    if parser.parse_args().quick:
        main(steps=20, seeds=1, courses=QUICK)
    else:
        main()
