"""Two processes with uneven batches and different classes read what one process reads of all rows."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_collapse.metrics import ClassPrototypes, NearestClassCenterAgreement, NeuralCollapse
from lightning_collapse.spectral import ClassMoments
from lightning_collapse.spectral.class_moments import CLASS_STATES
from tests.distributed.launch import spawn

RANKS = 2
C, D = 6, 4
CASES = ("uneven", "tiny scatter", "spoiled", "empty", "never updated", "nobody")
WEIGHT = torch.randn(C, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def batches(case: str, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Classes 0 to 2 on the first process, 2 to 4 on the second, class 5 on none; far from the origin."""
    generator = torch.Generator().manual_seed(rank)
    sizes = {"empty": ([0], [25, 30]), "never updated": ([], [25, 30]), "nobody": ([0], [0])}
    noise, found = 1e-4 if case == "tiny scatter" else 1.0, []
    for size in sizes.get(case, ([7, 13], [40, 1, 31]))[rank]:
        labels = torch.randint(3, (size,), generator=generator) + 2 * rank
        spread = torch.randn(size, D, generator=generator, dtype=torch.float64)
        found.append((WEIGHT[labels] + noise * spread + 10, labels))
    if case == "spoiled":
        found[0][0][0] = torch.nan  # the row that would become part of an anchor
        found[1][1][-1] = (-100, C)[rank]
    return found


def feed(metric: Any, case: str, *ranks: int) -> Any:
    for rank in ranks:
        for features, labels in batches(case, rank):
            metric.update(features, labels)
    return metric


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a process that saw nothing is told so by torchmetrics
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    result: dict[Any, Any] = {}
    for case in CASES:
        metric = feed(NeuralCollapse(C, D), case, rank)
        before = {name: getattr(metric, name).clone() for name in CLASS_STATES}
        result["value", case] = metric.compute(WEIGHT)
        result["kept", case] = all(torch.equal(before[name], getattr(metric, name)) for name in CLASS_STATES)
        result["again", case] = feed(metric, "uneven", rank).compute(WEIGHT)
        result["reduced", case] = feed(ClassMoments(C, D), case, rank).reduce().states()
        result["lean", case] = feed(ClassMoments(C, D, scatter=False), case, rank).reduce().states()
        agreement = NearestClassCenterAgreement(WEIGHT + 10)
        for features, _ in batches(case, rank):
            agreement.update(features, features @ WEIGHT.T)
        result["agreement", case] = agreement.compute()
        for normalize in (False, True):
            grown = feed(ClassPrototypes(D, normalize), case, rank)
            result["prototypes", case, normalize] = grown.compute(), len(grown.count)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes found."""
    folder: Path = tmp_path_factory.mktemp("neural_collapse")
    spawn(worker, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol, equal_nan=True, msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_prototypes_of_classes_that_only_one_process_has_seen(
    case: str, normalize: bool, ranks: list[dict[Any, Any]]
) -> None:
    expected = feed(ClassPrototypes(D, normalize), case, *range(RANKS)).compute()
    for rank, result in enumerate(ranks):
        found, kept = result["prototypes", case, normalize]
        close(found, expected, 1e-12)
        own = feed(ClassPrototypes(D, normalize), case, rank)
        assert kept == len(own.count)  # what others have seen is not kept


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_measures(case: str, ranks: list[dict[Any, Any]]) -> None:
    metric = feed(NeuralCollapse(C, D), case, *range(RANKS))
    expected = metric.compute(WEIGHT)
    again = feed(metric, "uneven", *range(RANKS)).compute(WEIGHT)
    for result in ranks:
        close(result["value", case], expected, 1e-9)
        close(result["again", case], again, 1e-9)
        assert result["kept", case]
    close(ranks[0]["value", case], ranks[1]["value", case], 0.0)


@pytest.mark.parametrize("case", CASES)
def test_statistics(case: str, ranks: list[dict[Any, Any]]) -> None:
    everything = feed(ClassMoments(C, D), case, *range(RANKS))
    for result in ranks:
        reduced = ClassMoments.from_states(result["reduced", case])
        lean = ClassMoments.from_states(result["lean", case])
        for name in ("count", "means", "within_traces", "within_scatter", "ignored", "invalid", "nonfinite"):
            value = getattr(everything, name)
            scale = value.nan_to_num().abs().max().item()
            torch.testing.assert_close(getattr(reduced, name), value, rtol=1e-9, atol=1e-9 * scale, equal_nan=True)
            if name != "within_scatter":
                assert torch.equal(getattr(lean, name).nan_to_num(), getattr(reduced, name).nan_to_num())
        assert reduced.shift.nan_to_num().equal(reduced.shift)
    assert all(torch.equal(ranks[0]["reduced", case][name], ranks[1]["reduced", case][name]) for name in CLASS_STATES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_agreement(case: str, ranks: list[dict[Any, Any]]) -> None:
    metric = NearestClassCenterAgreement(WEIGHT + 10)
    for rank in range(RANKS):
        for features, _ in batches(case, rank):
            metric.update(features, features @ WEIGHT.T)
    for result in ranks:
        assert torch.equal(result["agreement", case].nan_to_num(-1), metric.compute().nan_to_num(-1))
