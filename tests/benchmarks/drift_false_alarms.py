"""Whether the tests of drift keep their levels where nothing drifts; on simulated rows and curves.

Every line is a share of alarms, with its exact 95 % interval (Clopper-Pearson), against the level: single tests of two
fresh samples, by permutations, by the largest of several Kolmogorov-Smirnov distances and by the stability index; whole
runs of windows against one reference at the level that is spent over them; fits to random walks; and whole runs of the
rate, which is read from windows of one law and shares each window with the point before.

Run: ``python -m tests.benchmarks.drift_false_alarms [--quick]``.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_collapse.functional import drift
from lightning_collapse.monitoring.drift_course import DriftCourse
from tests.benchmarks.false_alarms import interval

ROWS, WIDTH, DIRECTIONS = 128, 8, 16
LEVEL, RUN = 0.05, 100


def single_tests(points: int, generator: torch.Generator) -> dict[str, int]:
    """Rejections at the level among so many pairs of fresh samples, by test."""
    frequencies = torch.randn(WIDTH, 32, generator=generator) / WIDTH**0.5
    directions = torch.nn.functional.normalize(torch.randn(WIDTH, DIRECTIONS, generator=generator), dim=0)
    found = dict.fromkeys(("permutations", "largest ks", "psi"), 0)
    for seed in range(points):
        pair = torch.randn(2, ROWS, WIDTH, generator=generator)
        x, y = (pair @ directions).mT.sort(dim=-1).values
        p = drift.permutation_p_value(*drift.fourier_features(pair, frequencies), seed=seed)
        found["permutations"] += int(p <= LEVEL)
        largest = float(drift.kolmogorov_smirnov(x, y).amax())
        found["largest ks"] += int(drift.ks_p_value(largest, ROWS, ROWS, DIRECTIONS) <= LEVEL)
        found["psi"] += int(drift.psi_p_value(drift.psi(x[:1], y[:1]), ROWS, ROWS)[0] <= LEVEL)
    return found


def runs(count: int, generator: torch.Generator) -> dict[str, int]:
    """Runs of windows of one law in which anything alarms, by test."""
    found = dict.fromkeys(("changed, whole runs", "jump, whole runs"), 0)
    for _ in range(count):
        windows: Tensor = torch.randn(RUN + 1, DIRECTIONS, ROWS, generator=generator).sort(dim=-1).values
        course = DriftCourse(RUN, 1, LEVEL)
        largest = drift.kolmogorov_smirnov(windows[:1].expand(RUN, -1, -1), windows[1:]).amax(dim=1).tolist()
        rates = drift.wasserstein1(windows[:-1], windows[1:]).mean(dim=1).tolist()
        changed = [course.changed(drift.ks_p_value(d, ROWS, ROWS, DIRECTIONS)) for d in largest]
        jumps = [course.jump(step, rate)[1] for step, rate in enumerate(rates)]
        found["changed, whole runs"] += int(any(changed))
        found["jump, whole runs"] += int(any(jumps))
    return found


def rows(quick: bool) -> Iterator[tuple[str, int, int]]:
    """Name, alarms and trials of every test."""
    points = 200 if quick else 10_000
    generator = torch.Generator().manual_seed(0)
    for name, alarms in single_tests(points, generator).items():
        yield name, alarms, points
    count = points // RUN if quick else 1000
    for name, alarms in runs(count, generator).items():
        yield name, alarms, count
    for n in (50, 200):
        walks = torch.randn(points, n, generator=generator, dtype=torch.float64).cumsum(dim=1)
        yield f"bounded, random walks of {n}", int(drift.equilibrium(walks).bounded.sum()), points


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="show that it runs")
    for name, alarms, trials in rows(parser.parse_args().quick):
        low, high = interval(alarms, trials)
        shares = f"{100 * alarms / trials:.2f} % [{100 * low:.2f}, {100 * high:.2f}] of {trials}"
        print(f"{name:30} {shares} (level {100 * LEVEL:.0f} %)", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
