"""Whether the detector keeps its budget of false alarms, and what shifts it finds; on simulated noise.

Autoregressive noise of unit standard deviation, Gaussian and Student-t(3), at a lag-1 autocorrelation of 0, 0.5 and
0.9: the share of healthy runs in which any of the curves alarms, with its exact 95 % interval (Clopper-Pearson),
against the budget of one in a hundred; and the share of shifts by 3 and 5 standard deviations in the middle of a run
that are found within 100 points of it and not before, with the median delay, counting those that are missed. Curves
are independent, or equally correlated. The recursion is vectorized over curves; a test holds it equal to the detector.

Run: ``python -m tests.benchmarks.false_alarms [--quick]``.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from lightning_collapse.rules import detector
from lightning_collapse.rules.detector import Detector

Array = NDArray[np.float64]
BUDGET = 0.01
NOISES = [(df, phi) for df in (None, 3) for phi in (0.0, 0.5, 0.9)]
CURVES = (1, 20, 200)
CORRELATION = 0.8
BLOCK = 4000
"""Curves at a time, so that the state stays in the cache."""


class Settings(NamedTuple):
    """Of a :class:`Detector` of one side."""

    threshold: float
    freeze: float
    armed_after: int


def settings(planned: int, curves: int) -> Settings:
    """What the detector does for so many points and curves."""
    one = Detector(planned, curves, BUDGET)
    return Settings(one.threshold, one.freeze, one.armed_after)


def autoregressive(
    rng: np.random.Generator, phi: float, df: int | None, points: int, curves: int, correlation: float = 0.0
) -> Array:
    """Stationary noise of unit standard deviation, ``(points, curves)``; ``df=None`` is Gaussian."""

    def innovations(n: int) -> Array:
        return rng.standard_normal(n) if df is None else rng.standard_t(df, n) * np.sqrt((df - 2) / df)

    noise, value = np.empty((points, curves)), np.zeros(curves)
    settling = int(np.ceil(np.log(1e-4) / np.log(phi))) if phi else 0
    for step in range(-settling, points):
        new = np.sqrt(1 - correlation) * innovations(curves)
        if correlation:
            new += np.sqrt(correlation) * innovations(1)
        value = phi * value + np.sqrt(1 - phi**2) * new
        if step >= 0:
            noise[step] = value
    return noise


def sums(curves: Array, how: Settings) -> Array:
    """The sum of scores at each point of each curve, ``(points, curves)``: the recursion of the detector, rises only.

    NaN is a gap, and the transform is the identity.
    """
    keep, forget = 2 / detector.FORGET - 1, detector.FORGET
    count, mean, product, square, variance, pending, total, frozen = np.zeros((8, curves.shape[1]))
    last, result = np.full(curves.shape[1], np.nan), np.empty_like(curves)
    with np.errstate(divide="ignore", invalid="ignore"):
        for step, values in enumerate(curves):
            given = ~np.isnan(values)
            follows, armed = given & ~np.isnan(last), count >= how.armed_after
            n, deviation, before = np.minimum(count, keep), values - mean, last - mean
            phi = np.minimum(np.maximum((n * product / square + 1) / (n - 3), 0), detector.LARGEST_PHI)
            error = np.where(follows & (count >= detector.FEW) & (square > 0), deviation - phi * before, deviation)
            floor, root, degrees = 1e-6 * (1 + np.abs(mean)), np.sqrt(variance), np.maximum(n - 2, 1)
            leverage = np.where(square > 0, np.maximum(before**2 / square - 1, 0) / n, 0)
            scale = np.sqrt(np.maximum(variance, floor**2) + variance * leverage)
            score = (8 * degrees + 1) / (8 * degrees + 3) * np.sqrt(degrees * np.log1p((error / scale) ** 2 / degrees))
            score = np.minimum(score, detector.CAP) * np.sign(error)
            added = np.minimum(np.maximum(total + score - detector.SLACK, 0), 2 * how.threshold)
            total = np.where(armed & follows, added, total)

            frozen_now = armed & (total > how.freeze)
            learns = given & ~frozen_now
            bounded = (count >= detector.FEW) & (armed | (variance > floor**2))
            size = np.where(bounded, np.minimum(np.abs(error), detector.WILD * root), np.abs(error))
            close = np.where(bounded, np.minimum(size, detector.OUTLIER * root), size)
            weight = np.where(learns & follows & (count >= 2), np.maximum(1 / (count - 1), forget), 0)
            pairs = weight > 0
            far = np.where(bounded & (square > 0), detector.FAR * np.maximum(np.sqrt(square), floor), np.inf)
            deviation, before = np.clip(deviation, -far, far), np.clip(before, -far, far)
            variance = np.where(pairs, variance + weight * (close * close - variance), variance)
            pending = np.where(pairs, pending + weight * (size * size - pending), pending)
            variance = np.where(pairs & (total == 0), pending, variance)
            product = np.where(pairs, product + weight * (deviation * before - product), product)
            square = np.where(pairs, square + weight * (before * before - square), square)
            mean = np.where(learns, mean + np.maximum(1 / (count + 1), forget) * deviation, mean)
            count, last = count + learns, values
            frozen = np.where(learns, 0, frozen + (given & frozen_now))
            anew = frozen >= detector.FROZEN
            if anew.any():
                for state in (count, mean, product, square, variance, pending, total, frozen):
                    state[anew] = 0
                last = np.where(anew, np.nan, values)
            result[step] = total
    return result


def false_alarms(rng: np.random.Generator, noise: tuple[int | None, float], points: int, curves: int, n: int) -> int:
    """How many of ``n`` healthy curves alarm, with the threshold of ``curves`` of them."""
    how, (df, phi) = settings(points, curves), noise
    blocks = [BLOCK] * (n // BLOCK) + [n % BLOCK] * (n % BLOCK > 0)
    return sum(
        int((sums(autoregressive(rng, phi, df, points, size), how) >= how.threshold).any(0).sum()) for size in blocks
    )


def correlated_false_alarms(rng: np.random.Generator, phi: float, points: int, curves: int, runs: int) -> int:
    """In how many runs any of equally correlated curves alarms."""
    how = settings(points, curves)
    return sum(
        bool((sums(autoregressive(rng, phi, None, points, curves, CORRELATION), how) >= how.threshold).any())
        for _ in range(runs)
    )


def found(
    rng: np.random.Generator, noise: tuple[int | None, float], points: int, curves: int, size: float, n: int
) -> tuple[float, float]:
    """Share of shifts in the middle of a run that are found, and the median delay in points with those missed."""
    how, middle, (df, phi) = settings(points, curves), points // 2, noise
    shifted = autoregressive(rng, phi, df, points, n)
    shifted[middle:] += size
    alarms = sums(shifted, how) >= how.threshold
    alarms[middle + 100 :] = False
    hit = alarms.any(0) & ~alarms[:middle].any(0)
    delay = np.where(hit, alarms.argmax(0) - middle + 1, np.inf)
    return float(hit.mean()), float(np.sort(delay)[n // 2])


def interval(hits: int, n: int) -> tuple[float, float]:
    """Exact 95 % interval of a share (Clopper & Pearson, 1934)."""
    low = float(beta.ppf(0.025, hits, n - hits + 1)) if hits else 0.0
    return low, float(beta.ppf(0.975, hits + 1, n - hits)) if hits < n else 1.0


def in_any(share: float, curves: int) -> float:
    """In percent, the share of runs in which one of so many independent curves alarms, from that of one curve."""
    return float(-100 * np.expm1(curves * np.log1p(-share)))


def rows(quick: bool) -> Iterator[str]:
    """The table, line by line."""
    lengths = {40: 400_000, 100: 400_000, 1000: 80_000} if not quick else {40: 400, 100: 400}
    shifts = 2000 if not quick else 50
    yield "points  curves  noise            false alarms, % of runs   found, % (median delay) of 3 sd, 5 sd"
    for seed, (points, most) in enumerate(lengths.items()):
        for curves in CURVES:
            for noise in NOISES:
                rng, n = np.random.default_rng(seed), max(most * curves // max(CURVES), most // 20)
                alarms = false_alarms(rng, noise, points, curves, n)
                low, high = (in_any(share, curves) for share in interval(alarms, n))
                hits = (found(rng, noise, points, curves, size, shifts) for size in (3.0, 5.0))
                yield (
                    f"{points:6}  {curves:6}  {_name(noise):15}  {in_any(alarms / n, curves):6.2f}"
                    f" [{low:5.2f}, {high:5.2f}]      "
                    + ", ".join(f"{100 * share:4.0f} ({delay:3.0f})" for share, delay in hits)
                )
    runs = 2000 if not quick else 3
    alarms = correlated_false_alarms(np.random.default_rng(9), 0.5, 100, 200, runs)
    low, high = (100 * share for share in interval(alarms, runs))
    name = f"normal .5, r={CORRELATION}"
    yield f"{100:6}  {200:6}  {name:15}  {100 * alarms / runs:6.2f} [{low:5.2f}, {high:5.2f}]"


def _name(noise: tuple[int | None, float]) -> str:
    return f"{'normal' if noise[0] is None else f't({noise[0]})'} phi={noise[1]}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="show that it runs")
    for row in rows(parser.parse_args().quick):
        print(row, flush=True)


if __name__ == "__main__":
    main()
