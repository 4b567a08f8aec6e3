"""Feature learning, against sums written out, closed forms, and what training itself does."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.functional.feature_learning import (
    critical_beta,
    critical_temperature,
    emergence_cosine,
    kernel_alignment,
    kernel_alignment_null,
    low_rank_weight,
    mode_half_time,
    mode_strength_at,
    mode_strengths,
    null_space_share,
    outlying_singular_values,
    projected_tangent_kernel,
    relative_weight_change,
    representation_alignment,
    sign_similarity,
    tangent_kernel,
)

F64 = torch.float64


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum() / (first.norm() * second.norm())


def test_alignment_is_the_cosine_of_what_its_names_say() -> None:
    first, second = rows(0, 12, 5), rows(1, 12, 7)
    grams = [x @ x.T for x in (first, second)]
    centre = torch.eye(12, dtype=F64) - 1 / 12
    found = kernel_alignment(*grams)
    assert found.uncentred == pytest.approx(cosine(*grams).item(), rel=1e-12)
    assert found.centred == pytest.approx(cosine(*(centre @ g @ centre for g in grams)).item(), rel=1e-12)
    off = [g - g.diag().diag() for g in grams]
    assert found.off_diagonal == pytest.approx(cosine(*off).item(), rel=1e-12)
    # the unbiased estimator of HSIC in its three sums (Song et al., 2012)
    terms = [
        (k * m).sum() + k.sum() * m.sum() / (11 * 10) - 2 / 10 * (k.sum(0) * m.sum(0)).sum()
        for k, m in ((off[0], off[1]), (off[0], off[0]), (off[1], off[1]))
    ]
    assert found.debiased == pytest.approx((terms[0] / (terms[1] * terms[2]).sqrt()).item(), rel=1e-10)
    assert kernel_alignment(grams[0][:3, :3], grams[1][:3, :3]).debiased.isnan()


def test_an_orthogonal_map_and_a_scale_are_no_change() -> None:
    features, q = rows(2, 20, 3, 4), torch.linalg.qr(rows(3, 12, 12)).Q
    found = representation_alignment(3 * features.flatten(1) @ q, features)
    assert torch.stack(found).tolist() == pytest.approx([1, 1, 1, 1], rel=1e-12)


@pytest.mark.parametrize(("n", "d", "published"), [(100, 50, 0.858), (100, 500, 0.984)])
def test_published_alignment_of_unrelated_features_is_near_1_and_the_null_says_so(n, d, published) -> None:
    grams = [x @ x.T for x in (rows(seed, n, d).relu() for seed in (4, 5))]
    found, (null, deviation) = kernel_alignment(*grams), kernel_alignment_null(*grams)
    assert found.uncentred == pytest.approx(published, abs=0.015)
    assert abs(found.uncentred - null.uncentred) < 4 * deviation.uncentred
    assert abs(found.debiased) < 0.05
    assert abs(null.debiased) < 4 * deviation.debiased


def test_off_the_diagonal_unrelated_tangent_kernels_are_unrelated() -> None:
    g, a, other_g, other_a = (rows(seed, 100, width) for seed, width in ((6, 100), (7, 200), (8, 100), (9, 200)))
    first, second = tangent_kernel(g, a), tangent_kernel(other_g, other_a)
    assert abs(kernel_alignment(first, second).off_diagonal) < 0.02
    whole, unrelated = rows(10, 100, 20_000), rows(59, 100, 20_000)
    found = kernel_alignment(whole @ whole.T, unrelated @ unrelated.T)
    assert found.uncentred == pytest.approx(0.995, abs=0.002)  # the Gram matrix is nearly diagonal
    assert abs(found.off_diagonal) < 0.02
    # of gradients in which each entry has the correlation 0.7 with what it was
    later = 0.7 * whole + math.sqrt(1 - 0.49) * rows(11, 100, 20_000)
    assert kernel_alignment(whole @ whole.T, later @ later.T).off_diagonal == pytest.approx(0.49, abs=0.03)


def test_a_shared_projection_keeps_off_diagonal_alignment_and_two_of_their_own_do_not() -> None:
    g, a = rows(12, 100, 60), rows(13, 100, 60)
    later = g * 0.7 + math.sqrt(1 - 0.49) * rows(14, 100, 60)
    exact = kernel_alignment(tangent_kernel(g, a), tangent_kernel(later, a)).off_diagonal
    first = projected_tangent_kernel(g, a, 1024)
    shared = kernel_alignment(first, projected_tangent_kernel(later, a, 1024)).off_diagonal
    apart = kernel_alignment(first, projected_tangent_kernel(later, a, 1024, seed=1)).off_diagonal
    assert shared == pytest.approx(exact.item(), abs=0.1)
    assert apart < exact - 0.2
    state = torch.get_rng_state()
    many = projected_tangent_kernel(g[:4].view(2, 2, 60), a[:4].view(2, 2, 60), 200_000)
    torch.testing.assert_close(many, tangent_kernel(g[:4].view(2, 2, 60), a[:4].view(2, 2, 60)), rtol=0.05, atol=30)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("length", "outputs", "inputs"), [(1, 5, 3), (2, 40, 30), (50, 3, 2)])
def test_the_tangent_kernel_is_that_of_whole_gradients(length, outputs, inputs) -> None:
    """By autograd, sample by sample; the second shape takes pairs of positions, the third whole gradients."""
    layer, x, r = nn.Linear(inputs, outputs, dtype=F64), rows(15, 6, length, inputs), rows(16, 6, length, outputs)
    single = []
    for sample, direction in zip(x, r, strict=True):
        value = (layer(sample).tanh() * direction).sum()
        single.append(torch.autograd.grad(value, layer.weight)[0].flatten())
    gradients = torch.stack(single)
    g = r * (1 - layer(x).tanh().square()).detach()
    found = tangent_kernel(*((g, x) if length > 1 else (g.squeeze(1), x.squeeze(1))))
    torch.testing.assert_close(found, gradients @ gradients.T, rtol=1e-10, atol=1e-10)


def test_signs_and_their_null() -> None:
    first, second = rows(17, 4000, 6) + 0.5, rows(18, 4000, 6) - 0.3
    found = sign_similarity(first, second)
    assert found.share == pytest.approx((first.sign() == second.sign()).double().mean().item(), rel=1e-6)
    assert found.null == pytest.approx(found.share.item(), abs=0.01)  # they have nothing to do with each other
    assert sign_similarity(first > 0, first > 0).share == 1


def test_gradient_descent_stays_in_the_span_of_its_inputs_and_adam_does_not() -> None:
    x, y = rows(19, 8, 20), rows(20, 8, 3)
    for optimizer, low, high in ((torch.optim.SGD, 0.0, 1e-12), (torch.optim.Adam, 0.05, 1.0)):
        layer = nn.Linear(20, 3, dtype=F64)
        before, step = layer.weight.detach().clone(), optimizer(layer.parameters(), lr=0.01)
        for _ in range(20):
            step.zero_grad()
            (layer(x) - y).square().sum().backward()
            step.step()
        share, null = null_space_share(layer.weight.detach() - before, x).tolist()
        assert low <= share <= high
        assert null == pytest.approx(12 / 20)
    q = torch.linalg.qr(x.T).Q
    update = rows(21, 3, 20)
    expected = 1 - (update @ q).square().sum() / update.square().sum()
    torch.testing.assert_close(null_space_share(update, x)[0], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(null_space_share(update, x.repeat(5, 1))[0], expected, rtol=1e-9, atol=0)


def test_low_rank_weights_have_the_norm_of_full_ones() -> None:
    weight = rows(22, 30, 20)
    low = low_rank_weight(weight, 4)
    assert torch.linalg.matrix_rank(low) == 4
    assert low.norm() == pytest.approx(weight.norm().item(), rel=1e-12)
    torch.testing.assert_close(low_rank_weight(weight, 20), weight)
    assert relative_weight_change(2 * weight, weight) == pytest.approx(1.0)


def spread_after(features: Tensor, temperature: float, steps: int = 3000) -> float:
    """Expectation maximization of three prototypes on the sphere, from near the symmetric state."""
    mean = nn.functional.normalize(features.mean(dim=0), dim=0)
    codes = nn.functional.normalize(mean + 1e-3 * rows(24, 3, features.shape[1]), dim=1)
    for _ in range(steps):
        shares = (features @ codes.T / temperature).softmax(dim=1)
        codes = nn.functional.normalize(shares.T @ features, dim=1)
    return (codes - codes.mean(dim=0)).norm().item()


def test_prototypes_part_below_the_critical_temperature_and_not_above() -> None:
    scales = torch.tensor([0.7, 0.4, 0.3], dtype=F64)
    features = nn.functional.normalize(torch.cat([torch.ones(80, 1, dtype=F64), rows(23, 80, 3) * scales], 1), dim=1)
    found = critical_temperature(3 * features)  # rows are divided by their length
    assert spread_after(features, 1.02 * found.temperature.item()) < 1e-10
    assert spread_after(features, 0.98 * found.temperature.item()) > 0.05
    direction = found.mean_norm.reciprocal() * features.mean(dim=0)
    project = torch.eye(4, dtype=F64) - torch.outer(direction, direction)
    expected = torch.linalg.eigvalsh(project @ torch.cov(features.T, correction=0) @ project)[-1] / found.mean_norm
    assert found.temperature == pytest.approx(expected.item(), rel=1e-12)


def test_the_null_of_the_critical_temperature_is_what_even_spread_reads() -> None:
    around = torch.cat([2 * torch.ones(400, 1, dtype=F64), rows(25, 400, 300) / 20], dim=1)
    found = critical_temperature(around)
    assert found.null == pytest.approx(found.temperature.item(), rel=0.05)
    odd = critical_temperature(torch.cat([around, 2 * rows(26, 400, 1)], dim=1))
    assert odd.temperature > 3 * odd.null


def test_the_critical_beta_is_free_of_what_few_rows_add() -> None:
    scales = torch.ones(40, dtype=F64)
    scales[0] = 2.0
    found = critical_beta(rows(27, 4000, 40) * scales)
    assert found.beta == pytest.approx(0.25, rel=0.06)
    few = [critical_beta(rows(seed, 120, 40) * scales) for seed in range(28, 48)]
    plain, corrected = (1 / torch.stack([getattr(one, name) for one in few]) for name in ("beta", "corrected"))
    assert plain.mean() > 4.25  # the law says 4 (1 + 1 / 9) = 4.44
    assert corrected.mean() == pytest.approx(4.0, rel=0.05)
    noise = critical_beta(rows(50, 50, 40))
    assert noise.beta < 0.45  # 1 / (1 + sqrt(0.8))^2 = 0.28
    assert noise.corrected == pytest.approx(1.0, rel=0.15)


def test_modes_of_a_linear_network_follow_the_formula() -> None:
    """Gradient descent on aligned balanced weights, four modes at once."""
    start, rate, targets = 1e-6, 2e-3, [4.0, 2.0, 1.0, 0.5]
    left, right = (torch.linalg.qr(rows(seed, 6, 6)).Q[:, :4] for seed in (51, 52))
    task = left @ torch.tensor(targets, dtype=F64).diag() @ right.T
    first, second = math.sqrt(start) * right.T, math.sqrt(start) * left
    half = [math.nan] * 4
    for step in range(1, 7000):
        error = task - second @ first
        second, first = second + rate * error @ first.T, first + rate * second.T @ error
        if step % 5 == 0:
            learned, known = mode_strengths(second @ first, task)
            for i, share in enumerate((learned / known)[:4].tolist()):
                half[i] = step * rate if share >= 0.5 and math.isnan(half[i]) else half[i]
    for target, time in zip(targets, half, strict=True):
        assert time == pytest.approx(mode_half_time(target, start), rel=0.01)
    assert known.tolist() == pytest.approx([*targets, 0, 0], abs=1e-12)
    assert mode_strength_at([0.0, 1e9], 2.0, 0.1).tolist() == pytest.approx([0.1, 2.0])


def test_only_twice_the_rank_of_singular_values_leaves_the_bulk() -> None:
    q = [0.1 * torch.linalg.qr(rows(seed, 40, 40)).Q for seed in range(53, 57)]
    weights = [matrix.clone().requires_grad_() for matrix in q]
    task = rows(57, 40, 3) @ rows(58, 3, 40) / 40
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for _ in range(1000):
        optimizer.zero_grad()
        (task - torch.linalg.multi_dot(weights)).square().sum().mul(0.5).backward()
        optimizer.step()
    counts = outlying_singular_values(torch.linalg.svdvals(torch.stack(weights).detach()))
    assert counts.tolist() == [6, 6, 6, 6]
    assert outlying_singular_values(torch.linalg.svdvals(torch.stack(q))).tolist() == [0, 0, 0, 0]


def modular(width: int, base: int = 17) -> tuple[Tensor, Tensor]:
    pairs = torch.tensor(list(product(range(base), repeat=2)))
    hot = nn.functional.one_hot(pairs, base).to(F64)
    units = (hot.flatten(1) @ rows(60, 2 * base, width)).square()
    return units, nn.functional.one_hot(pairs.sum(dim=1) % base, base).to(F64)


def test_emergence_dips_where_units_are_as_many_as_samples() -> None:
    values = {width: emergence_cosine(*modular(width)).item() for width in (64, 256, 4096)}
    assert values[64] == pytest.approx(0.65, abs=0.05)
    assert values[256] == pytest.approx(0.10, abs=0.05)
    assert values[4096] == pytest.approx(0.91, abs=0.02)


@pytest.mark.parametrize("width", [30, 400])
def test_the_gradient_is_that_of_the_ridge_solution(width) -> None:
    features, targets = modular(width, base=7)
    f = (features - features.mean(dim=0)).requires_grad_()
    y = targets - targets.mean(dim=0)
    head = torch.linalg.solve(f.T @ f + 0.1 * torch.eye(width, dtype=F64), f.T @ y).detach()
    [gradient] = torch.autograd.grad(-0.5 * (y - f @ head).square().sum(), f)
    expected = cosine(gradient, y @ y.T @ f.detach()).item()
    assert emergence_cosine(features, targets, ridge=0.1) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: kernel_alignment(torch.eye(3), torch.eye(4)), r"equal shapes \(n, n\), got \(3, 3\)"),
        (lambda: kernel_alignment_null(torch.eye(3), torch.eye(3), 1), "`permutations`"),
        (lambda: sign_similarity(torch.ones(2), torch.ones(3)), "equal shapes"),
        (lambda: tangent_kernel(torch.ones(3, 2), torch.ones(4, 2)), "`gradients` and `inputs`"),
        (lambda: projected_tangent_kernel(torch.ones(3, 2), torch.ones(3, 2), 0), "`size`"),
        (lambda: relative_weight_change(torch.ones(2), torch.ones(3)), "`reference`"),
        (lambda: null_space_share(torch.ones(2, 3), torch.ones(5, 4)), "`update` and `inputs`"),
        (lambda: low_rank_weight(torch.ones(3), 1), "`weight`"),
        (lambda: critical_temperature(torch.ones(3)), "`features`"),
        (lambda: critical_beta(torch.ones(0, 3)), "`features`"),
        (lambda: mode_strengths(torch.ones(2, 3), torch.ones(3, 2)), "`cross_covariance`"),
        (lambda: mode_half_time(1.0, 1.0), "`start`"),
        (lambda: mode_strength_at([0.0], 1.0, 0.0), "`start`"),
        (lambda: emergence_cosine(torch.ones(3, 2), torch.ones(4, 2)), "`features` and `targets`"),
        (lambda: emergence_cosine(torch.ones(2001, 1), torch.ones(2001, 1)), "2000 samples at most"),
        (lambda: emergence_cosine(torch.ones(3, 2), torch.ones(3, 2), 0.0), "`ridge`"),
    ],
)
def test_bad_arguments_are_named(call, match) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_half_precision_is_promoted() -> None:
    low = rows(61, 8, 6).bfloat16()
    assert kernel_alignment(low @ low.T, low @ low.T).uncentred == pytest.approx(1.0)
    assert tangent_kernel(low, low).dtype == torch.float32
    assert null_space_share(low, low)[0] < 1e-6
    assert critical_temperature(low).temperature.isfinite()
    assert emergence_cosine(low, low).isfinite()
