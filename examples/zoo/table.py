"""The score of the zoo, in Markdown."""

import statistics
from collections.abc import Callable, Sequence

from .score import STDS, Run
from .specimen import Specimen

TUNED = range(5)
"""Thresholds are chosen on these seeds, and reported on the others."""
TARGETS = {"recall": 1.0, "false alarms": 0.0, "right kind": 0.95, "right layer": 0.95, "median lead": 0.2}
Alarm = Callable[[Run], int | None]


def report(specimens: Sequence[Specimen], runs: Sequence[Run]) -> str:
    """Tables of both groups of seeds, and what they come to."""
    tuning = [run for run in runs if run.seed in TUNED]
    threshold = best_std(tuning)
    parts = []
    for title, some in (("chosen on", tuning), ("reported on", [run for run in runs if run.seed not in TUNED])):
        if some:
            seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in some}))
            parts += [f"Thresholds {title} seeds {seeds}:", by_specimen(specimens, some), by_signal(some, threshold)]
            parts.append(by_target(specimens, some))
    return "\n\n".join(parts)


def best_std(runs: Sequence[Run]) -> float:
    """The threshold of the normalized standard deviation with the most alarms in sick runs beyond those in healthy."""

    def gain(threshold: float) -> float:
        alarms = [(run.sick, run.below(threshold) is not None) for run in runs]
        return _share([seen for sick, seen in alarms if sick]) - _share([seen for sick, seen in alarms if not sick])

    return max(STDS, key=gain) if runs else STDS[0]


def by_specimen(specimens: Sequence[Specimen], runs: Sequence[Run]) -> str:
    """One row for each; leads are shares of the run's length."""
    lines = [
        "| specimen | verdict that is right | alarms | that first | that at all | right layer | first alarm, step"
        " | lead | false alarms of the twin |"
    ]
    lines.append("|---" * 9 + "|")
    for specimen in specimens:
        own = [run for run in runs if run.specimen == specimen.name]
        sick, well = [run for run in own if run.sick], [run for run in own if not run.sick]
        if not own:
            continue
        false = f"{sum(bool(run.verdicts) for run in well)} of {len(well)}{_kinds(well)}"
        if specimen.kind is None:
            lines.append(f"| {specimen.name} | none: {specimen.says} | | | | | | | {false} |")
            continue
        alarmed = [run for run in sick if run.verdicts]
        counts = [len(alarmed), *(sum(test(specimen, run) for run in sick) for test in (is_first, is_there, is_placed))]
        first = f"{statistics.median(run.verdicts[0][2] for run in alarmed):.0f} of {sick[0].steps}" if alarmed else ""
        lead = f"{statistics.median(leads):+.0%}" if (leads := leads_of(alarmed)) and specimen.develops else ""
        cells = " | ".join(f"{count} of {len(sick)}" for count in counts)
        lines.append(f"| {specimen.name} | {specimen.kind.replace('_', ' ')} | {cells} | {first} | {lead} | {false} |")
    return "\n".join(lines)


def is_first(specimen: Specimen, run: Run) -> bool:
    """Whether the first verdict is of the right kind."""
    return bool(run.verdicts) and run.verdicts[0][0] == specimen.kind


def is_there(specimen: Specimen, run: Run) -> bool:
    """Whether a verdict of the right kind fell at all."""
    return any(kind == specimen.kind for kind, _, _ in run.verdicts)


def is_placed(specimen: Specimen, run: Run) -> bool:
    """Whether the first verdict of the right kind names a right layer."""
    layers = [layer for kind, layer, _ in run.verdicts if kind == specimen.kind]
    return bool(layers) and specimen.is_right(layers[0])


def leads_of(runs: Sequence[Run]) -> list[float]:
    """How far the first verdict is ahead of loss, gradient norm and held-out score, as shares of the runs' length."""
    return [(run.shown - run.verdicts[0][2]) / run.steps for run in runs if run.verdicts]


def by_signal(runs: Sequence[Run], threshold: float) -> str:
    """The guard beside the baselines, which were read in the same runs."""
    signals: dict[str, Alarm] = {
        "guard": lambda run: run.verdicts[0][2] if run.verdicts else None,
        "loss > 2x its running median": lambda run: run.loss,
        "gradient norm > 3x its running median": lambda run: run.gradient,
        "held-out score 0.1 below its best": lambda run: run.score,
        f"std of normalized embeddings < {threshold:.2g}": lambda run: run.below(threshold),
    }
    lines = [
        "| signal | alarms in failing runs | false alarms in healthy runs | median first alarm |",
        "|---|---|---|---|",
    ]
    for name, alarm in signals.items():
        sick, well = ([alarm(run) for run in runs if run.sick == wanted] for wanted in (True, False))
        steps = [alarm(run) for run in runs if run.sick]
        when = [step / run.steps for step, run in zip(steps, (r for r in runs if r.sick), strict=True) if step]
        counts = [f"{sum(step is not None for step in of)} of {len(of)}" for of in (sick, well)]
        lines.append(f"| {name} | {' | '.join(counts)} | {f'{statistics.median(when):.0%}' if when else 'never'} |")
    return "\n".join(lines)


def by_target(specimens: Sequence[Specimen], runs: Sequence[Run]) -> str:
    """What was aimed at, what was reached, and whether that is met.

    A verdict of a wrong kind does not count as recall; the right kind must come first.
    """
    known = {specimen.name: specimen for specimen in specimens}
    sick, well = [run for run in runs if run.sick], [run for run in runs if not run.sick]
    leads = leads_of([run for run in sick if known[run.specimen].develops])
    reached = {
        "recall": _share([is_there(known[run.specimen], run) for run in sick]),
        "false alarms": _share([bool(run.verdicts) for run in well]),
        "right kind": _share([is_first(known[run.specimen], run) for run in sick]),
        "right layer": _share([is_placed(known[run.specimen], run) for run in sick]),
        "median lead": statistics.median(leads) if leads else 0.0,
    }
    lines = ["| | target | reached | |", "|---|---|---|---|"]
    for name, target in TARGETS.items():
        met = reached[name] <= target if name == "false alarms" else reached[name] >= target
        bound = "at most" if name == "false alarms" else "at least"
        lines.append(f"| {name} | {bound} {target:.0%} | {reached[name]:.0%} | {'met' if met else 'not met'} |")
    return "\n".join(lines)


def _kinds(runs: Sequence[Run]) -> str:
    kinds = sorted({kind.replace("_", " ") for run in runs for kind, _, _ in run.verdicts})
    return f" ({', '.join(kinds)})" if kinds else ""


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
