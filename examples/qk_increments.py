"""Do the increments of query-key products announce a rounding fault? The small GPT, healthy or rounded with a bias.

Run: ``python examples/qk_increments.py`` (ten minutes on one core; with ``--quick`` one short run of each kind).
"""

import argparse
import logging
import math
import runpy
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_collapse import AttentionEntropyMonitor, AttentionLogitMonitor, CollapseGuard, SpectralAlignmentMonitor
from lightning_collapse.callbacks import Verdict
from lightning_collapse.utilities.points import Point

EXPLOSION: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("loss_explosion.py")))
"""The model, its ways to fail and its text."""
HEALTHY, ONSET, WARM_UP = (EXPLOSION[name] for name in ("HEALTHY", "ONSET", "WARM_UP"))
FAILING = "biased rounding"
EVERY = 10
CURVES = (
    "delta2_norm",
    "delta2_stable_rank",
    "delta2_erank",
    "delta3_norm",
    "delta3_stable_rank",
    "delta3_erank",
    "max_logit",
    "qk_bound",
    "sign_diversity",
    "entropy_mean",
)
"""Signals that are compared at a line each, which no healthy run crosses."""
VERDICTS = {
    "sign diversity, the guard's rule": "loss_explosion",
    "attention entropy, the guard's rule": "attention_entropy_collapse",
    "logit growth, the guard's rule": "attention_logit_growth",
}
Curves = dict[str, dict[int, dict[str, float]]]
"""Values by measure, step and layer."""


class Keeper(Callback):
    """Keeps all points."""

    def __init__(self) -> None:
        self.curves: Curves = {name: {} for name in CURVES}

    def on_points(self, trainer: Trainer, pl_module: LightningModule, points: Sequence[Point]) -> None:
        """Those of single layers."""
        for point in points:
            if point.measure in self.curves and point.layer != "all" and math.isfinite(point.value):
                self.curves[point.measure].setdefault(point.step + 1, {})[point.layer] = point.value


def record(course: str, seed: int, steps: int) -> tuple[Curves, dict[str, int | None]]:
    """All curves of one run, and the first step of each verdict."""
    seed_everything(seed, verbose=False)
    keeper, verdicts = Keeper(), list[Verdict]()
    guard = CollapseGuard(action=lambda trainer, module, verdict: verdicts.append(verdict))
    monitors: list[Any] = [
        AttentionLogitMonitor(every_n_steps=EVERY, heads=4),
        AttentionEntropyMonitor(every_n_steps=EVERY),
        SpectralAlignmentMonitor(every_n_steps=EVERY),
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[*monitors, keeper, guard],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = EXPLOSION["GPT"](EXPLOSION["COURSES"][course])
    trainer.fit(model, DataLoader(EXPLOSION["Characters"](seed), batch_size=None))
    first = {
        name: next((verdict.step for verdict in verdicts if verdict.kind == kind), None)
        for name, kind in VERDICTS.items()
    }
    return keeper.curves, first


def deviations(curve: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    """How far any layer is from its own median since the warm-up, in logarithms, from step 100 on."""
    found, past = dict[int, float](), dict[str, list[float]]()
    for step, values in sorted(curve.items()):
        logs = {layer: math.log(max(value, 1e-12)) for layer, value in values.items()}
        if step > 2 * WARM_UP:
            far = [abs(log - statistics.median(past[layer])) for layer, log in logs.items() if past.get(layer)]
            found[step] = max(far, default=0.0)
        if step > WARM_UP:
            for layer, log in logs.items():
                past.setdefault(layer, []).append(log)
    return found


def compare(steps: int, seeds: Sequence[int]) -> str:
    """The step at which each signal first crosses the line that no healthy run does, and each verdict, in Markdown."""
    runs = {(course, seed): record(course, seed, steps) for course in (*HEALTHY, FAILING) for seed in seeds}
    lines = [f"| signal | line | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---" * (2 + len(seeds)) + "|"]
    for name in CURVES:
        scores = {key: deviations(curves[name]) for key, (curves, _) in runs.items()}
        line = max((max(s.values(), default=0.0) for (course, _), s in scores.items() if course in HEALTHY), default=0)
        firsts = [next((step for step, score in scores[FAILING, seed].items() if score > line), None) for seed in seeds]
        lines.append(f"| {name} | x {math.exp(line):.3g} | {' | '.join(map(_said, firsts))} |")
    for name in VERDICTS:
        alarms = sum(first[name] is not None for (course, _), (_, first) in runs.items() if course in HEALTHY)
        firsts = [runs[FAILING, seed][1][name] for seed in seeds]
        lines.append(f"| {name} | {alarms} false alarms | {' | '.join(map(_said, firsts))} |")
    return "\n".join(lines)


def _said(step: int | None) -> str:
    if step is None:
        return "never"
    return f"{step} (before the fault)" if step <= ONSET else str(step)


def main(steps: int = 800, seeds: int = 3, first_seed: int = 3) -> None:
    """Train all runs and print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        print(compare(steps, range(first_seed, first_seed + seeds)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps: to see that it runs")
    main(*((60, 1) if parser.parse_args().quick else ()))
