"""One battery over every registered loss, against an independent reference in ``float64``."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse import losses
from lightning_collapse.functional import effective_rank
from lightning_collapse.losses import AntiCollapseLoss, CovarianceLoss, VarianceLoss, VICReg, covariance_loss
from lightning_collapse.spectral import singular_values
from lightning_collapse.utilities.registry import LOSSES
from tests.losses.cases import CASES
from tests.losses.cases.base import Shape
from tests.losses.cases.vicreg import naive_covariance, naive_variance

every_loss = pytest.mark.parametrize("name", sorted(LOSSES))
every_shape = pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, id=f"{name}-{side}")
        for name in sorted(LOSSES)
        for side, shape in CASES[name].shapes.items()
    ],
)


def build(name: str) -> AntiCollapseLoss:
    """The loss, with its published defaults wherever they suit small shapes."""
    return LOSSES[name](**CASES[name].arguments)


def views(name: str, shape: Shape, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    """An input at which every row has a gradient."""
    return [(scale * view).to(dtype) for view in CASES[name].active(shape, LOSSES[name].views)]


def some(name: str) -> Shape:
    """One of its shapes."""
    return next(iter(CASES[name].shapes.values()))


def evaluate(name: str, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Loss and its gradients."""
    leaves = [z.detach().clone().requires_grad_() for z in inputs]
    loss = build(name)(*leaves)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


@every_shape
def test_value_is_the_reference(name: str, shape: Shape) -> None:
    inputs = views(name, shape)
    case = CASES[name]
    expected = case.reference(*(z.numpy() for z in inputs))
    assert build(name)(*inputs).item() == pytest.approx(expected, rel=case.rtol)
    assert build(name)(*(z.float() for z in inputs)).item() == pytest.approx(expected, rel=case.rtol_single)


@every_loss
def test_loss_is_the_weighted_sum_of_its_terms(name: str) -> None:
    loss = build(name).eval()  # some draw anew in each training step, or remember
    assert isinstance(loss, AntiCollapseLoss)
    inputs = views(name, some(name))
    terms = loss.terms(*inputs)
    assert list(terms) == list(loss.coefficients)
    assert all(term.ndim == 0 for term in terms.values())
    expected = sum(loss.coefficients[key] * term.item() for key, term in terms.items())
    assert loss(*inputs).item() == pytest.approx(expected, rel=1e-12)
    assert not list(loss.parameters())
    assert not loss.state_dict()


@every_shape
def test_gradcheck(name: str, shape: Shape) -> None:
    if not CASES[name].differentiable:
        pytest.skip("stops a gradient, as published: checked in its own file")
    inputs = [z.requires_grad_() for z in views(name, shape)]
    assert torch.autograd.gradcheck(build(name).eval(), inputs)


TWICE: list[tuple[str, dict[str, Any]]] = [
    ("Alignment", {}),
    ("Alignment", {"alpha": 3.0}),
    ("BarlowTwins", {}),
    ("DeepSVDD", {}),
    ("DeltaVAE", {}),
    ("EffectiveRankHinge", {}),
    ("EffectiveRankHinge", {"momentum": 0.5}),
    ("FreeBits", {}),
    ("GroupEntropy", {}),
    ("INTL", {}),
    ("INTL", {"axis": "features"}),
    ("InfoNCE", {}),
    ("KoLeo", {}),
    ("LogDetBarrier", {}),
    ("LogDetBarrier", {"momentum": 0.5}),
    ("SpectralDecoupling", {}),
    ("TREGS", {}),
    ("VCReg", {"delta": 0.05}),
    ("VarianceLoss", {}),
]
"""Losses that can be differentiated twice, and with which arguments; all others refuse."""


def refuses(name: str, arguments: Any, shape: Shape) -> bool:
    """Whether the loss is to refuse a second derivative."""
    if name == "BarlowTwins" and shape[0] >= shape[1]:
        return True
    return name != "MaxSup" and (name, arguments) not in TWICE


every_twice = pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        pytest.param(name, arguments, shape, id="-".join([name, *arguments, side]))
        for name, arguments in TWICE
        for side, shape in CASES[name].shapes.items()
        if not refuses(name, arguments, shape)
    ],
)


@every_twice
def test_second_derivative(name: str, arguments: Any, shape: Shape) -> None:
    loss = LOSSES[name](**arguments)
    inputs = [z.requires_grad_() for z in views(name, shape)]
    loss(*(0.9 * z for z in inputs))  # some remember
    assert torch.autograd.gradgradcheck(loss.eval(), inputs, atol=1e-6, rtol=1e-3, fast_mode=True)


@every_twice
@pytest.mark.parametrize("factor", [0, 1])
def test_second_derivative_is_finite_where_rows_are_equal(name: str, arguments: Any, shape: Shape, factor: int) -> None:
    inputs = views(name, shape)
    for z in inputs:
        z[:2] = factor * z[0]
        z.requires_grad_()
    grads = torch.autograd.grad(LOSSES[name](**arguments)(*inputs), inputs, create_graph=True)
    along = sum((grad * z.detach().sin()).sum() for grad, z in zip(grads, inputs, strict=True))
    assert all(second.isfinite().all() for second in torch.autograd.grad(along, inputs))


def test_second_derivative_of_transforms() -> None:
    loss, (features,) = VarianceLoss(), views("VarianceLoss", (6, 4))
    expected = torch.autograd.functional.hessian(loss, features)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(features), expected)


def test_what_is_linear_has_no_second_derivative() -> None:
    (inputs,) = (z.requires_grad_() for z in views("MaxSup", (12, 5)))
    (grad,) = torch.autograd.grad(build("MaxSup")(inputs), inputs, create_graph=True)
    assert not grad.requires_grad


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, id=f"{name}-{side}")
        for name in sorted(LOSSES)
        for side, shape in CASES[name].shapes.items()
        if refuses(name, {}, shape)
    ],
)
def test_a_second_derivative_that_would_lack_a_part_is_refused(name: str, shape: Shape) -> None:
    inputs = [z.requires_grad_() for z in views(name, shape)]
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(build(name).eval()(*inputs), inputs, create_graph=True)


@every_shape
def test_gradient_reaches_every_row(name: str, shape: Shape) -> None:
    _, grads = evaluate(name, views(name, shape))
    assert all((grad.norm(dim=1) > 1e-6).all() for grad in grads)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_batch(name: str, dtype: torch.dtype) -> None:
    case, module = CASES[name], build(name)
    for row in (case.row, torch.full((4,), 3.0)):
        loss, grads = evaluate(name, [row.to(dtype).expand(8, 4)] * module.views)
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
    constant = [case.row.to(dtype).expand(8, 4)] * module.views
    for _ in range(case.settle):
        module(*constant)
    assert module(*constant).item() == pytest.approx(module.at_collapse(8, 4), abs=1e-4)


@every_loss
@pytest.mark.parametrize("offset", [50.1, 1000.7])
def test_constant_batch_whose_mean_is_rounded(name: str, offset: float) -> None:
    """In single precision the mean of some such batches is not one of their rows, and what it leaves is no feature."""
    case = CASES[name]
    rows = [(row + offset).float() for row in (case.row, torch.linspace(1, 20, 4))]
    for row, n in itertools.product(rows, (6, 7, 9, 11)):
        single, double = (settled(name, row.to(dtype).expand(n, 4)) for dtype in (torch.float32, torch.float64))
        assert single[0].item() == pytest.approx(double[0].item(), rel=1e-5, abs=1e-6)
        # some take an arbitrary direction here, but none a steeper one
        for grad, exact in zip(single[1], double[1], strict=True):
            assert grad.double().norm() <= 2 * exact.norm() + 1e-5
        if case.shift and row is rows[0]:
            assert single[0].item() == pytest.approx(build(name).at_collapse(n, 4), abs=1e-4)


def settled(name: str, constant: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients once what it remembers is this batch."""
    module = build(name)
    leaves = [constant.detach().clone().requires_grad_() for _ in range(module.views)]
    for _ in range(CASES[name].settle):
        module(*leaves)
    loss = module.eval()(*leaves)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


@every_loss
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_neither_raises_nor_hides(name: str, bad: float) -> None:
    inputs = views(name, some(name))
    inputs[0][1] = bad
    assert not build(name)(*inputs).isfinite()


@every_loss
def test_perfect_batch(name: str) -> None:
    loss = build(name)
    case = CASES[name]
    inputs = case.perfect(loss.views)
    for _ in range(case.settle):
        loss(*inputs)
    assert loss(*inputs).item() == pytest.approx(loss.at_perfection(*inputs[0].shape), abs=case.perfect_atol)


@every_shape
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_and_without_autocast(name: str, shape: Shape, dtype: torch.dtype) -> None:
    inputs = views(name, shape, dtype)
    exact, _ = evaluate(name, [z.double() for z in inputs])
    off, grads_off = evaluate(name, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        on, grads_on = evaluate(name, inputs)  # also the backward pass under autocast
    assert off.dtype == on.dtype == torch.float32
    assert torch.equal(on, off)
    assert all(map(torch.equal, grads_on, grads_off))
    assert off.item() == pytest.approx(exact.item(), rel=CASES[name].rtol_single)


@every_shape
def test_large_half_features_stay_finite(name: str, shape: Shape) -> None:
    loss, grads = evaluate(name, views(name, shape, torch.float16, scale=32.0))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in sorted(LOSSES) if CASES[name].shift for shape in CASES[name].wide]
)
def test_large_mean_changes_nothing(name: str, shape: Shape) -> None:
    centered = [z - z.mean(dim=0) for z in views(name, shape)]
    expected, reference = evaluate(name, centered)
    loss, grads = evaluate(name, [(z + 500.0).float() for z in centered])  # 1000 times the spread
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for grad, exact in zip(grads, reference, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in sorted(LOSSES) for shape in CASES[name].wide])
def test_large_mean(name: str, shape: Shape) -> None:
    inputs = [(z - z.mean(dim=0) + 500.0).float() for z in views(name, shape)]
    expected, reference = evaluate(name, [z.double() for z in inputs])
    loss, grads = evaluate(name, inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    for grad, exact in zip(grads, reference, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


def rank_after_training(loss: nn.Module | None, weight: float) -> float:
    """Effective rank, of 8 at most, of linear features that are to agree on views which share one coordinate of 16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows, encoder = torch.randn(64, 16), nn.Linear(16, 8)
        noise = torch.full((16,), 0.3).index_fill(0, torch.tensor([0]), 0.0)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
        for _ in range(120):
            first, second = (encoder(rows + noise * torch.randn(64, 16)) for _ in range(2))
            total = (first - second).square().mean()
            if loss is not None and loss.views == 2:
                total = total + weight * loss(first, second)
            elif loss is not None:
                total = total + weight * (loss(first) + loss(second))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return effective_rank(singular_values(encoder(rows).detach())).item()


def test_the_toy_collapses_without_a_loss() -> None:
    assert rank_after_training(None, 0.0) < 2


@pytest.mark.parametrize("name", [name for name in sorted(LOSSES) if CASES[name].weight is not None])
def test_the_toy_does_not_collapse_with_it(name: str) -> None:
    assert rank_after_training(LOSSES[name](**CASES[name].toy), CASES[name].weight) > 4


@every_loss
def test_compiles_without_a_graph_break(name: str) -> None:
    inputs = [z.requires_grad_() for z in views(name, some(name))]
    expected, grads = evaluate(name, inputs)
    loss = build(name)
    torch.compiler.reset()  # Dynamo counts how often it compiled this line
    value = torch.compile(lambda *z: loss(*z), backend="aot_eager", fullgraph=True)(*inputs)
    value.backward()
    torch.testing.assert_close(value.detach(), expected)
    for z, grad in zip(inputs, grads, strict=True):
        torch.testing.assert_close(z.grad, grad)


@every_loss
def test_bad_arguments(name: str) -> None:
    loss = build(name)
    good, n_views = torch.randn(8, 4), LOSSES[name].views
    with pytest.raises(ValueError, match=r"must be floating point of shape \(N, D\), got .* \(2, 3, 4\). Flatten"):
        loss(*[torch.randn(2, 3, 4)] * n_views)
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(8, 4\)"):
        loss(*[torch.ones(8, 4, dtype=torch.int64)] * n_views)
    fewer = CASES[name].rows - 1
    with pytest.raises(ValueError, match=rf"at least {CASES[name].rows} rows? over all processes, got {fewer} .*"):
        loss(*[good[:fewer]] * n_views)
    with pytest.raises(ValueError, match=f"takes {n_views} feature matrices, got {n_views + 1}"):
        loss(*[good] * (n_views + 1))
    with pytest.raises(ValueError, match="takes tensors, got tuple"):
        loss(*[good] * (n_views - 1), (good, good))


@every_loss
def test_it_prints_its_arguments(name: str) -> None:
    loss = build(name)
    assert isinstance(loss, nn.Module)
    assert all(f"{key}=" in repr(loss) for key in vars(loss) if key in ("target_std", "eps", "convention"))


def test_vicreg_conventions() -> None:
    a, b = views("VICReg", (12, 6))
    code, paper = VICReg().terms(a, b), VICReg("paper").terms(a, b)
    assert paper["invariance"].item() == pytest.approx(6 * code["invariance"].item())
    assert paper["variance"].item() == pytest.approx(2 * code["variance"].item())
    assert paper["covariance"].item() == pytest.approx(code["covariance"].item())
    expected = 25 * ((a - b) ** 2).sum(1).mean() + 25 * (naive_variance(a.numpy()) + naive_variance(b.numpy()))
    expected += naive_covariance(a.numpy()) + naive_covariance(b.numpy())
    assert VICReg("paper")(a, b).item() == pytest.approx(expected.item())
    constant = torch.ones(8, 4)
    assert VICReg("paper").value_at_collapse == pytest.approx(49.5)
    assert VICReg("paper")(constant, constant).item() == pytest.approx(49.5)
    # the code's coefficients in the paper's form
    assert VICReg("paper", 25 / 6, 12.5, 1.0)(a, b).item() == pytest.approx(VICReg()(a, b).item())


def test_closed_forms() -> None:
    constant = torch.ones(16, 4)
    assert VarianceLoss()(constant).item() == pytest.approx(0.99)
    assert VICReg()(constant, constant).item() == pytest.approx(24.75)
    _, grads = evaluate("VICReg", [constant, constant])
    assert all((grad == 0).all() for grad in grads)
    column = torch.randn(32, 1, dtype=torch.float64)
    column = (column - column.mean()) / column.std()
    assert CovarianceLoss()(column.expand(-1, 2)).item() == pytest.approx(1.0)
    assert VarianceLoss()(2 * column).item() == 0
    # n - 1 < d rows of unit variance cannot read less than d / (n - 1) - 1, and a simplex does read it
    n, d = 5, 8
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    rows = simplex @ basis[:n] * ((n - 1) * d / (n - 1)) ** 0.5
    covariance = torch.cov(rows.T)
    floor = (covariance.square().sum() - covariance.diagonal().square().sum()) / d
    assert covariance_loss(rows).item() == pytest.approx(floor.item())


@pytest.mark.parametrize("loss", [VarianceLoss, VICReg])
@pytest.mark.parametrize("argument", ["target_std", "eps"])
def test_positive_arguments(loss: type[nn.Module], argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must be positive, got 0"):
        loss(**{argument: 0})


def test_unknown_convention() -> None:
    with pytest.raises(ValueError, match=r"`convention` must be one of \('code', 'paper'\), got 'tutorial'"):
        VICReg("tutorial")


def test_functions_know_their_options() -> None:
    x, labels = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    calls: dict[str, Callable[[], Any]] = {
        "convention": lambda: losses.vicreg_terms(x, x, convention="papr"),
        " convention": lambda: losses.feature_decorrelation_terms(x, x, convention="papr"),
        "form": lambda: losses.ldreg_loss(x, form="papr"),
        "quadrature": lambda: losses.sigreg_loss(x, x.T, quadrature="papr"),
        "scope": lambda: losses.visreg_terms(x, x.T, scope="papr"),
        " scope": lambda: losses.wmse_loss(x, x, sub_batch=8, scope="papr"),
        "  scope": lambda: losses.cw_rgp_loss(x, x, sub_batch=2, groups=1, scope="papr"),
        "axis": lambda: losses.cw_rgp_loss(x, x, sub_batch=2, groups=1, axis="papr"),
        " axis": lambda: losses.spectral_transformation_terms(x, x, axis="papr"),
        "lengths": lambda: losses.dot_regression(x, labels, x, lengths="papr"),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"`{name.strip()}` must be one of \(.*\), got 'papr'"):
            call()


def test_functions_know_their_ranges() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(ValueError, match="`k` must be an integer of at least 2, got 1"):
        losses.ldreg_loss(x, k=1)
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        losses.coding_rate_loss(x, eps=0)


@pytest.mark.parametrize(
    ("loss", "argument"),
    [("SIGReg", "slices"), ("VISReg", "slices"), ("LDReg", "k"), ("WMSE", "sub_batch"), ("INTL", "iterations")],
)
def test_whole_arguments(loss: str, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"`{argument}` must be an integer of at least \d, got 2\.5"):
        LOSSES[loss](**{argument: 2.5})


@every_loss
def test_coefficients_are_finite(name: str) -> None:
    loss = build(name)
    for key in loss.coefficients:
        with pytest.raises(ValueError, match=f"`{key}` must be finite, got nan"):
            loss.coefficients = {**loss.coefficients, key: math.nan}
    with pytest.raises(ValueError, match="`covariance` must be finite, got inf"):
        VICReg(covariance=math.inf)


def test_views_must_have_one_shape() -> None:
    with pytest.raises(ValueError, match=r"one shape, got `first` \(8, 4\) and `second` \(6, 4\). Row i"):
        VICReg()(torch.randn(8, 4), torch.randn(6, 4))
