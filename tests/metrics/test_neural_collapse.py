"""Neural collapse over a stream is neural collapse of all rows at once, with whatever a trainer does in between."""

import math
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_collapse.functional import (
    bias_collapse,
    cdnv,
    etf_error,
    gnc2,
    gof_error,
    minority_cosine,
    minority_norm,
    nc1,
    nc2_equiangular,
    nc2_equinorm,
    nc3,
    nc4,
    norm_count_slope,
    unc3,
    vci,
)
from lightning_collapse.metrics import NearestClassCenterAgreement, NeuralCollapse

C, D, N = 5, 7, 90
WEIGHT = torch.randn(C, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BIAS = torch.randn(C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def labelled(seed: int = 0, noise: float = 1.0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Class 3 has no rows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (N,), generator=generator)
    labels[labels == 3] = 1
    spread = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return WEIGHT[labels] + noise * spread + offset, labels


OF_THE_CLASSIFIER = ("nc3", "bias_collapse", "minority_cosine", "minority_norm", "norm_count_slope", "unc3")


def reference(features: Tensor, labels: Tensor) -> dict[str, float]:
    """The functions, on statistics taken in two passes."""
    features = features.double()
    counts = torch.bincount(labels, minlength=C)
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(C)])
    centered = features - means[labels]
    within = centered.T @ centered / len(features)
    variances = torch.stack([centered[labels == c].square().sum() / counts[c] for c in range(C)])
    center = means[counts > 0].mean(dim=0)
    pairs = cdnv(means, variances, counts)
    values = {
        "nc1": nc1(means, within, counts),
        "nc2_equinorm": nc2_equinorm(means, counts),
        "nc2_equiangular": nc2_equiangular(means, counts),
        "nc2_etf": etf_error(means, counts),
        "nc3": nc3(means, WEIGHT, counts),
        "bias_collapse": bias_collapse(WEIGHT, BIAS, center),
        "cdnv": pairs.mean,
        "cdnv_median": pairs.median,
        "log_cdnv": pairs.mean_log,
        "gnc2": gnc2(means, counts).variance,
        "unc3": unc3(means, WEIGHT, counts),
        "gof_error": gof_error(means, counts),
        "norm_count_slope": norm_count_slope(WEIGHT, counts),
        "norm_count_slope_means": norm_count_slope(means, counts),
        "vci": vci(means, within, counts),
        "minority_cosine": minority_cosine(WEIGHT, counts),
        "minority_norm": minority_norm(WEIGHT, counts),
        "n": len(features),
        "classes": (counts > 0).sum(),
        "missing": (counts == 0).sum(),
        "rare": 0,
        "rank": (counts > 0).sum() - 1,
    }
    return {name: float(value) for name, value in values.items()}


def numbers(measures: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in measures.items()}


def read(metric: NeuralCollapse, *batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    for features, labels in batches:
        metric.update(features, labels)
    return numbers(metric.compute(WEIGHT, BIAS))


def split(pair: tuple[Tensor, Tensor], *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pair[0].split(sizes), pair[1].split(sizes), strict=True))


def near(expected: dict[str, float], rel: float = 1e-9) -> object:
    return pytest.approx(expected, rel=rel, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("noise", [1.0, 1e-4])
def test_any_split_is_everything_at_once(noise: float) -> None:
    pair = labelled(noise=noise, offset=3.0)
    for sizes in ([N], [1, 89], [13, 0, 70, 7]):
        assert read(NeuralCollapse(C, D), *split(pair, *sizes)) == near(reference(*pair), 1e-7)


def test_without_the_classifier() -> None:
    pair = labelled()
    metric = NeuralCollapse(C, D)
    read(metric, pair)
    expected = reference(*pair)
    assert numbers(metric.compute()) == near(expected | dict.fromkeys(OF_THE_CLASSIFIER, math.nan))
    # what was computed without the weight is not what is computed with it
    assert numbers(metric.compute(WEIGHT, BIAS)) == near(expected)
    assert numbers(metric.compute(WEIGHT))["nc3"] == pytest.approx(expected["nc3"])


def test_a_classifier_in_half_precision() -> None:
    pair, half = labelled(), WEIGHT.bfloat16()
    metric = NeuralCollapse(C, D)
    read(metric, pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = numbers(metric.compute(half, BIAS.bfloat16()))
    assert found == near(numbers(metric.compute(half.double(), BIAS.bfloat16().double())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features(dtype: torch.dtype) -> None:
    features, labels = labelled()
    half = features.to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert read(NeuralCollapse(C, D), *split((half, labels), 40, 50)) == near(reference(half, labels))


def test_rows_that_cannot_be_counted() -> None:
    features, labels = labelled()
    features[4], features[5, 0] = torch.nan, torch.inf
    labels[6], labels[7], labels[8] = -100, C, -3
    keep = [i for i in range(N) if i not in range(4, 9)]
    metric = NeuralCollapse(C, D)
    assert read(metric, *split((features, labels), 6, 84)) == near(reference(features[keep], labels[keep]))
    assert [metric.nonfinite, metric.ignored, metric.invalid] == [2, 1, 2]


def test_classes_of_few_rows_are_left_out_and_counted() -> None:
    features, labels = labelled()
    features, labels = torch.cat([features, 9 + features[:1]]), torch.cat([labels, torch.tensor([3])])
    few, metric = labels == 3, NeuralCollapse(C, D, min_count=2)
    # one row is its own mean: the others are what they are without it
    expected = reference(features[~few], labels[~few]) | {"missing": 0, "rare": 1}
    assert read(metric, *split((features, labels), 41, 50)) == near(expected)
    metric.update(features[few] + torch.eye(1, D), labels[few])
    assert metric.compute()["rare"] == 0
    # of two rows the scatter stays in the shape of the whole, and its size is taken off
    strict = NeuralCollapse(C, D, min_count=3)
    strict.merge_state(metric)
    found = read(strict)
    assert found["nc1"] == pytest.approx(expected["nc1"], rel=0.02)
    moments = metric.moments()
    moments.update(features[few] + 40 * torch.eye(1, D), labels[few])  # now a fourth of all scatter, and of three rows
    four = NeuralCollapse(C, D, min_count=4)
    four.merge_state(moments.states())
    kept, traces = moments.count >= 4, moments.within_traces
    share = traces[kept].sum() / traces.sum()
    assert share < 0.8
    within = share * moments.within_scatter / moments.count[kept].sum()
    pooled = nc1(moments.means[kept], within, moments.count[kept]).item()
    assert four.compute()["nc1"].item() == pytest.approx(pooled, rel=1e-9)
    exact = ("nc2_equinorm", "nc2_equiangular", "nc2_etf", "nc3", "cdnv", "cdnv_median", "n", "classes", "rare", "rank")
    assert {name: found[name] for name in exact} == near({name: expected[name] for name in exact})
    all_rare = NeuralCollapse(C, D, min_count=N)
    found = read(all_rare, (features, labels))
    assert [found["classes"], found["rare"], found["n"]] == [0, 5, 0]
    assert all(math.isnan(found[name]) for name in ("nc1", "nc3", "cdnv", "vci"))


def test_total_collapse() -> None:
    # every feature on its class mean, and the means on a simplex
    corners = torch.eye(C, D, dtype=torch.float64)
    features, labels = corners.repeat(4, 1), torch.arange(C).repeat(4)
    metric = NeuralCollapse(C, D)
    metric.update(features, labels)
    found = numbers(metric.compute(3 * (corners - corners.mean(dim=0))))
    for name in ("nc1", "nc2_equinorm", "nc2_equiangular", "nc2_etf", "nc3", "cdnv", "cdnv_median", "vci"):
        assert found[name] == pytest.approx(0, abs=1e-12)
    assert [found[name] for name in ("n", "classes", "missing", "rank")] == [20, 5, 0, 4]


@pytest.mark.parametrize("value", [1e3, 0.1, 0.0])
def test_complete_collapse_is_undefined(value: float) -> None:
    metric = NeuralCollapse(C, D)
    for labels in torch.arange(20).remainder(C).split(6):
        metric.update(torch.full((len(labels), D), value), labels)
    found = numbers(metric.compute(WEIGHT))
    for name in ("nc1", "nc2_equinorm", "nc2_equiangular", "nc2_etf", "nc3", "cdnv"):
        assert math.isnan(found[name]), name
    assert found["rank"] == 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_no_rows_and_nothing_but_nan() -> None:
    metric = NeuralCollapse(C, D)
    for _ in range(2):
        found = numbers(metric.compute(WEIGHT))
        assert all(math.isnan(found[name]) for name in ("nc1", "nc2_etf", "nc3", "cdnv", "vci", "nc2_equinorm"))
        assert [found["n"], found["classes"], found["missing"]] == [0, 0, C]
        metric.update(torch.full((4, D), torch.nan), torch.arange(4))
    assert metric.nonfinite == 8
    features, labels = labelled()
    metric.reset()
    metric.update(features * 1e200, labels)  # their squares overflow
    assert math.isnan(numbers(metric.compute())["nc1"])


def test_reset_pickle_and_clone() -> None:
    first, second = split(labelled(), 30, 60)
    metric = NeuralCollapse(C, D)
    read(metric, first)
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert read(copy, second) == near(reference(*labelled()))
    assert numbers(metric.compute(WEIGHT, BIAS))["n"] == 30
    metric.reset()
    assert read(metric, second) == near(reference(*second))
    metric.reset()  # the defaults were not written to
    assert not any(state.any() for state in metric.metric_state.values())


def test_checkpoint() -> None:
    first, second = split(labelled(), 30, 60)
    metric = NeuralCollapse(C, D)
    read(metric, first)
    assert metric.state_dict() == {}
    metric.persistent(True)
    restored = NeuralCollapse(C, D)
    restored.persistent(True)
    restored.load_state_dict(pickle.loads(pickle.dumps(metric.state_dict())))
    assert read(restored, second) == near(reference(*labelled()))


def test_merge_state() -> None:
    first, second = labelled(), labelled(seed=1, offset=2.0)
    expected = reference(*(torch.cat(parts) for parts in zip(first, second, strict=True)))
    for form in (lambda metric: metric, lambda metric: metric.metric_state):
        metric, other, new = (NeuralCollapse(C, D) for _ in range(3))
        read(metric, first)
        read(other, *split(second, 20, 70))
        metric.merge_state(form(other))
        assert numbers(metric.compute(WEIGHT, BIAS)) == near(expected)
        new.merge_state(form(other))
        assert numbers(new.compute(WEIGHT, BIAS)) == near(reference(*second))
        assert other.compute()["n"] == N
    for wrong in (NeuralCollapse(C, D + 1), NeuralCollapse(C + 1, D), {}):
        with pytest.raises(ValueError, match="`incoming_state` must be a `NeuralCollapse` metric"):
            metric.merge_state(wrong)


def test_forward_reads_the_batch_and_keeps_everything() -> None:
    metric = NeuralCollapse(C, D)
    batches = split(labelled(), 40, 50)
    for features, labels in batches:
        expected = reference(features, labels) | dict.fromkeys(OF_THE_CLASSIFIER, math.nan)
        assert numbers(metric(features, labels)) == near(expected)
    assert numbers(metric.compute(WEIGHT, BIAS)) == near(reference(*labelled()))


def test_in_a_collection() -> None:
    collection = MetricCollection({"a": NeuralCollapse(C, D), "b": NeuralCollapse(C, D)})
    for features, labels in split(labelled(), 40, 50):
        collection.update(features, labels)
    expected = reference(*labelled())
    found = collection.compute()
    assert found
    for name, value in found.items():
        base = name.removeprefix("a_").removeprefix("b_")
        if base not in OF_THE_CLASSIFIER:
            assert value.item() == pytest.approx(expected[base], rel=1e-9)
    collection.update(*labelled())
    assert collection["a"].moments().count.sum() == collection["b"].moments().count.sum() == 2 * N


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, C)
        self.metric = NeuralCollapse(C, D)
        self.agreement = NearestClassCenterAgreement(WEIGHT)


def test_a_model_in_half_precision_leaves_the_sums_alone() -> None:
    pair = labelled()
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half()):
        lit = convert(Lit())
        assert lit.head.weight.dtype in (torch.float16, torch.bfloat16)
        assert read(lit.metric, *split(pair, 40, 50)) == near(reference(*pair))
        assert torch.equal(lit.agreement.means, WEIGHT)
        assert set(lit.state_dict()) == {"head.weight", "head.bias"}


def test_no_graph_is_kept() -> None:
    features, labels = labelled()
    metric = NeuralCollapse(C, D)
    metric.update(features.requires_grad_(), labels)
    assert not any(state.requires_grad for state in metric.metric_state.values())


def test_sums_in_single_precision() -> None:
    pair = labelled(noise=1e-4)
    metric = NeuralCollapse(C, D, dtype=torch.float32)
    features = pair[0].float()
    found = read(metric, *split((features, pair[1]), 40, 50))
    assert metric.moments().second.dtype == torch.float32
    assert found == pytest.approx(reference(features, pair[1]), rel=1e-3, abs=1e-6)


def test_agreement_is_one_minus_nc4() -> None:
    features, labels = labelled()
    logits = features @ WEIGHT.T + BIAS
    counts = torch.bincount(labels, minlength=C)
    means = WEIGHT.clone()
    means[3] = torch.nan
    expected = 1 - nc4(features, logits, means, counts).item()
    assert 0 < expected < 1
    assert expected != 1 - nc4(features, logits - BIAS, means, counts).item()  # the bias matters
    early, late = NearestClassCenterAgreement(means, counts), NearestClassCenterAgreement()
    for x, z in zip(features.split([50, 0, 40]), logits.split([50, 0, 40]), strict=True):
        early.update(x, z)
        late.update(x, z, means, counts)
    other = pickle.loads(pickle.dumps(early))
    for metric in (early, late, other):
        assert metric.compute().item() == pytest.approx(expected, rel=1e-12)
        assert metric.count == N
    early.merge_state(other)
    assert early.count == 2 * N
    early.reset()
    early.update(features[:5], logits[:5])  # the means are still there
    assert early.count == 5


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_agreement_of_nothing() -> None:
    metric = NearestClassCenterAgreement(WEIGHT)
    assert metric.compute().isnan()
    metric.update(torch.full((3, D), torch.nan), torch.zeros(3, C))
    assert metric.compute().isnan()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`num_classes` must be at least 2, got 1"):
        NeuralCollapse(1, D)
    with pytest.raises(ValueError, match="`dim` is the number of features and must be positive, got 0"):
        NeuralCollapse(C, 0)
    with pytest.raises(ValueError, match="`min_count` is a number of rows and must be positive, got 0"):
        NeuralCollapse(C, D, min_count=0)
    for soft in (torch.rand(3), torch.rand(3) > 0.5):
        with pytest.raises(ValueError, match="Mixed or soft targets name no class"):
            NeuralCollapse(C, D).update(torch.zeros(3, D), soft)
    with pytest.raises(ValueError, match="Expected `features` of shape"):
        NeuralCollapse(C, D).update(torch.zeros(3, D + 1), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="`means` must be given"):
        NearestClassCenterAgreement().update(torch.zeros(3, D), torch.zeros(3, C))
