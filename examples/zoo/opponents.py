"""What else one could look at: scores of simple detectors, read in the same runs; higher is worse."""

import math
import statistics
from collections.abc import Callable, Sequence

from .score import Run

Scores = Sequence[tuple[int, float]]
"""Step and score, of every step or point that has one."""
CALM, WINDOW = 20, 100
OLMO_WINDOW = 128
ZCLIP_WARM_UP, ZCLIP_DECAY = 25, 0.97
R_WINDOW, R_WORKERS, R_WEIGHTS = 1000, 10, (0.45, 0.70)


def excess(curve: Sequence[float]) -> Scores:
    """How far a curve is above its median of the last hundred steps, in units of it; infinite if it is not finite."""
    scores: list[tuple[int, float]] = []
    for i, value in enumerate(curve):
        if not math.isfinite(value):
            return [*scores, (i + 1, math.inf)]
        if i >= CALM:
            median = statistics.median(curve[max(0, i - WINDOW) : i])
            scores.append((i + 1, (value - median) / (abs(median) + 1e-12)))
    return scores


def six_sigma(curve: Sequence[float]) -> Scores:
    """Standard deviations above the mean of the last 128 steps, from there on: OLMo-core's ``SpikeScore``."""
    scores: list[tuple[int, float]] = []
    for i in range(OLMO_WINDOW, len(curve)):
        past = curve[i - OLMO_WINDOW : i]
        if all(map(math.isfinite, past)) and math.isfinite(curve[i]):
            scores.append((i + 1, (curve[i] - statistics.fmean(past)) / (statistics.pstdev(past) + 1e-12)))
    return scores


def olmo(run: Run) -> Scores:
    """Loss or gradient norm, whichever is further out."""
    pairs = zip(six_sigma(run.loss), six_sigma(run.gradient), strict=False)
    return [(step, max(first, second)) for (step, first), (_, second) in pairs]


def zclip(run: Run) -> Scores:
    """ZClip's z of the gradient norm: moving mean and variance, fed with what is left after clipping at 2.5."""
    warm_up = [value for value in run.gradient[:ZCLIP_WARM_UP] if math.isfinite(value)]
    if len(warm_up) < ZCLIP_WARM_UP:
        return []
    mean, variance = statistics.fmean(warm_up), statistics.pvariance(warm_up)
    scores: list[tuple[int, float]] = []
    for i, value in enumerate(run.gradient[ZCLIP_WARM_UP:], ZCLIP_WARM_UP):
        if not math.isfinite(value):
            return [*scores, (i + 1, math.inf)]
        z = (value - mean) / (math.sqrt(variance) + 1e-6)
        scores.append((i + 1, z))
        fed = mean + 2.5**2 * math.sqrt(variance) / z if z > 2.5 else value
        mean = ZCLIP_DECAY * mean + (1 - ZCLIP_DECAY) * fed
        variance = ZCLIP_DECAY * variance + (1 - ZCLIP_DECAY) * (fed - mean) ** 2
    return scores


def r_metric(run: Run) -> Scores:
    """R-Metric with its paper's weights, but no hardware events, and the last ten steps in place of ten workers."""
    spread, drift, scores = list[float](), list[float](), list[tuple[int, float]]()
    for i in range(R_WORKERS, len(run.loss)):
        spread.append(statistics.pvariance(run.gradient[i - R_WORKERS : i]))
        drift.append(run.loss[i] - statistics.fmean(run.loss[max(0, i - WINDOW) : i]))
        if not (math.isfinite(spread[-1]) and math.isfinite(drift[-1])):
            return [*scores, (i + 1, math.inf)]
        parts = [_min_max(curve[-R_WINDOW:]) for curve in (spread, drift)]
        scores.append((i + 1, sum(weight * part for weight, part in zip(R_WEIGHTS, parts, strict=True))))
    return scores


def narrow(run: Run) -> Scores:
    """How little embeddings of unit length vary, and nothing else."""
    return [(step, -value if math.isfinite(value) else math.inf) for step, value in run.std]


def out_of_patience(run: Run) -> Scores:
    """Points since the held-out score was best: what ``EarlyStopping`` compares with its patience."""
    best, since, scores = -math.inf, 0, list[tuple[int, float]]()
    for step, value in run.outcome:
        since = 0 if value > best else since + 1
        best = max(best, value)
        scores.append((step, float(since)))
    return scores


OPPONENTS: dict[str, Callable[[Run], Scores]] = {
    "loss over its running median": lambda run: excess(run.loss),
    "gradient norm over its running median": lambda run: excess(run.gradient),
    "spread of normalized embeddings": narrow,
    "EarlyStopping on the held-out score": out_of_patience,
    "OLMo-core's spikes, loss or gradient norm": olmo,
    "ZClip's z of the gradient norm": zclip,
    "R-Metric": r_metric,
}


def _min_max(curve: Sequence[float]) -> float:
    low, high = min(curve), max(curve)
    return (curve[-1] - low) / (high - low) if high > low else 0.0
