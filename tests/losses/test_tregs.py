"""T-REGS: the minimum spanning tree, simplices, and the radius that its coefficients lead to."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_collapse.losses import TREGS
from lightning_collapse.losses.support.spanning_tree import minimum_spanning_tree
from tests.contracts.test_losses import rank_after_training
from tests.losses.cases.neighbors import naive_tree_length


def tree(points: Tensor) -> tuple[list[tuple[int, int]], float]:
    left, right = minimum_spanning_tree(torch.cdist(points, points))
    edges = [(int(a), int(b)) for a, b in zip(left, right, strict=True) if a != b]
    return edges, sum((points[a] - points[b]).norm().item() for a, b in edges)


def spans(edges: list[tuple[int, int]], points: int) -> bool:
    """Whether as many edges as a tree has connect all points."""
    reached = {0}
    for _ in range(points):
        reached |= {b for a, b in edges if a in reached} | {a for a, b in edges if b in reached}
    return len(edges) == points - 1 and len(reached) == points


@pytest.mark.parametrize("points", [2, 3, 4, 5, 17, 40])
@pytest.mark.parametrize("kind", ["scattered", "grid", "line", "copies", "equal"])
def test_tree_is_the_shortest(points: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(points)
    rows = torch.randn(points, 3, generator=generator, dtype=torch.float64)
    if kind == "grid":  # many equal distances
        rows = torch.randint(0, 3, (points, 3), generator=generator).double()
    elif kind == "line":  # every tree has the same nearest neighbour: the most rounds
        rows = 2.0 ** torch.arange(points, dtype=torch.float64).unsqueeze(1)
    elif kind == "copies":
        rows = rows[:2].repeat(points, 1)[:points]
    elif kind == "equal":
        rows = torch.ones(points, 3, dtype=torch.float64)
    edges, length = tree(rows)
    assert spans(edges, points)
    assert length == pytest.approx(naive_tree_length(rows.numpy()), rel=1e-12)


@pytest.mark.parametrize("n", [2, 5, 33])
def test_simplex(n: int) -> None:
    """Theorem 4.1: the longest tree in a ball, of ``sqrt(2 (n - 1) / n)`` radii per row."""
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    rows = 3 * simplex / simplex.norm(dim=1, keepdim=True)
    terms = TREGS().terms(rows, rows)
    assert terms["length"].item() == pytest.approx(-2 * 3 * math.sqrt(2 * (n - 1) / n))
    assert terms["sphere"].item() == pytest.approx(2 * (3 - 1) ** 2)
    assert terms["invariance"].item() == 0
    shifted = TREGS().terms(rows, rows + 1)
    assert shifted["invariance"].item() == pytest.approx(n)


def test_radius() -> None:
    """Rows that agree settle on a simplex of the radius that the coefficients give, and not on the unit sphere."""
    loss = TREGS(sphere=0.02)
    rows = torch.randn(8, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.SGD([rows], lr=20.0)
    for _ in range(600):
        optimizer.zero_grad()
        loss(rows, rows).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.992
    assert rows.norm(dim=1).mean().item() == pytest.approx(loss.radius(8), rel=1e-2)
    directions = normalize(rows.detach(), dim=1)
    cosines = directions @ directions.T
    assert cosines[~torch.eye(8, dtype=torch.bool)].mean().item() == pytest.approx(-1 / 7, abs=5e-3)
    assert TREGS().radius(10**9) == pytest.approx(177.78, abs=0.01)


def test_least_value() -> None:
    """The value at the equilibrium radius, as the docstring has it."""
    n = 64
    root = math.sqrt(2 * (n - 1) / n)
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    rows = TREGS().radius(n) * simplex / simplex.norm(dim=1, keepdim=True)
    expected = -2 * 0.2 * root * (1 + 0.2 * root / (4 * 8e-4))
    assert TREGS()(rows, rows).item() == pytest.approx(expected)
    for factor in (0.99, 1.01):
        assert TREGS()(factor * rows, factor * rows).item() > expected


def test_length_falls_as_coordinates_are_silenced() -> None:
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    lengths = []
    for kept in (64, 48, 32, 16, 4):
        silenced = torch.where(torch.arange(64) < kept, rows, 0.0)
        lengths.append(-TREGS().terms(silenced, silenced)["length"].item())
    assert lengths == sorted(lengths, reverse=True)


def test_gradient_does_not_fade_near_collapse() -> None:
    rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = []
    for scale in (1.0, 1e-3, 1e-6):
        leaf = (1 + scale * rows).requires_grad_()
        TREGS(sphere=0)(leaf, leaf).backward()
        assert leaf.grad is not None
        norms.append(leaf.grad.norm().item())
    assert np.allclose(norms, norms[0], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_repeated_rows_are_finite(dtype: torch.dtype) -> None:
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(3, 1).requires_grad_()
    loss = TREGS()(rows, rows)
    loss.backward()
    assert rows.grad is not None
    assert loss.isfinite()
    assert rows.grad.isfinite().all()


def test_the_toy_does_not_collapse_where_views_may_differ() -> None:
    """With the published coefficients views that share one coordinate are made to agree, which leaves but that one."""
    assert rank_after_training(TREGS(), 1.0) < 2
    assert rank_after_training(TREGS(invariance=0.0), 1.0) > 4
