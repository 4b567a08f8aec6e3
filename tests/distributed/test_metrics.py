"""Two processes with uneven batches read what one process reads of all rows, and keep their own sums afterwards."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_collapse.metrics import ClassLoss, ContributingSamples, LinearProbe, NuisanceShares
from lightning_collapse.monitoring.evaluate import evaluate
from lightning_collapse.monitoring.feature_buffer import LayerFeatures
from lightning_collapse.spectral import GaussianSketch, Moments, reduce_moments
from lightning_collapse.spectral.moments import STATES
from lightning_collapse.utilities.registry import MEASURES
from tests.contracts.test_metrics import METRICS
from tests.distributed.launch import spawn

RANKS = 2
DIM = 12
CASES = ("uneven", "spoiled", "empty", "never updated", "nobody")


@cache
def batches(case: str, rank: int) -> list[tuple[Tensor, Tensor | None]]:
    """What a process sees: batches and masks; far from the origin, and from one another by some standard deviations."""
    generator = torch.Generator().manual_seed(rank)
    sizes = {
        "uneven": ([5, 9], [40, 1, 31]),
        "spoiled": ([20, 20], [3, 30]),
        "empty": ([0, 0], [25, 25]),
        "never updated": ([], [25, 25]),
        "nobody": ([0], [0]),
    }[case][rank]
    std = torch.arange(1.0, DIM + 1, dtype=torch.float64) ** -0.5
    offset = 1000 + torch.arange(DIM) % 3 * (2 * rank - 1)
    rows = [torch.randn(size, DIM, generator=generator, dtype=torch.float64) * std + offset for size in sizes]
    masks: list[Tensor | None] = [None] * len(rows)
    if case == "spoiled":
        rows[0][0] = torch.nan  # the row that would become part of the anchor
        rows[1][-1, 1] = torch.inf
        masks[1] = torch.arange(len(rows[1])) % 4 != 1
    return list(zip(rows, masks, strict=True))


def feed(metric: Metric | MetricCollection | Moments, case: str, *ranks: int) -> Any:
    for rank in ranks:
        for rows, mask in batches(case, rank):
            metric.update(rows, mask)
    return metric


def collection() -> MetricCollection:
    return MetricCollection({name: cls(DIM) for name, cls in METRICS.items() if name != "Spectrum"})


def states(metric: Metric) -> dict[str, Tensor]:
    return {name: getattr(metric, name).clone() for name in STATES}


def synced(name: str, case: str, rank: int) -> dict[str, Any]:
    metric = feed(METRICS[name](DIM), case, rank)
    before = states(metric)
    value = metric.compute()
    after = states(metric)
    again = feed(metric, "uneven", rank).compute()  # more rows after a synchronized reading
    return {"value": value, "kept": all(torch.equal(before[s], after[s]) for s in STATES), "again": again}


def hooks_ignored(expected: int) -> Tensor | str:
    """Reading of a layer that ran on no process."""
    layer = LayerFeatures(torch.zeros(0, DIM), torch.zeros(0, dtype=torch.bool), expected)
    try:
        found = evaluate({"layer": layer}, [MEASURES["effective_rank"], MEASURES["feature_std"]])["layer"]
    except Exception as error:  # the other cases shall be told all the same
        return repr(error)
    return torch.stack([found.n, found.seen.to(found.n), found.top.to(found.n)])


def labelled(*ranks: int) -> dict[str, Tensor]:
    """Metrics of labelled rows, whose batches differ in size between processes."""
    metrics = [ClassLoss(3), ContributingSamples(), LinearProbe(DIM, {"factor": 3}), NuisanceShares(3, 2, DIM)]
    for rank in ranks:
        rows = torch.cat([rows for rows, _ in batches("uneven", rank)])
        index = torch.arange(len(rows))
        y = (index * (rank + 2) + rank) % 3
        inputs = (rows[:, 0] - 1000, y), (rows[:, :3], y), (rows, y.unsqueeze(1), index % 2 == 0), (rows, y, index % 2)
        for metric, arguments in zip(metrics, inputs, strict=True):
            metric.update(*arguments)
    return {f"{type(metric).__name__}.{name}": v for metric in metrics for name, v in metric.compute().items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a process that saw nothing is told so by torchmetrics
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    result: dict[Any, Any] = {(name, case): synced(name, case, rank) for name in METRICS for case in CASES}
    for case in CASES:
        several = feed(collection(), case, rank)
        result["collection", case] = several.compute()
        result["count", case] = {name: metric.count for name, metric in several.items()}
        moments = feed(Moments(DIM), case, rank)
        result["reduce", case] = moments.reduce().states()
        result["local", case] = moments.states()
        narrow = Moments(3)
        for rows, mask in batches(case, rank):
            narrow.update(rows[:, :3], mask)
        result["reduce_moments", case] = [reduced.states() for reduced in reduce_moments([narrow, moments])]
    stepwise = METRICS["ParticipationRatio"](DIM, dist_sync_on_step=True)
    result["step"] = [stepwise(rows[:5]) for rows, _ in batches("uneven", rank)[:1]] + [stepwise.compute()]
    result["labelled"] = labelled(rank)
    result["sketch"] = GaussianSketch(9, 4).matrix
    result["hooks_ignored"] = {expected: hooks_ignored(expected) for expected in (DIM - 1, DIM + 1)}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes found."""
    folder: Path = tmp_path_factory.mktemp("metrics")
    spawn(worker, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_metrics(name: str, case: str, ranks: list[dict[Any, Any]]) -> None:
    metric = feed(METRICS[name](DIM), case, *range(RANKS))
    expected = metric.compute()
    again = feed(metric, "uneven", *range(RANKS)).compute()
    for result in ranks:
        found = result[name, case]
        close(found["value"], expected)
        close(found["again"], again)
        assert found["kept"]
    assert torch.equal(torch.nan_to_num(ranks[0][name, case]["value"]), torch.nan_to_num(ranks[1][name, case]["value"]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_collection(case: str, ranks: list[dict[Any, Any]]) -> None:
    expected = feed(collection(), case, *range(RANKS)).compute()
    for rank, result in enumerate(ranks):
        assert set(result["collection", case]) == set(expected)
        for name, value in expected.items():
            close(result["collection", case][name], value)
        own = feed(Moments(DIM), case, rank).count
        assert all(count == own for count in result["count", case].values())


@pytest.mark.parametrize("case", CASES)
def test_reduced_moments(case: str, ranks: list[dict[Any, Any]]) -> None:
    rows = [part[mask if mask is not None else slice(None)] for r in range(RANKS) for part, mask in batches(case, r)]
    everything = torch.cat(rows)
    finite = everything[everything.isfinite().all(dim=1)]
    count = len(finite)
    mean = finite.mean(dim=0) if count else torch.zeros(DIM, dtype=torch.float64)
    y = finite - mean
    energy = y.square().sum(dim=1)
    expected = {
        "seen": torch.tensor(float(len(everything)), dtype=torch.float64),
        "count": torch.tensor(float(count), dtype=torch.float64),
        "shift": mean,
        "second": y.T @ y,
        "cubic": energy @ y,
        "quartic": energy.square().sum(),
    }
    for rank, result in enumerate(ranks):
        for reduced in (result["reduce", case], result["reduce_moments", case][1]):
            assert set(reduced) == set(STATES)
            for state, value in expected.items():
                scale = value.abs().max().item()
                torch.testing.assert_close(reduced[state], value, rtol=1e-10, atol=1e-12 * scale)
            assert (reduced["total"].abs() <= 1e-9 * max(count, 1)).all()  # about the mean
        narrow = result["reduce_moments", case][0]
        torch.testing.assert_close(narrow["second"], expected["second"][:3, :3], rtol=1e-10, atol=1e-8)
        assert narrow["count"] == count
        local = feed(Moments(DIM), case, rank).states()
        assert all(torch.equal(result["local", case][state], local[state]) for state in STATES)
    for state in STATES:
        assert torch.equal(ranks[0]["reduce", case][state], ranks[1]["reduce", case][state])


def test_sync_on_step(ranks: list[dict[Any, Any]]) -> None:
    expected = METRICS["ParticipationRatio"](DIM)
    for rank in range(RANKS):
        expected.update(batches("uneven", rank)[0][0][:5])
    for result in ranks:
        for value in result["step"]:
            close(value, expected.compute())


def test_metrics_of_labelled_rows(ranks: list[dict[Any, Any]]) -> None:
    expected = labelled(*range(RANKS))
    assert not any(expected[f"LinearProbe.{name}"].isnan() for name in ("factor", "null"))
    for result in ranks:
        torch.testing.assert_close(result["labelled"], expected, rtol=1e-8, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("expected", [DIM - 1, DIM + 1], ids=["by rows", "by moments"])
def test_a_layer_that_ran_on_no_process_is_read(expected: int, ranks: list[dict[Any, Any]]) -> None:
    for result in ranks:
        vector = result["hooks_ignored"][expected]
        assert isinstance(vector, Tensor), vector
        assert vector.tolist() == [0.0, 0.0, 0.0]


def test_sketches_are_the_same_everywhere(ranks: list[dict[Any, Any]]) -> None:
    assert all(torch.equal(result["sketch"], GaussianSketch(9, 4).matrix) for result in ranks)


def test_without_a_process_group() -> None:
    moments = feed(Moments(DIM), "uneven", 0)
    reduced = moments.reduce()
    torch.testing.assert_close(reduced.shift, moments.mean)
    close(reduced.scatter, moments.scatter)
    assert reduced.count == moments.count == 14
    assert moments.shift is not reduced.shift
