"""The score of the zoo, in Markdown: everything that is scored was chosen without the family it is scored on."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from scipy.stats import beta

from lightning_collapse.rules import RULES, Judge

from .opponents import OPPONENTS, Scores
from .score import Run, replay
from .specimen import Specimen

TARGETS = {"recall": 0.9, "false alarms": 0.0, "right kind": 0.85, "right layer": 0.9, "median lead": 0.2}
SPIKE, LASTING = 2.0, 32
LEAST_LINE = 0.5
"""Lines of the guard that are chosen anew on other families are at least half of its own."""


@dataclass(frozen=True, eq=False)
class Case:
    """A run, its specimen, and when it failed by an outcome that knows no detector.

    Attributes:
        specimen: Of the run.
        run: What was recorded.
        failed: Step at which it had failed; ``None`` for a healthy run, or where the fault did no harm.
    """

    specimen: Specimen
    run: Run
    failed: int | None

    @property
    def alarm(self) -> int | None:
        """First verdict of the guard, in steps."""
        return self.run.verdicts[0][2] if self.run.verdicts else None


def failure(run: Run, twins: Sequence[Run]) -> int | None:
    """Step at which a run had failed, by its outcome or its loss; ``None`` if it ends as well as a healthy twin.

    It fails if its result is below those of all healthy twins, or if its loss is lost as none of theirs is: not finite,
    or with a median of 32 steps that is twice the least such median so far, and never returns. It had failed from the
    step on after which the held-out score was never as good as the worst twin's at the same step; at the end, if that
    does not tell.
    """
    lost = None if any(_lost(twin.loss) for twin in twins) else _lost(run.loss)
    results = [twin.result for twin in twins if math.isfinite(twin.result)]
    worse = bool(results) and not run.result >= min(results)
    if not worse:
        return lost
    others = [dict(twin.outcome) for twin in twins]
    lowest = {step: min((of[step] for of in others if step in of), default=-math.inf) for step, _ in run.outcome}
    inside = [i for i, (step, value) in enumerate(run.outcome) if value >= lowest[step]]
    outside = run.outcome[inside[-1] + 1 if inside else 0 :]
    return min(outside[0][0] if outside else run.steps, lost or run.steps)


def _lost(loss: Sequence[float]) -> int | None:
    infinite = next((i + 1 for i, value in enumerate(loss) if not math.isfinite(value)), None)
    if infinite is not None:
        return infinite
    medians = [statistics.median(loss[i : i + LASTING]) for i in range(len(loss) - LASTING + 1)]
    low = math.inf
    lost: int | None = None
    for i, median in enumerate(medians):
        low = min(low, median)
        above = low > 0 and median > SPIKE * low
        lost = (lost or i + 1) if above else None
    return lost


def cases_of(specimens: Sequence[Specimen], runs: Sequence[Run]) -> list[Case]:
    """Runs with their specimens, and the failures dated."""
    known, cases = {specimen.name: specimen for specimen in specimens}, []
    for run in runs:
        twins = [twin for twin in runs if twin.specimen == run.specimen and not twin.sick]
        cases.append(Case(known[run.specimen], run, failure(run, twins) if run.sick else None))
    return cases


def report(specimens: Sequence[Specimen], runs: Sequence[Run]) -> str:
    """All tables."""
    cases = cases_of(specimens, runs)
    return "\n\n".join([by_specimen(cases), by_detector(cases), by_target(cases)])


def by_specimen(cases: Sequence[Case]) -> str:
    """One row for each specimen."""
    lines = [
        "| family | specimen | right verdicts | failed | alarms before the end | right kind | right layer"
        " | failed at | first alarm | false alarms of the healthy |",
        "|---" * 10 + "|",
    ]
    for specimen in dict.fromkeys(case.specimen for case in cases):
        own = [case for case in cases if case.specimen is specimen]
        sick, well = [case for case in own if case.run.sick], [case for case in own if not case.run.sick]
        failed = [case for case in sick if case.failed is not None]
        false = f"{sum(bool(case.run.verdicts) for case in well)} of {len(well)}{_kinds(well)}"
        claims = " or ".join(kind.replace("_", " ") for kind in specimen.claims) or "none"
        found = [case for case in failed if case.alarm is not None]
        counts = [sum(test(case) for case in failed) for test in (is_found, is_named, is_placed)] if sick else []
        when = [_median([case.failed for case in failed]), _median([case.alarm for case in found])]
        cells = [f"{len(failed)} of {len(sick)}", *map(str, counts), *when] if sick else [""] * 6
        lines.append(f"| {specimen.family} | {specimen.name} | {claims} | {' | '.join(cells)} | {false} |")
    return "\n".join(lines)


def is_found(case: Case) -> bool:
    """Whether there is an alarm, none of them before the fault was planted."""
    return case.alarm is not None and case.alarm >= case.specimen.onset


def is_named(case: Case) -> bool:
    """Whether a verdict of a right kind fell."""
    return any(kind in case.specimen.claims for kind, _, _ in case.run.verdicts)


def is_placed(case: Case) -> bool:
    """Whether the first verdict of a right kind names a right layer."""
    layers = [layer for kind, layer, _ in case.run.verdicts if kind in case.specimen.claims]
    return bool(layers) and case.specimen.is_right(layers[0])


def by_detector(cases: Sequence[Case]) -> str:
    """The guard beside the opponents.

    The threshold of each is its largest score over the healthy runs of all other families, so that it has no false
    alarm there; of the guard also with lines chosen so. Leads of what was missed count as minus infinity.
    """
    failed, well = [case for case in cases if case.failed is not None], [case for case in cases if not case.run.sick]
    points = sum(len({turn[0] for turn in case.run.turns if turn is not None}) for case in well)
    alarms: dict[str, Callable[[Case], int | None]] = {"guard": lambda case: case.alarm}
    alarms["guard, lines chosen on the other families"] = _held_out(cases, _severities, LEAST_LINE)
    for name, scores in OPPONENTS.items():
        alarms[name] = _held_out(cases, partial(_one_score, scores))
    lines = [
        "| detector | failures found | false alarms in healthy runs | per 1,000 points | median lead |",
        "|---|---|---|---|---|",
    ]
    for name, alarm in alarms.items():
        when = {case: alarm(case) for case in [*failed, *well]}
        found = [case for case in failed if (step := when[case]) is not None and step >= case.specimen.onset]
        false = [case for case in well if when[case] is not None]
        leads = [_lead(case, when[case] if case in found else None) for case in failed if case.specimen.develops]
        per_point = f"{1000 * len(false) / points:.2g}" if points else ""
        lines.append(
            f"| {name} | {share(len(found), len(failed))} | {share(len(false), len(well))} | {per_point}"
            f" | {_signed(statistics.median(leads)) if leads else ''} |"
        )
    return "\n".join(lines)


def by_target(cases: Sequence[Case]) -> str:
    """What was aimed at, what was reached, and whether that is met."""
    failed, well = [case for case in cases if case.failed is not None], [case for case in cases if not case.run.sick]
    leads = [_lead(case, case.alarm if is_found(case) else None) for case in failed if case.specimen.develops]
    tests: dict[str, tuple[Callable[[Case], bool], Sequence[Case]]] = {
        "recall": (is_found, failed),
        "false alarms": (lambda case: bool(case.run.verdicts), well),
        "right kind": (is_named, failed),
        "right layer": (is_placed, failed),
    }
    lines = ["| | target | reached | |", "|---|---|---|---|"]
    for name, target in TARGETS.items():
        bound = "at most" if name == "false alarms" else "at least"
        if name in tests:
            test, of = tests[name]
            reached = sum(map(test, of)) / len(of) if of else 0.0
            said = share(sum(map(test, of)), len(of))
        else:
            reached = statistics.median(leads) if leads else 0.0
            said = _signed(reached)
        met = reached <= target if name == "false alarms" else reached >= target
        lines.append(f"| {name} | {bound} {target:.0%} | {said} | {'met' if met else 'not met'} |")
    return "\n".join(lines)


def share(count: int, of: int) -> str:
    """A count, what share that is, and its exact 95 % interval (Clopper-Pearson).

    Example:
        >>> share(0, 20)
        '0 of 20 (0 %, 0 to 17)'
    """
    if not of:
        return "0 of 0"
    low = float(beta.ppf(0.025, count, of - count + 1)) if count else 0.0
    high = float(beta.ppf(0.975, count + 1, of - count)) if count < of else 1.0
    return f"{count} of {of} ({100 * count / of:.0f} %, {100 * low:.0f} to {100 * high:.0f})"


def _one_score(scores: Callable[[Run], Scores], case: Case) -> dict[str, Scores]:
    return {"": scores(case.run)}


def _severities(case: Case) -> Mapping[str, Scores]:
    """How far beyond its line each kind of verdict is, in the worst layer, for as many points as it takes."""
    judge, found = Judge(), dict[str, list[tuple[int, float]]]()
    recent: dict[tuple[str, str], list[float]] = {}
    for step, judgement in replay(case.run, judge):
        if judgement is None:
            recent.clear()
            continue
        worst: dict[str, float] = {}
        for (kind, layer), severity in judgement.severities.items():
            patience = RULES[kind].patience or judge.patience
            last = recent.setdefault((kind, layer), [])
            last.append(severity if severity == severity else 0.0)
            del last[:-patience]
            if len(last) == patience:
                worst[kind] = max(worst.get(kind, 0.0), min(last))
        for kind, severity in worst.items():
            found.setdefault(kind, []).append((step, severity))
    return found


def _held_out(
    cases: Sequence[Case], scores_of: Callable[[Case], Mapping[str, Scores]], least: float = -math.inf
) -> Callable[[Case], int | None]:
    """First step at which a score is above the largest of all healthy runs of other families."""
    scores = {case: scores_of(case) for case in cases}
    largest = {
        case: {name: max((s for _, s in of), default=-math.inf) for name, of in scores[case].items()}
        for case in cases
        if not case.run.sick
    }

    def alarm(case: Case) -> int | None:
        others = [of for other, of in largest.items() if other.specimen.family != case.specimen.family]
        first = []
        for name, curve in scores[case].items():
            line = max([least, *(of.get(name, -math.inf) for of in others)])
            first += [step for step, score in curve if score > line][:1]
        return min(first, default=None)

    return alarm


def _lead(case: Case, alarm: int | None) -> float:
    """How far the alarm is ahead of the failure, as a share of the time from the fault to it."""
    if alarm is None or case.failed is None or alarm > case.failed:
        return -math.inf
    return (case.failed - alarm) / max(case.failed - case.specimen.onset, 1)


def _signed(value: float) -> str:
    return "missed" if value == -math.inf else f"{value:+.0%}"


def _median(values: Iterable[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.0f}" if known else ""


def _kinds(cases: Sequence[Case]) -> str:
    kinds = sorted({kind.replace("_", " ") for case in cases for kind, _, _ in case.run.verdicts})
    return f" ({', '.join(kinds)})" if kinds else ""
