"""Neural collapse finished from its statistics, and in one pass over the data: in turn, in one process, as ratios.

Finishing is what ``NeuralCollapse.compute`` does, with VCI, which decomposes a ``D x D`` matrix, and without. It is set
against one pseudo-inverse of the ``D x D`` between-class covariance, the first line of the usual ``nc1``. The one pass
is set against the usual two, means first and the scatter about them second, which must produce the features twice: with
a small network that makes them, and with features that cost nothing because they lie in memory (no saving then: both
spend their time in the same outer products).

Run: ``python -m tests.benchmarks.neural_collapse``. Budgets: at most 0.2 without VCI, against ``float64``; and at most
0.7 with the network. What the monitor takes of a fit is in ``tests.benchmarks.monitor_overhead``.
"""

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_collapse.metrics import NeuralCollapse
from lightning_collapse.metrics.neural_collapse import measures, of_means, within_covariance
from lightning_collapse.spectral import ClassMoments


def seconds(fn: Callable[[], object]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    fn()
    return time.process_time() - start


def report(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    """Print medians of both, and the ratio with its range over the rounds."""
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    both = [1000 * statistics.median(times) for times in zip(*pairs, strict=True)]
    ratios = sorted(a / b for a, b in pairs)
    print(
        f"{name:58s} {both[0]:8.1f} ms against {both[1]:8.1f} ms: {statistics.median(ratios):.3f}"
        f" ({ratios[0]:.3f} to {ratios[-1]:.3f}, {rounds} rounds)"
    )


def labelled(classes: int, dim: int, n: int) -> tuple[Tensor, Tensor]:
    """Random class means at a distance of several standard deviations."""
    labels = torch.arange(n) % classes
    return 3 * torch.randn(classes, dim)[labels] + torch.randn(n, dim), labels


def finish(classes: int = 100, dim: int = 512, rounds: int = 31) -> None:
    """From statistics to measures, against a pseudo-inverse in the same precision and in half of it."""
    features, labels = labelled(classes, dim, 4000)
    metric, weight = NeuralCollapse(classes, dim), torch.randn(classes, dim)
    metric.update(features, labels)
    moments = metric.moments()

    def everything() -> Tensor:
        return measures(moments, weight)["nc1"]

    def without_vci() -> Tensor:
        within = within_covariance(moments, moments.count)
        return of_means(moments, within, moments.count, weight, None)["nc1"]

    centered = moments.means - moments.global_mean()
    between = centered.T @ centered / classes
    inverse = torch.linalg.pinv(between, hermitian=True)
    expected = (moments.within_scatter / moments.count.sum() @ inverse).trace() / classes
    torch.testing.assert_close(everything(), expected)
    for dtype in (torch.float64, torch.float32):
        matrix = between.to(dtype)
        for hermitian in (False, True):
            for ours, what in ((without_vci, "NC1-NC3, CDNV"), (everything, "with VCI")):
                name = f"{what}, C={classes}, d={dim}, pinv {dtype}, hermitian={hermitian}"
                report(name, ours, lambda m=matrix, h=hermitian: torch.linalg.pinv(m, hermitian=h), rounds)


def passes(classes: int = 1000, dim: int = 512, n: int = 20_000, width: int = 1024, rounds: int = 5) -> None:
    """One pass against two, both in double precision."""
    hidden = torch.randn(n, width)
    _, labels = labelled(classes, 1, n)
    first, last = torch.randn(width, width) / width**0.5, torch.randn(width, dim) / width**0.5
    in_memory = (hidden @ first).relu() @ last

    def stream(made: bool) -> Iterable[tuple[Tensor, Tensor]]:
        for h, x, y in zip(hidden.split(500), in_memory.split(500), labels.split(500), strict=True):
            yield ((h @ first).relu() @ last if made else x), y

    def one(made: bool) -> Tensor:
        moments = ClassMoments(classes, dim)
        for x, y in stream(made):
            moments.update(x, y)
        return moments.within_scatter

    def two(made: bool) -> Tensor:
        count, total = torch.zeros(classes, dtype=torch.float64), torch.zeros(classes, dim, dtype=torch.float64)
        for x, y in stream(made):
            count.index_add_(0, y, torch.ones(len(y), dtype=torch.float64))
            total.index_add_(0, y, x.double())
        means, scatter = total / count.unsqueeze(1), torch.zeros(dim, dim, dtype=torch.float64)
        for x, y in stream(made):
            centered = x.double() - means[y]
            scatter.addmm_(centered.T, centered)
        return scatter

    torch.testing.assert_close(one(False), two(False))
    for made, name in ((True, f"made by two layers of {width}"), (False, "in memory")):
        title = f"one pass, C={classes}, d={dim}, n={n}, features {name}"
        report(title, lambda made=made: one(made), lambda made=made: two(made), rounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    finish()
    passes()
