"""Losses that take labels: what the battery of the others asks, asked of features or logits with their classes."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from lightning_collapse import losses
from lightning_collapse.layers import ETFClassifier, HAFrameClassifier, VBLLClassifier
from lightning_collapse.losses import (
    VBLL,
    AntiCollapseLoss,
    BalancedSoftmax,
    DotRegression,
    HAFrameLoss,
    LongTailCollapse,
    TooFewRowsError,
    label_smoothing_terms,
    long_tail_collapse_terms,
)
from lightning_collapse.utilities.registry import LOSSES
from tests.distributed.launch import spawn
from tests.losses.contrasts import CONTRASTS

CLASSES, DIM, ROWS = 4, 6, 17
SIZES = [40, 10, 5, 1]
LABELS = torch.tensor([0, 0, 0, 1, 0, 2, 0, 1, -100, 0, 2, 0, 0, 1, 0, -1, 0])  # none of the last class
COUNTED = (LABELS >= 0) & (LABELS < CLASSES)


class LabelSmoothing(AntiCollapseLoss):
    """The parts of label smoothing as a loss."""

    takes_labels = "classes"

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = {"cross_entropy": 1.0, "regularization": 0.1, "error_amplification": 0.1}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        return label_smoothing_terms(*views)

    value_at_collapse = math.log(CLASSES)


def long_tail() -> LongTailCollapse:
    loss = LongTailCollapse(CLASSES, DIM)
    means = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1))
    loss.means.data.copy_(means)
    return loss


def variational(covariance: str = "diagonal") -> VBLL:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return VBLL(VBLLClassifier(DIM, CLASSES, covariance), train_rows=100)


def softmax(row: np.ndarray) -> np.ndarray:
    return np.exp(row) / np.exp(row).sum()


def naive_long_tail(h: np.ndarray, y: np.ndarray, loss: Any) -> float:
    means = loss.means.detach().double().numpy()
    within = 0.0
    for c in range(CLASSES):
        rows = h[y == c]
        if len(rows):
            within += sum(((row - means[c]) ** 2).sum() for row in rows) / len(rows) / CLASSES
    between = 0.0
    centered = means - means.mean(axis=0)
    for c in range(CLASSES):
        cosines = [
            centered[c] @ centered[k] / np.linalg.norm(centered[c]) / np.linalg.norm(centered[k])
            for k in range(CLASSES)
            if k != c
        ]
        between -= np.arccos(max(cosines)) / CLASSES
    return 0.01 * within + 0.1 * between


def naive_dot_regression(h: np.ndarray, y: np.ndarray, loss: Any) -> float:
    prototypes = loss.classifier.weight.double().numpy()
    named = [i for i in range(len(y)) if 0 <= y[i] < CLASSES]
    present = {int(y[i]) for i in named}
    total = 0.0
    for i in named:
        m = prototypes[y[i]]
        if loss.lengths == "batch":
            m = m * np.sqrt(len(named) / len(present) / sum(y[j] == y[i] for j in named))
        length = np.linalg.norm(h[i])
        total += (h[i] @ m - length * np.linalg.norm(m)) ** 2 / length / 2
    return total / len(named)


def naive_balanced(z: np.ndarray, y: np.ndarray, loss: Any) -> float:
    values = []
    for row, label in zip(z, y, strict=True):
        if 0 <= label < CLASSES:
            weighted = np.array(SIZES) * np.exp(row)
            values.append(-np.log(weighted[label] / weighted.sum()))
    return float(np.mean(values))


def naive_frame(h: np.ndarray, y: np.ndarray, loss: Any) -> float:
    w = loss.classifier.weight.double().numpy()
    values = []
    for row, label in zip(h, y, strict=True):
        if 0 <= label < CLASSES:
            cosines = w @ row / np.linalg.norm(row)
            error = sum((cosines[c] - w[label] @ w[c]) ** 2 for c in range(CLASSES))
            values.append(-0.6 * np.log(softmax(w @ row)[label]) + 0.4 * error)
    return float(np.mean(values))


def naive_variational(h: np.ndarray, y: np.ndarray, loss: Any) -> float:
    """Written with whole covariances, and the divergence as torch knows it."""
    head = loss.head
    mean, diagonal, noise = (p.detach().double() for p in (head.mean, head.log_diagonal.exp(), head.log_noise.exp()))
    factor = torch.diag_embed(diagonal)
    if head.below is not None:
        factor = factor + head.below.detach().double().tril(-1)
    posterior = torch.distributions.MultivariateNormal(mean, scale_tril=factor)
    prior = torch.distributions.MultivariateNormal(torch.zeros(DIM).double(), 2 / DIM * torch.eye(DIM).double())
    divergence = torch.distributions.kl_divergence(posterior, prior).sum().item()
    covariances, variances = (factor @ factor.mT).numpy(), noise.square().numpy()
    wishart = (CLASSES + 2) / 2 * np.log(1 / variances).sum() - 0.5 * (1 / variances).sum()
    values = []
    for row, label in zip(h, y, strict=True):
        if 0 <= label < CLASSES:
            logits = mean.numpy() @ row
            v = np.array([row @ covariances[k] @ row + variances[k] for k in range(CLASSES)])
            values.append(logits[label] - np.log(np.exp(logits + v / 2).sum()))
    return float(-np.mean(values) + (divergence - wishart) / 100)


def naive_smoothing(z: np.ndarray, y: np.ndarray, loss: Any) -> float:
    values = []
    for row, label in zip(z, y, strict=True):
        if 0 <= label < CLASSES:
            target = np.full(CLASSES, 0.1 / CLASSES)
            target[label] += 0.9
            values.append(-(target * np.log(softmax(row))).sum())
    return float(np.mean(values))


@dataclass(frozen=True)
class Case:
    """A loss that takes labels, in the battery.

    Attributes:
        make: A loss whose parameters are the same at every call.
        reference: From arrays of rows and labels and the loss to its value, written from the paper.
        width: Columns of its input.
        messages: All-reduces of a forward pass.
        detached: Whether part of what depends on the input carries no gradient, so that gradcheck does not apply.
        views: How many it takes.
        labels: Of the rows.
        counted: Which rows count.
    """

    make: Callable[[], AntiCollapseLoss]
    reference: Callable[[np.ndarray, np.ndarray, Any], float]
    width: int
    messages: int = 1
    detached: bool = False
    views: int = 1
    labels: Tensor = field(default_factory=lambda: LABELS)
    counted: Tensor = field(default_factory=lambda: COUNTED)

    @property
    def targets(self) -> bool:
        return self.labels.is_floating_point()


CASES = {
    "BalancedSoftmax": Case(lambda: BalancedSoftmax(SIZES), naive_balanced, CLASSES),
    "DotRegression": Case(lambda: DotRegression(ETFClassifier(DIM, CLASSES)), naive_dot_regression, DIM, detached=True),
    "DotRegression-batch": Case(
        lambda: DotRegression(ETFClassifier(DIM, CLASSES), "batch"), naive_dot_regression, DIM, 2, detached=True
    ),
    "HAFrameLoss": Case(
        lambda: HAFrameLoss(HAFrameClassifier((torch.arange(4.0) - torch.arange(4.0)[:, None]).abs(), DIM)),
        naive_frame,
        DIM,
    ),
    "LabelSmoothing": Case(LabelSmoothing, naive_smoothing, CLASSES),
    "LongTailCollapse": Case(long_tail, naive_long_tail, DIM, 2),
    "VBLL": Case(variational, naive_variational, DIM),
    **{
        name: Case(make, reference, DIM, messages, views=views, labels=labels, counted=counted)
        for name, (make, reference, messages, views, labels, counted) in CONTRASTS.items()
    },
}
PLAIN = [name for name in CONTRASTS if "-" not in name]  # the same graph, but for a number or a branch
TWO = [name for name, case in CASES.items() if case.views == 2]
every_loss = pytest.mark.parametrize("name", CASES)
every_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def rows(name: str, dtype: torch.dtype = torch.float64, scale: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(ROWS, CASES[name].width, generator=generator, dtype=torch.float64)).to(dtype)


def inputs(name: str, dtype: torch.dtype = torch.float64, scale: float = 0.5) -> list[Tensor]:
    """One view, or two that are near each other."""
    view = rows(name, torch.float64, scale)
    return [(view + 0.7 * scale * i * view.roll(1, 0)).to(dtype) for i in range(CASES[name].views)]


def evaluate(name: str, features: list[Tensor], labels: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Loss, and its gradients with respect to the features and to its own parameters."""
    loss, leaves = CASES[name].make(), [view.detach().clone().requires_grad_() for view in features]
    value = loss(*leaves, CASES[name].labels if labels is None else labels)
    value.backward()
    return value.detach(), [z.grad for z in (*leaves, *loss.parameters())]


def test_every_loss_is_in_one_battery() -> None:
    known = {getattr(losses, name) for name in losses.__all__}
    classes = {c for c in known if isinstance(c, type) and issubclass(c, AntiCollapseLoss)} - {AntiCollapseLoss}
    labelled = {c for c in classes if c.takes_labels}
    assert labelled == {type(case.make()) for case in CASES.values()} - {LabelSmoothing}
    others = {c for c in LOSSES.values() if c.__module__.startswith("lightning_collapse")}
    assert classes - labelled == others | {losses.SDC}  # of two widths, and without a gradient of the first


@every_loss
def test_value_is_the_reference(name: str) -> None:
    case = CASES[name]
    views = inputs(name)
    expected = case.reference(*(view.numpy() for view in views), case.labels.numpy(), case.make())
    loss = case.make().double()
    assert loss(*views, case.labels).item() == pytest.approx(expected, rel=1e-6)  # classifiers are made in `float32`
    narrow = case.labels.float() if case.targets else case.labels.int()
    assert case.make()(*inputs(name, torch.float32), narrow).item() == pytest.approx(expected, rel=1e-5)


@every_loss
def test_loss_is_the_weighted_sum_of_its_terms(name: str) -> None:
    loss, everything = CASES[name].make(), (*inputs(name), CASES[name].labels)
    terms = loss.terms(*everything)
    assert list(terms) == list(loss.coefficients)
    assert all(term.ndim == 0 for term in terms.values())
    expected = sum(loss.coefficients[key] * term.item() for key, term in terms.items())
    assert loss(*everything).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.detached])
def test_gradcheck(name: str) -> None:
    loss = CASES[name].make().double()
    names, case = [key for key, _ in loss.named_parameters()], CASES[name]

    def value(*leaves: Tensor) -> Tensor:
        views, parameters = leaves[: case.views], leaves[case.views :]
        return functional_call(loss, dict(zip(names, parameters, strict=True)), (*views, case.labels))

    leaves = [
        *(view.requires_grad_() for view in inputs(name)),
        *(p.detach().clone().requires_grad_() for p in loss.parameters()),
    ]
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves, fast_mode=True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.detached])
def test_a_second_derivative_that_would_lack_a_part_is_refused(name: str) -> None:
    leaf = rows(name).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(CASES[name].make()(leaf, LABELS), leaf, create_graph=True)


@pytest.mark.parametrize("lengths", ["equal", "batch"])
def test_gradient_of_dot_regression_pulls_along_the_prototype(lengths: str) -> None:
    classifier = ETFClassifier(DIM, CLASSES).double()
    h = classifier.embed(rows("DotRegression")).requires_grad_()
    DotRegression(classifier, lengths)(h, LABELS).backward()
    counts = torch.bincount(LABELS[COUNTED], minlength=CLASSES)
    scale = (counts.sum() / (counts > 0).sum() / counts).sqrt() if lengths == "batch" else torch.ones(CLASSES)
    for row, grad, label in zip(h.detach()[COUNTED], h.grad[COUNTED], LABELS[COUNTED], strict=True):
        target = classifier.weight[label]
        expected = -(1 - row @ target) * scale[label] ** 2 * target / COUNTED.sum()
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)


@every_loss
def test_gradient_reaches_every_row_that_counts(name: str) -> None:
    case, (_, grads) = CASES[name], evaluate(name, inputs(name))
    for grad in grads[: case.views]:
        assert (grad[case.counted].norm(dim=1) > 1e-6).all()
        assert (grad[~case.counted] == 0).all()


@every_loss
@pytest.mark.parametrize("value", [0.0, 3.0, 1e-6, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_on_constant_batches(name: str, value: float, dtype: torch.dtype) -> None:
    case = CASES[name]
    nameless = torch.full((ROWS,), torch.nan) if case.targets else torch.full((ROWS,), -100)
    for labels in (case.labels, nameless, torch.zeros_like(case.labels)):
        loss, grads = evaluate(name, [torch.full((ROWS, case.width), value, dtype=dtype)] * case.views, labels)
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)


@every_loss
def test_tiny_batch(name: str) -> None:
    labels = CASES[name].labels
    loss, grads = evaluate(name, [view[:1] for view in inputs(name)], labels[:1])
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    with pytest.raises(TooFewRowsError, match="at least 1 row over all processes, got 0"):
        evaluate(name, [view[:0] for view in inputs(name)], labels[:0])


@every_loss
@every_half
def test_half_precision_with_and_without_autocast(name: str, dtype: torch.dtype) -> None:
    features = inputs(name, dtype)
    exact, _ = evaluate(name, [view.double() for view in features])
    off, grads_off = evaluate(name, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        on, grads_on = evaluate(name, features)  # also the backward pass under autocast
    assert off.dtype == on.dtype == torch.float32
    assert torch.equal(on, off)
    assert all(map(torch.equal, grads_on, grads_off))
    assert off.item() == pytest.approx(exact.item(), rel=1e-5)


@every_loss
def test_large_half_features_stay_finite(name: str) -> None:
    loss, grads = evaluate(name, inputs(name, torch.float16, scale=16.0))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", [name for name in CASES if name.split("-")[0] not in CONTRASTS or name in PLAIN])
def test_compiles_without_a_graph_break(name: str) -> None:
    leaves, labels = [view.requires_grad_() for view in inputs(name, torch.float32)], CASES[name].labels
    expected, grads = evaluate(name, leaves)
    loss = CASES[name].make()
    torch.compiler.reset()  # Dynamo counts how often it compiled this line
    torch.compile(lambda *z: loss(*z), backend="aot_eager", fullgraph=True)(*leaves, labels).backward()
    for found, grad in zip([z.grad for z in (*leaves, *loss.parameters())], grads, strict=True):
        torch.testing.assert_close(found, grad)
    torch.testing.assert_close(loss(*leaves, labels).detach(), expected)


@every_loss
def test_bad_input(name: str) -> None:
    case, good = CASES[name], inputs(name)
    loss, labels = case.make(), case.labels
    with pytest.raises(ValueError, match=r"must be floating point of shape \(N, D\), got .* \(1, 17, \d\). Flatten"):
        loss(*(view.unsqueeze(0) for view in good), labels)
    with pytest.raises(ValueError, match=r"must have shape \(17,\), one per row, got \(3,\)"):
        loss(*good, labels[:3])
    kind = "real numbers" if case.targets else "integers"
    for wrong in (labels + 0j, labels > 0) if case.targets else (labels.float(), labels > 0):
        with pytest.raises(ValueError, match=rf"must be {kind}, got {wrong.dtype}."):
            loss(*good, wrong)
    with pytest.raises(ValueError, match=f"takes {case.views} feature matrices and their labels, got {case.views}"):
        loss(*good)
    if name not in CONTRASTS:  # those take any number of classes
        with pytest.raises(ValueError, match=r"must be below 4, .* got 7.*labels == 7, -100, labels"):
            loss(*good, torch.where(labels == 2, 7, labels))
    if name in TWO:
        with pytest.raises(ValueError, match="must have one shape"):
            loss(good[0], good[1][:, :2], labels)
    elif name in ("LongTailCollapse", "BalancedSoftmax"):  # others take any number of classes
        with pytest.raises(ValueError, match=r"as wide as|a column for each"):
            loss(good[0][:, :2], labels)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`num_classes` must be an integer of at least 2, got 1"):
        LongTailCollapse(1, 8)
    with pytest.raises(ValueError, match=r"`lengths` must be one of \('equal', 'batch'\), got 'x'"):
        DotRegression(ETFClassifier(8, 3), "x")
    for classifier in (torch.nn.Linear(8, 3), torch.nn.ReLU()):
        with pytest.raises(ValueError, match=r"must have a fixed `weight` of shape .* Use `ETFClassifier`"):
            DotRegression(classifier)
    with pytest.raises(ValueError, match=r"must have a fixed `weight` of shape .* Use `HAFrameClassifier`"):
        HAFrameLoss(torch.nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"`mixing` must be between 0 and 1, got 1\.5"):
        HAFrameLoss(ETFClassifier(8, 3), mixing=1.5)
    with pytest.raises(ValueError, match="`head` must be a `VBLLClassifier` or a `VBLLRegression`, got Linear"):
        VBLL(torch.nn.Linear(8, 3), 10)
    with pytest.raises(ValueError, match="`train_rows` must be an integer of at least 1, got 0"):
        VBLL(VBLLClassifier(8, 3), 0)
    for counts in ([3.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="`class_counts` must hold the sizes of two classes or more"):
            BalancedSoftmax(counts)


def test_class_counts_may_be_a_tensor(recwarn: pytest.WarningsRecorder) -> None:
    counts = torch.bincount(torch.tensor([0, 0, 2]))
    loss = BalancedSoftmax(counts)
    assert not recwarn
    counts.zero_()  # a copy is kept
    assert torch.equal(loss.class_counts, BalancedSoftmax([2, 0, 1]).class_counts)


@every_loss
def test_it_prints_its_arguments(name: str) -> None:
    expected = {
        "BalancedSoftmax": "class_counts=[40.0, 10.0, 5.0, 1.0]",
        "DotRegression": "lengths='equal'",
        "DotRegression-batch": "lengths='batch'",
        "HAFrameLoss": "mixing=0.4",
        "LongTailCollapse": "num_classes=4, dim=6, within=0.01, between=0.1",
        "VBLL": "train_rows=100",
        "SupCon-joint": "temperature=0.5, beta=0.25, form='in'",
        "SpreadLoss": "temperature=0.5, attract=0.25, spread=0.75",
        "BatchHardTriplet-margin": "margin=0.7",
        "ConR": "weight=4.0, window=1.0, temperature=0.07, slope=0.01",
    }
    assert expected.get(name, "") in repr(CASES[name].make())


def test_ends_of_dot_regression() -> None:
    for classes in (2, 4, 10):
        classifier = ETFClassifier(classes - 1, classes).double()
        loss, labels = DotRegression(classifier), torch.arange(classes)
        assert loss(7 * classifier.weight, labels).item() == pytest.approx(loss.value_at_perfection, abs=1e-12)
        point = classifier.embed(torch.randn(1, classes - 1, dtype=torch.float64)).expand(classes, -1)
        assert loss(point, labels).item() == pytest.approx(loss.value_at_collapse, rel=1e-6)
    balanced = DotRegression(classifier, "batch")  # balanced classes: the same
    torch.testing.assert_close(balanced(point, labels), loss(point, labels))


def test_ends_of_the_frame() -> None:
    loss = CASES["HAFrameLoss"].make().double()
    aligned = loss.terms(50 * loss.classifier.weight, torch.arange(CLASSES))
    assert aligned["cosines"].item() == pytest.approx(0, abs=1e-12)
    zeros = loss(torch.zeros(CLASSES, DIM).double(), torch.arange(CLASSES))
    assert zeros.item() == pytest.approx(loss.value_at_collapse, rel=1e-6)


def test_dense_covariances_are_the_reference() -> None:
    loss = variational("dense").double()
    with torch.no_grad():
        loss.head.below.normal_(0, 0.3)
    features = rows("VBLL")
    expected = naive_variational(features.numpy(), LABELS.numpy(), loss)
    assert loss(features, LABELS).item() == pytest.approx(expected, rel=1e-9)
    head = loss.head
    factor = head.below.tril(-1) + head.log_diagonal.exp().diag_embed()
    expected = torch.stack([(features @ (f @ f.T) * features).sum(dim=1) for f in factor], dim=1)
    torch.testing.assert_close(head.variance(features), expected + (2 * head.log_noise).exp())


@pytest.mark.parametrize("classes", [3, 10])
def test_ends_of_long_tail_collapse(classes: int) -> None:
    loss = LongTailCollapse(classes, classes + 2).double()
    labels = torch.arange(classes).repeat_interleave(torch.arange(1, classes + 1))
    # on a simplex, wherever it is
    loss.means.data.copy_(3 * ETFClassifier(classes + 2, classes).double().weight + 5)
    value = loss(loss.means.detach()[labels], labels)
    assert value.item() == pytest.approx(loss.value_at_perfection, rel=1e-6)
    assert loss.value_at_perfection == pytest.approx(-0.1 * math.acos(-1 / (classes - 1)))
    if classes == 10:
        assert loss.terms(loss.means.detach()[labels], labels)["between"].item() == pytest.approx(-1.6821, abs=1e-4)
    loss.means.data.fill_(5.0)
    collapsed = loss(torch.full((len(labels), classes + 2), 5.0), labels)
    collapsed.backward()
    assert collapsed.item() == pytest.approx(loss.value_at_collapse, abs=1e-12)
    assert loss.means.grad.isfinite().all()


def test_means_that_nearly_coincide_part() -> None:
    means = torch.eye(4, dtype=torch.float64)
    means[1] = means[0] + 1e-6 * torch.tensor([0.0, 1.0, 0.0, 0.0])
    means.requires_grad_()
    before = -long_tail_collapse_terms(torch.zeros(1, 4), torch.tensor([0]), means)["between"]
    (grad,) = torch.autograd.grad(before, means)
    assert grad[:2].norm() > 0.1  # which the published clamp sets to zero
    after = -long_tail_collapse_terms(torch.zeros(1, 4), torch.tensor([0]), means + 1e-3 * grad)["between"]
    assert after > before


def test_features_feel_the_distance_of_the_means_only_through_them() -> None:
    loss = long_tail()
    h = rows("LongTailCollapse").float().requires_grad_()
    terms = loss.terms(h, LABELS)
    (grad,) = torch.autograd.grad(terms["between"], h, allow_unused=True)
    assert grad is None
    # every class that is there pulls alike, whatever its size
    (pull,) = torch.autograd.grad(terms["within"], h)
    for c in range(3):
        mine = torch.eq(LABELS, c)
        expected = 2 * (h.detach()[mine] - loss.means.detach()[c]) / mine.sum() / CLASSES
        torch.testing.assert_close(pull[mine], expected)


def test_ends_of_balanced_softmax() -> None:
    loss = BalancedSoftmax(SIZES)
    assert loss(1e4 * torch.eye(CLASSES), torch.arange(CLASSES)).item() == loss.value_at_perfection
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(SIZES))
    assert loss(torch.full((len(labels), CLASSES), 3.0), labels).item() == pytest.approx(loss.value_at_collapse)
    assert loss.value_at_collapse == pytest.approx(-sum(n / 56 * math.log(n / 56) for n in SIZES))
    z = rows("BalancedSoftmax")
    plain = torch.nn.functional.cross_entropy(z[COUNTED], LABELS[COUNTED])
    torch.testing.assert_close(BalancedSoftmax([7, 7, 7, 7])(z, LABELS), plain)


def test_a_class_of_size_zero_is_left_out() -> None:
    z = rows("BalancedSoftmax").requires_grad_()
    value = BalancedSoftmax([40, 0, 5, 1])(z, LABELS)
    (grad,) = torch.autograd.grad(value, z)
    kept = COUNTED & (LABELS != 1)
    expected = BalancedSoftmax([40, 5, 1])(z[:, [0, 2, 3]][kept], torch.tensor([0, -1, 1])[LABELS[kept]])
    torch.testing.assert_close(value, expected)
    assert (grad[LABELS == 1] == 0).all()
    assert (grad[:, 1] == 0).all()


def weight_and_loss(name: str) -> tuple[AntiCollapseLoss, Tensor]:
    width = CASES[name].width
    return CASES[name].make(), torch.randn(width, width, generator=torch.Generator().manual_seed(2)).requires_grad_()


def value_and_gradient(name: str, part: slice) -> tuple[Tensor, Tensor]:
    """Loss on a part of the batch, and the gradient of a layer before it and of its own parameters in one vector."""
    loss, weight = weight_and_loss(name)
    value = loss(*(view[part] @ weight for view in inputs(name, torch.float32)), CASES[name].labels[part])
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in (weight, *loss.parameters())])


def messages(name: str) -> int:
    """How many all-reduces a forward pass takes."""
    sent = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: sent.append(1) or all_reduce(*args, **kwargs)
    try:
        CASES[name].make()(*inputs(name), CASES[name].labels)
    finally:
        dist.all_reduce = all_reduce
    return len(sent)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result: dict[str, Any] = {}
    for name in CASES:
        for first in (5, 0):  # uneven, and all on one process
            value, grad = value_and_gradient(name, slice(0, first) if rank == 0 else slice(first, None))
            dist.all_reduce(grad)
            result[f"{name}-{first}"] = value, grad / 2
        result[f"{name}-messages"] = messages(name)
        with pytest.raises(TooFewRowsError, match="at least 1 row over all processes, got 0"):
            CASES[name].make()(*(view[:0] for view in inputs(name)), CASES[name].labels[:0])
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@every_loss
@pytest.mark.parametrize("first", [5, 0])
def test_two_processes_are_one(name: str, first: int, ranks: list[dict[str, Any]]) -> None:
    expected, reference = value_and_gradient(name, slice(None))
    for result in ranks:
        value, grad = result[f"{name}-{first}"]
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert ((grad * reference).sum() / reference.square().sum()).item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())
        assert result[f"{name}-messages"] == CASES[name].messages
    assert torch.equal(ranks[0][f"{name}-{first}"][0], ranks[1][f"{name}-{first}"][0])
