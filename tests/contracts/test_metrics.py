"""One battery over every streaming metric of spectra: the functional of all rows, however they arrive."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_collapse import metrics
from lightning_collapse.metrics import SpectralMetric
from lightning_collapse.spectral import spectrum_of
from lightning_collapse.utilities.registry import MEASURES
from tests.contracts.test_measures import DATA, FAR, ILL, REFERENCES, Matrix

METRICS: dict[str, type[metrics.Spectrum]] = {
    name: cls
    for name, cls in vars(metrics).items()
    if inspect.isclass(cls) and issubclass(cls, metrics.Spectrum) and cls is not SpectralMetric  # the abstract one
}
TALL, WIDE = DATA["power-tall"], DATA["power-wide"]

every_metric = pytest.mark.parametrize("name", sorted(METRICS))
early = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before the ``update``")


def make(name: str, rows: Matrix | Tensor = TALL) -> metrics.Spectrum:
    return METRICS[name](rows.shape[1])


def measure_of(name: str) -> str | None:
    cls = METRICS[name]
    return cls.measure if issubclass(cls, SpectralMetric) else None


def functional(name: str, rows: Tensor) -> Tensor:
    if (of := measure_of(name)) is None:
        return spectrum_of(rows).singular_values
    return MEASURES[of].of_spectrum(spectrum_of(rows, center=MEASURES[of].spectrum == "centered"))


def naive(name: str, rows: Matrix) -> np.ndarray | float:
    measure = measure_of(name)
    return np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) if measure is None else REFERENCES[measure](rows)


def read(metric: Metric, *batches: Tensor) -> list[float]:
    for batch in batches:
        metric.update(batch)
    return values(metric.compute())


def values(value: Tensor | np.ndarray | float) -> list[float]:
    return np.atleast_1d(np.asarray(value, dtype=np.float64)).tolist()


def flat(found: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in found.items()}


def tensor(rows: Matrix, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(rows).to(dtype)


def test_the_battery_knows_every_metric() -> None:
    # they read more than rows of features
    others = {
        "ActivationOutliers",
        "AttentionEntropy",
        "ClassLoss",
        "ClassPrototypes",
        "CodebookUsage",
        "ContributingSamples",
        "IntrinsicDimension",
        "LatentUnits",
        "LiDAR",
        "LinearProbe",
        "NearestClassCenterAgreement",
        "NeuralCollapse",
        "NuisanceShares",
        "OutputEntropy",
        "RegressionCollapse",
        "RouterLoad",
        "SpectralAlignment",
        "SpectralMetric",
    }
    assert set(METRICS) == set(metrics.__all__) - others
    assert len(METRICS) > 10
    for name in set(METRICS) - {"Spectrum"}:
        of = MEASURES[measure_of(name)]
        assert of.kind == "spectrum"
        assert make(name).center is (of.spectrum == "centered")


@every_metric
def test_it_is_the_functional_and_the_reference(name: str) -> None:
    found, of_functional, of_reference = {}, {}, {}
    for data, rows in (DATA | FAR | ILL).items():
        metric = make(name, rows)
        metric.update(tensor(rows))
        value = metric.compute()
        assert value.dtype == torch.float64
        assert value.shape == ((rows.shape[1],) if name == "Spectrum" else ())
        exact = values(naive(name, rows))
        top = exact[0] if name == "Spectrum" else 1.0
        for table, numbers in (
            (found, values(value)),
            (of_functional, values(functional(name, tensor(rows)))),
            (of_reference, exact),
        ):
            table |= {(data, i): number / top for i, number in enumerate(numbers[: min(rows.shape)])}
        assert max(values(value)[min(rows.shape) :], default=0.0) <= 1e-7 * top
    # 1e-5 of the largest singular value is 1e-10 of the Gram matrix: five digits are left of it, none of 1e-8
    tolerance = {"rel": 1e-5, "abs": 1e-7 if name == "Spectrum" else 1e-12}
    assert found == pytest.approx(of_functional, **tolerance)
    assert found == pytest.approx(of_reference, **tolerance)


@every_metric
def test_facts(name: str) -> None:
    metric = make(name)
    assert metric.is_differentiable is False
    assert metric.full_state_update is True
    assert name == "Spectrum" or metric.higher_is_better in (True, False, None)
    assert METRICS[name].__doc__


@every_metric
def test_any_split(name: str) -> None:
    rows = tensor(TALL)
    whole = read(make(name), rows)
    for split in ([1, 2, 40, 17], [1] * 60, [0, 30, 0, 30, 0]):
        assert read(make(name), *rows.split(split)) == pytest.approx(whole, rel=1e-10)
        # the anchor of the stream is another one now
        assert read(make(name), *rows.flip(0).split(split)) == pytest.approx(whole, rel=1e-10)


@every_metric
def test_masks(name: str) -> None:
    rows = tensor(TALL)
    mask = torch.arange(len(rows)) % 3 != 0
    masked, picked = make(name), make(name)
    for part, kept in zip(rows.split(13), mask.split(13), strict=True):
        masked.update(part, kept)
        picked.update(part[kept])
    assert masked.seen == masked.count == mask.sum()
    assert values(masked.compute()) == pytest.approx(values(picked.compute()), rel=1e-10)
    assert values(masked.compute()) == pytest.approx(values(functional(name, rows[mask])), rel=1e-7)


@every_metric
def test_nan_rows_are_left_out(name: str) -> None:
    rows = tensor(TALL)
    spoiled = rows.clone()
    spoiled[:10] = torch.nan  # the whole first batch
    spoiled[17, 3], spoiled[44, 0] = torch.inf, -torch.inf
    keep = spoiled.isfinite().all(dim=1)
    metric = make(name)
    assert read(metric, *spoiled.split(10)) == pytest.approx(read(make(name), rows[keep]), rel=1e-10)
    assert metric.seen == 60
    assert metric.count == 48


@every_metric
def test_reset(name: str) -> None:
    metric, rows = make(name), tensor(TALL)
    read(metric, rows[:30] * 5 + 3)
    metric.reset()
    assert metric.count == 0
    assert read(metric, rows) == read(make(name), rows)


@every_metric
def test_copies(name: str) -> None:
    rows = tensor(TALL)
    for copied in (lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, Metric.clone):
        metric = make(name)
        metric.update(rows[:30])
        other = copied(metric)
        before = values(metric.compute())
        other.update(rows[30:])
        assert values(other.compute()) == read(make(name), rows[:30], rows[30:])
        assert values(metric.compute()) == before == read(make(name), rows[:30])


@every_metric
def test_forward_returns_the_batch_and_accumulates(name: str) -> None:
    metric, rows = make(name), tensor(TALL)
    for batch in (rows[:40], rows[40:] + 2):
        assert values(metric(batch)) == pytest.approx(read(make(name), batch), rel=1e-10)
    assert values(metric.compute()) == pytest.approx(read(make(name), rows[:40], rows[40:] + 2), rel=1e-10)
    assert metric.count == 60


@every_metric
@early
def test_state_dict_round_trip(name: str) -> None:
    metric, rows = make(name), tensor(TALL)
    metric.update(rows[:30])
    assert metric.state_dict() == {}
    metric.persistent(True)
    state = metric.state_dict()
    assert len(state) == 7
    restored = make(name)
    restored.persistent(True)
    restored.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert values(restored.compute()) == values(metric.compute())
    assert read(restored, rows[30:]) == read(metric, rows[30:])


@every_metric
def test_merge_state(name: str) -> None:
    rows = tensor(TALL)
    for others in (rows[20:], rows[20:] + 100):
        expected = read(make(name), rows[:20], others)
        for form in (lambda m: m, lambda m: m.metric_state):
            metric, other = make(name), make(name)
            metric.update(rows[:20])
            other.update(others)
            metric.merge_state(form(other))
            assert values(metric.compute()) == pytest.approx(expected, rel=1e-9, nan_ok=True)
            assert other.count == 40


@every_metric
def test_merge_state_after_compute(name: str) -> None:
    rows, metric, other = tensor(TALL), make(name), make(name)
    metric.update(rows[:20])
    metric.compute()  # torchmetrics keeps this value until the state changes
    other.update(rows[20:])
    metric.merge_state(other)
    assert values(metric.compute()) == pytest.approx(read(make(name), rows), rel=1e-9)


@every_metric
def test_merge_state_into_a_new_one(name: str) -> None:
    # and without the warning that nothing was seen yet, which the suite turns into an error
    metric, other = make(name), make(name)
    other.update(tensor(TALL))
    metric.merge_state(other)
    assert values(metric.compute()) == pytest.approx(values(other.compute()), rel=1e-9)


def test_collection_equals_singles() -> None:
    rows = tensor(TALL)
    classes = {name: cls for name, cls in METRICS.items() if name != "Spectrum"}
    collection = MetricCollection({name: cls(30) for name, cls in classes.items()}, compute_groups=True)
    single = MetricCollection({name: cls(30) for name, cls in classes.items()}, compute_groups=False)
    for _ in range(2):
        for batch in rows.split([0, 7, 40, 13]):
            collection.update(batch)
            single.update(batch)
        found = collection.compute()
        assert len(collection.compute_groups) == 1  # one set of sums serves all
        assert flat(found) == pytest.approx(flat(single.compute()), rel=1e-10)
        for name in classes:
            assert values(found[name]) == pytest.approx(read(make(name), rows), rel=1e-10)
        collection.update(rows[:5] + 1)  # groups share their states with the values that were read
        single.update(rows[:5] + 1)
        assert flat(collection.compute()) == pytest.approx(flat(single.compute()), rel=1e-10)
        collection.reset()
        single.reset()


def test_collection_forward() -> None:
    rows = tensor(TALL)
    collection = MetricCollection([cls(30) for name, cls in METRICS.items() if name != "Spectrum"], prefix="val/")
    for batch in (rows[:40], rows[40:]):
        found = collection(batch)
        for name in set(METRICS) - {"Spectrum"}:
            assert values(found[f"val/{name}"]) == pytest.approx(read(make(name), batch), rel=1e-10)
    assert values(collection.compute()["val/RankMe"]) == pytest.approx(read(make("RankMe"), rows), rel=1e-10)


@every_metric
def test_half_features(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        batches = tensor(TALL, dtype).split(13)
        expected = read(make(name), *(batch.double() for batch in batches))
        for autocast in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                found = read(make(name), *batches)
            assert found == expected


@every_metric
def test_float32_states_under_autocast(name: str) -> None:
    rows, off, on = tensor(TALL, torch.float32), METRICS[name](30, dtype=torch.float32), None
    expected = read(off, *rows.split(13))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        on = METRICS[name](30, dtype=torch.float32)
        assert read(on, *rows.split(13)) == expected
    assert on.compute().dtype == torch.float32


@every_metric
def test_float32_features_far_from_the_origin(name: str) -> None:
    for rows in FAR.values():
        rows32 = tensor(rows, torch.float32)
        found = read(make(name, rows), *rows32.split(7))
        expected = values(naive(name, rows32.double().numpy()))
        top = 1e-6 * max(found) if name == "Spectrum" else 1e-12
        assert found[: len(expected)] == pytest.approx(expected, rel=1e-6, abs=top)


@every_metric
def test_no_rows(name: str) -> None:
    metric = make(name)
    metric.update(torch.zeros(0, 30))
    value = metric.compute()
    assert value.isnan().all()
    assert read(metric, tensor(TALL)) == pytest.approx(read(make(name), tensor(TALL)), rel=1e-10)


@every_metric
@early
def test_compute_before_update(name: str) -> None:
    value = make(name).compute()
    assert value.isnan().all()


@every_metric
def test_nothing_but_nan(name: str) -> None:
    metric = make(name)
    metric.update(torch.full((9, 30), torch.nan))
    value = metric.compute()
    assert value.isnan().all()
    assert metric.seen == 9


@every_metric
def test_numbers_that_overflow(name: str) -> None:
    metric = make(name)
    metric.update(tensor(TALL) * 1e200)
    assert all(np.isnan(values(metric.compute())))


@every_metric
def test_bad_arguments(name: str) -> None:
    for dim in (0, -3):
        with pytest.raises(ValueError, match=f"`dim` is the number of features and must be positive, got {dim}"):
            METRICS[name](dim)
    metric = METRICS[name](4)
    for shape in ((3, 5), (3,), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"`features` must have shape \(N, 4\), got .* Flatten"):
            metric.update(torch.zeros(shape))


class Lit(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 2)
        self.metric = make(name)


@every_metric
def test_state_dict_of_the_model_is_clean(name: str) -> None:
    lit = Lit(name)
    lit.metric.update(tensor(TALL))
    assert set(lit.state_dict()) == {"net.weight", "net.bias"}


@every_metric
def test_half_precision_of_the_model_leaves_the_sums_alone(name: str) -> None:
    rows = tensor(TALL).repeat(5, 1)  # three hundred rows: bfloat16 counts to 256
    expected = read(make(name), rows)
    # the first is what Trainer(precision="bf16-true") does to everything inside the model
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.float16), lambda m: m.half()):
        lit = convert(Lit(name))
        assert lit.net.weight.dtype in (torch.float16, torch.bfloat16)
        assert read(lit.metric, *rows.split(60)) == pytest.approx(expected, rel=1e-9)
        lit.metric.reset()
        assert read(lit.metric, rows) == pytest.approx(expected, rel=1e-9)


@every_metric
def test_no_graph_is_kept(name: str) -> None:
    metric = make(name)
    metric.update(tensor(TALL).requires_grad_())
    assert not any(state.requires_grad for state in metric.metric_state.values())
    assert not metric.compute().requires_grad
