"""What keeps a small network from forgetting? Permuted and split handwritten digits, every method against none.

Run: ``python examples/continual/digits.py`` (twenty minutes on one core; ``--problem`` takes one of the two;
with ``--quick`` one short run each).
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import isnan, nan
from typing import NamedTuple

from lightning.pytorch import Callback, Trainer, seed_everything
from methods import METHODS, Method, OneForAllTasks
from small_tasks import TRAIN, Classifier, Task, bytes_kept, permuted, quiet_trainer, split
from torch.utils.data import DataLoader

from lightning_collapse import ContinualMetrics, WeightPenalty, fit_tasks
from lightning_collapse.penalties import EWC

BATCH, EPOCHS, SEEDS = 32, 4, 5
TUNING_SEED = 100
"""The weight of each method is the best of its four on this seed; the table is of other seeds."""
PROBLEMS: dict[str, tuple[Callable[[int], list[Task]], int]] = {"permuted": (permuted, 10), "split": (split, 2)}
RECORDED: dict[float, str] = {-1: "avalanche 0.6.0, one seed", 0: ".532, -.576", 10: ".553, -.536", 1000: ".736, -.222"}
BATCHED = Method((0, 10, 1000), lambda weight: [WeightPenalty(EWC(2 * weight, "batched", n_samples=None))])
"""EWC as avalanche estimates it, from gradients of batches, without its factor 1/2: weights mean the same."""


class Score(NamedTuple):
    """What is left after the last task."""

    accuracy: float  # mean over all tasks
    backward_transfer: float
    worst_case_accuracy: float  # had training been stopped at the worst step


class Run(NamedTuple):
    """All tasks in turn."""

    score: Score | None
    kilobytes: tuple[float, float]  # that the method keeps after the first task, and after the last
    seconds: float  # of the processor


class Row(NamedTuple):
    """A method on a problem: its weight, a score per seed, what it keeps, and its time over that of doing nothing."""

    weight: float
    scores: list[Score]
    kilobytes: tuple[float, float]
    time: float


def learn(
    problem: str,
    method: Method,
    weight: float,
    seed: int,
    epochs: int,
    watched: bool = True,
    every_n_steps: int | None = None,
) -> Run:
    """All tasks in turn."""
    make, classes = PROBLEMS[problem]
    seed_everything(seed, verbose=False)
    model = Classifier(classes, method.optimizer and method.optimizer(weight))
    own, metrics, kept = list(method.callbacks(weight)), list[Callback](), []
    tasks = make(seed)
    if watched:
        outputs = method.outputs and partial(method.outputs, own)
        tests = [DataLoader(test, batch_size=1000) for _, test in tasks]
        metrics = [ContinualMetrics(tests, every_n_steps=every_n_steps, outputs=outputs, forward_transfer=False)]

    def make_trainer() -> Trainer:
        kept.append(_kilobytes(own, model))
        trainer: Trainer = quiet_trainer(max_epochs=epochs, callbacks=[*own, *metrics])
        return trainer

    begin = time.process_time()
    trainer = fit_tasks(make_trainer, model, [DataLoader(train, batch_size=BATCH, shuffle=True) for train, _ in tasks])
    seconds = time.process_time() - begin
    read = trainer.callback_metrics
    score = Score(*(read[f"continual/{name}"].item() for name in Score._fields)) if every_n_steps else None
    if watched and score is None:
        score = Score(read["continual/accuracy"].item(), read["continual/backward_transfer"].item(), nan)
    return Run(score, (kept[1], _kilobytes(own, model)), seconds)


def _kilobytes(callbacks: Sequence[Callback], model: Classifier) -> float:
    optimizer = model.optimizer.made if isinstance(model.optimizer, OneForAllTasks) else None
    states = [callback.state_dict() for callback in callbacks]
    kept: int = bytes_kept([*states, optimizer.state_dict() if optimizer else {}])
    return kept / 1000


def compare(problem: str, name: str, epochs: int, seeds: int, tune: bool) -> Row:
    """Choose the weight, train on every seed, and time the method in turn with doing nothing."""
    method, nothing = METHODS[name], METHODS["nothing"]
    weight = method.weights[0]
    if tune and len(method.weights) > 1:
        weight = max(method.weights, key=lambda w: _accuracy(learn(problem, method, w, TUNING_SEED, epochs)))
    runs = [learn(problem, method, weight, seed, epochs, every_n_steps=5) for seed in range(seeds)]
    ratios = []
    for seed in range(min(seeds, 3)):
        own, base = (learn(problem, m, weight, seed, epochs, watched=False).seconds for m in (method, nothing))
        ratios.append(own / base)
    scores = [run.score for run in runs if run.score is not None]
    return Row(weight, scores, runs[0].kilobytes, statistics.median(ratios))


def _accuracy(run: Run) -> float:
    return -1.0 if run.score is None or isnan(run.score.accuracy) else run.score.accuracy


HEAD = ("against forgetting", "weight", "ACC", "BWT", "WC-ACC", "kB kept", "time")


def line(name: str, row: Row) -> str:
    """Mean over the seeds and standard deviation, in Markdown."""
    cells = [_said([getattr(score, field) for score in row.scores]) for field in Score._fields]
    weight = f"{row.weight:g}" if len(METHODS[name].weights) > 1 else ""
    first, last = row.kilobytes
    kept = f"{first:.0f}" if round(first) == round(last) else f"{first:.0f} to {last:.0f}"
    return f"| {' | '.join([name, weight, *cells, kept, f'{row.time:.2f}'])} |"


def _said(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def by_weight(title: str, method: Method, problem: str, epochs: int, seeds: int, beside: dict[float, str]) -> None:
    """What each of the weights of a method leaves."""
    print(f"| {title} | ACC | BWT | {beside.get(-1, '')} |\n" + "|---" * 4 + "|")
    for weight in method.weights:
        runs = [learn(problem, method, weight, seed, epochs) for seed in range(seeds)]
        found = [run.score for run in runs if run.score is not None]
        cells = [_said([s.accuracy for s in found]), _said([s.backward_transfer for s in found])]
        print(f"| {weight:g} | {' | '.join(cells)} | {beside.get(weight, '')} |", flush=True)
    print()


def main(problems: Sequence[str], names: Sequence[str], epochs: int, seeds: int, tune: bool) -> None:
    """Compare and print the tables."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        for problem in problems:
            print(f"**{problem} digits**\n\n| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
            means = {}
            for name in names:
                row = compare(problem, name, epochs, seeds, tune)
                means[name] = statistics.mean(score.accuracy for score in row.scores)
                print(line(name, row), flush=True)
            best = max(means, key=lambda name: means[name])
            print()
            said.append(f"{best} had kept the most of {problem} digits: accuracy {means[best]:.2f} over all tasks,")
            said.append(f"where doing nothing had kept {means['nothing']:.2f};")
        if "permuted" in problems and tune:
            by_weight("GPM, threshold", METHODS["GPM"], "permuted", epochs, seeds, {})
            by_weight("EWC, batched", BATCHED, "permuted", epochs, seeds, RECORDED)
    steps = {"permuted": epochs * -(-TRAIN // BATCH), "split": epochs * -(-TRAIN // 5 * 2 // BATCH)}
    counted = " and ".join(f"{steps[problem]} steps per task of {problem} digits" for problem in problems)
    print(f"After {counted}, {' '.join(said)[:-1]}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three methods, one seed, one epoch: to see that it runs")
    parser.add_argument("--problem", choices=PROBLEMS, help="one of the two alone")
    parser.add_argument("--only", nargs="*", choices=METHODS, help="some methods alone, beside nothing", default=[])
    given = parser.parse_args()
    chosen = [given.problem] if given.problem else list(PROBLEMS)
    if given.quick:
        main(chosen, ("nothing", "GPM", "nearest prototype"), 1, 1, tune=False)
    else:
        main(chosen, [m for m in METHODS if not given.only or m in {"nothing", *given.only}], EPOCHS, SEEDS, tune=True)
