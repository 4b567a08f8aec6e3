"""One battery over every metric: what its states and its value are, whatever happens to the module that holds it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_collapse import metrics

D, C, N = 6, 3, 8
COUNTS = {"n", "ties", "classes", "missing", "rare"}


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(seed: int) -> Tensor:
    return torch.randint(C, (N,), generator=torch.Generator().manual_seed(seed))


CASES: dict[str, tuple[Callable[..., Metric], Callable[[int], tuple[Tensor, ...]]]] = {
    "ActivationOutliers": (lambda: metrics.ActivationOutliers(D), lambda seed: (rows(seed, N, D),)),
    "AttentionEntropy": (
        lambda: metrics.AttentionEntropy(2),
        lambda seed: (rows(seed, N, 2, 5, D), rows(seed + 99, N, 2, 5, D)),
    ),
    "ClassLoss": (lambda: metrics.ClassLoss(C), lambda seed: (rows(seed, N), classes(seed))),
    "ClassPrototypes": (lambda: metrics.ClassPrototypes(D), lambda seed: (rows(seed, N, D), classes(seed))),
    "CodebookUsage": (lambda: metrics.CodebookUsage(D), lambda seed: (classes(seed),)),
    "ContributingSamples": (lambda: metrics.ContributingSamples(), lambda seed: (rows(seed, N, C), classes(seed))),
    "IntrinsicDimension": (lambda: metrics.IntrinsicDimension(capacity=20, k=3), lambda seed: (rows(seed, N, D),)),
    "LatentUnits": (lambda: metrics.LatentUnits(D), lambda seed: (rows(seed, N, D), rows(seed + 99, N, D))),
    "LiDAR": (lambda: metrics.LiDAR(D), lambda seed: tuple(rows(seed + 99 * i, N, D) for i in range(3))),
    "LinearProbe": (
        lambda: metrics.LinearProbe(2, {"factor": C}),
        lambda seed: (rows(seed, N, 2), classes(seed).unsqueeze(1), torch.arange(N) % 3 == 0),
    ),
    "NearestClassCenterAgreement": (
        lambda: metrics.NearestClassCenterAgreement(rows(7, C, D), torch.ones(C)),
        lambda seed: (rows(seed, N, D), rows(seed + 99, N, C)),
    ),
    "NeuralCollapse": (lambda: metrics.NeuralCollapse(C, D), lambda seed: (rows(seed, N, D), classes(seed))),
    "NuisanceShares": (
        lambda: metrics.NuisanceShares(C, C, D),
        lambda seed: (rows(seed, N, D), classes(seed), classes(seed + 99)),
    ),
    "OutputEntropy": (lambda: metrics.OutputEntropy(D), lambda seed: (rows(seed, N, D), classes(seed))),
    "RegressionCollapse": (
        lambda: metrics.RegressionCollapse(D, 2),
        lambda seed: (rows(seed, N, D), rows(seed + 99, N, 2)),
    ),
    "RouterLoad": (
        lambda: metrics.RouterLoad(D),
        lambda seed: (rows(seed, N, D), rows(seed, N, D).topk(2, dim=1).indices),
    ),
    "SpectralAlignment": (lambda: metrics.SpectralAlignment(D), lambda seed: (rows(seed, N, D), rows(3, D))),
}
CASES |= {
    name: (lambda name=name: getattr(metrics, name)(D), lambda seed: (rows(seed, N, D),))
    for name in metrics.__all__
    if name not in {*CASES, "SpectralMetric"}
}

every_metric = pytest.mark.parametrize("name", sorted(CASES))
CONVERSIONS: list[tuple[Any, ...]] = [("set_dtype", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
CONVERSIONS += [("half",), ("bfloat16",), ("float",), ("double",), ("type", torch.float16), ("to", torch.bfloat16)]

conversions = pytest.mark.parametrize("conversion", CONVERSIONS, ids=lambda c: "-".join(map(str, c)))
early = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before the ``update``")


def states(metric: Metric) -> dict[str, Tensor]:
    """States and buffers, as they are."""
    return {**metric.metric_state, **dict(metric.named_buffers())}


def updated(metric: Metric, name: str, *seeds: int) -> Metric:
    for seed in seeds:
        metric.update(*CASES[name][1](seed))
    return metric


def flat(value: Any) -> dict[str, Tensor]:
    return value if isinstance(value, dict) else {"value": value}


def assert_same(first: Metric, second: Metric) -> None:
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(flat(second.compute()), flat(first.compute()), **exact)
    torch.testing.assert_close(states(second), states(first), **exact)


def test_the_battery_knows_every_metric() -> None:
    assert set(CASES) == set(metrics.__all__) - {"SpectralMetric"}


@every_metric
def test_counts_are_integers_or_double(name: str) -> None:
    for key, state in updated(CASES[name][0](), name, 0).metric_state.items():
        assert state.dtype in (torch.int64, torch.float64) or key == "rows"


@every_metric
@conversions
def test_conversions_leave_states_as_they_are(name: str, conversion: tuple[Any, ...]) -> None:
    method, *dtype = conversion

    def convert(module: Any) -> Any:
        return getattr(module, method)(*dtype)

    plain = updated(CASES[name][0](), name, 0, 1)
    first = updated(convert(CASES[name][0]()), name, 0, 1)
    later = updated(convert(updated(CASES[name][0](), name, 0)), name, 1)
    assert_same(plain, first)
    assert_same(plain, later)
    held = nn.ModuleList([updated(CASES[name][0](), name, 0)])
    convert(held if hasattr(held, method) else held[0])  # `set_dtype` is a metric's own
    assert_same(plain, updated(held[0], name, 1))
    for metric in (plain, first, later):
        metric.reset()
        updated(metric, name, 2)
    assert_same(plain, first)
    assert_same(plain, later)


@every_metric
def test_inference_mode_and_out_of_it_again(name: str) -> None:
    plain = updated(CASES[name][0](), name, 0, 1)
    with torch.inference_mode():
        inside = CASES[name][0]()
        updated(inside, name, 5)
        inside.compute()
        inside.reset()
    assert_same(plain, updated(inside, name, 0, 1))
    outside = CASES[name][0]()
    with torch.inference_mode():
        updated(outside, name, 0)
    assert_same(plain, updated(outside, name, 1))
    assert_same(plain, copy.deepcopy(outside))
    assert_same(plain, pickle.loads(pickle.dumps(outside)))
    for metric in (plain, outside):
        metric.reset()
    with torch.inference_mode():
        outside(*CASES[name][1](0))
        merged = updated(CASES[name][0](), name, 1)
        outside.merge_state(merged)
    updated(plain, name, 0)
    plain.merge_state(updated(CASES[name][0](), name, 1))
    assert_same(updated(plain, name, 2), updated(outside, name, 2))
    assert not any(state.is_inference() for state in outside.metric_state.values())


@every_metric
@early
def test_without_data_it_reads_nan(name: str) -> None:
    empty = [tensor[:0] if len(tensor) == N else tensor for tensor in CASES[name][1](0)]
    lost = [torch.full_like(t, torch.nan) if t.is_floating_point() and len(t) == N else t for t in CASES[name][1](0)]
    whole = not any(tensor.is_floating_point() for tensor in lost)  # indices are never NaN
    for batch in (None, empty, empty if whole else lost):
        metric = CASES[name][0]()
        if batch is not None:
            metric.update(*batch)
        found = flat(metric.compute())
        assert all(value.isnan().all() for key, value in found.items() if key not in COUNTS), (found, batch)
        assert all(value == (C if key == "missing" else 0) for key, value in found.items() if key in COUNTS)
        updated(metric, name, 0)
        assert not all(value.isnan().any() for value in flat(metric.compute()).values())
        metric.reset()
        assert all(value.isnan().all() for key, value in flat(metric.compute()).items() if key not in COUNTS)
