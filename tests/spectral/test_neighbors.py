"""Nearest neighbours, exact: what the differences of rows say, also where single precision cannot."""

import pytest
import torch
from torch import Tensor

from lightning_collapse.losses import koleo_loss
from lightning_collapse.spectral import neighbors
from lightning_collapse.spectral.neighbors import nearest_distances, nearest_rows, nearest_squares


def scattered(rows: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def exact(points: Tensor, k: int, excluded: Tensor | None = None) -> Tensor:
    """Distances to the ``k`` nearest by the differences of all rows."""
    wide = points.double()
    distances = torch.stack([(wide - row).norm(dim=1) for row in wide])
    distances.fill_diagonal_(torch.inf)
    if excluded is not None:
        distances[:, excluded] = torch.inf
    return distances.topk(k, largest=False).values


def found(points: Tensor, k: int, excluded: Tensor | None = None) -> Tensor:
    near = nearest_rows(points, k, excluded=excluded)
    return (points.double()[near] - points.double().unsqueeze(1)).norm(dim=2).sort(dim=1).values


INPUTS = {
    "scattered": scattered(300, 16),
    "wide": scattered(70, 700),
    "narrow cone": 1000 + scattered(200, 16),
    "outlier": torch.cat([scattered(100, 8), torch.full((1, 8), 1e4)]),
    # far closer to each other than single precision tells at this distance from the mean
    "clusters": (10 * torch.eye(4, 32)).repeat(40, 1) + 1e-4 * scattered(160, 32),
    "pairs": scattered(50, 32).repeat(2, 1) + 1e-5 * scattered(100, 32, seed=1),
    "large": 1e25 * scattered(60, 8),
    "small": 1e-30 * scattered(60, 8),
    "double": scattered(120, 16).double() + 1e-9 * scattered(120, 16, seed=1).double(),
    "two": scattered(2, 5),
    "one column": scattered(64, 1),
}


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("name", INPUTS)
def test_they_are_the_nearest(name: str, k: int) -> None:
    points = INPUTS[name]
    k = min(k, len(points) - 1)
    torch.testing.assert_close(found(points, k), exact(points, k), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 5])
def test_equal_rows_are_each_others_neighbours(k: int) -> None:
    repeated = scattered(10, 6).repeat(7, 1)
    assert (found(repeated, k) == 0).all()
    assert (nearest_rows(torch.ones(9, 3), k) != torch.arange(9).unsqueeze(1)).all()


def test_equal_distances() -> None:
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
    torch.testing.assert_close(found(grid, 1), torch.ones(36, 1, dtype=torch.float64))
    assert found(grid, 4).sum() == exact(grid, 4).sum()


def test_what_is_excluded_is_no_neighbour() -> None:
    points, excluded = scattered(60, 4), torch.arange(60) % 3 == 0
    near = nearest_rows(points, 2, excluded=excluded)
    assert not excluded[near].any()
    torch.testing.assert_close(found(points, 2, excluded), exact(points, 2, excluded))


def test_a_part_of_the_points() -> None:
    points = scattered(50, 8)
    assert torch.equal(nearest_rows(points, 2, first=20, count=7), nearest_rows(points, 2)[20:27])


def test_double_precision_is_for_the_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scattered rows are settled in single precision; clusters are not, and rows among them are searched again."""
    again: list[int] = []
    search = neighbors._search

    def counted(points: Tensor, k: int, own: Tensor, excluded: Tensor) -> Tensor:
        again.append(len(own))
        return search(points, k, own, excluded)

    monkeypatch.setattr(neighbors, "_search", counted)
    nearest_rows(scattered(500, 64), 1)
    assert not again
    mixed = torch.cat([scattered(300, 32), 5 + 1e-6 * scattered(40, 32)])
    torch.testing.assert_close(found(mixed, 1), exact(mixed, 1), rtol=1e-6, atol=0)
    assert 0 < sum(again) <= 40


def test_lower_precision_of_products_is_noticed() -> None:
    """Where the processor multiplies in half precision on request, neighbours are right all the same."""
    points = scattered(400, 64)
    expected, before = exact(points, 1), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(found(points, 1), expected, rtol=1e-6, atol=0)
    finally:
        torch.set_float32_matmul_precision(before)


def test_both_ways_agree() -> None:
    """That of accelerators, and that of processors."""
    for points in (scattered(200, 16), INPUTS["clusters"]):
        own, none = torch.arange(len(points)), torch.zeros(len(points), dtype=torch.bool)
        assert torch.equal(neighbors._search(points, 1, own, none), nearest_rows(points, 1))


def test_distances_are_those_of_rows_that_count() -> None:
    points = torch.tensor([[0.0], [1.0], [1.0], [4.0], [torch.nan]])
    distances, counts, repeated = nearest_distances(points, k=3)
    assert counts.tolist() == [True, True, False, True, False]
    assert repeated.tolist() == [False, False, True, False, False]
    scale = distances[0, 0]
    assert (distances[counts] / scale).tolist() == [[1, 4, torch.inf], [1, 3, torch.inf], [3, 4, torch.inf]]
    assert distances[~counts].isinf().all()


@pytest.mark.parametrize("tile", [1, 1 << 20])
def test_squares_and_their_gradient(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "TILE_ELEMENTS", tile)
    points = torch.cat([scattered(12, 4), scattered(2, 4)]).double()  # two of them twice
    rows, same = (points[3:].clone().requires_grad_() for _ in range(2))
    squares = (same.unsqueeze(1) - points).square().sum(dim=2)
    own = torch.eye(len(points), dtype=torch.bool)[3:]
    expected = squares.masked_fill(own, torch.inf).topk(5, largest=False).values
    found = nearest_squares(rows, points, 5, first=3)
    torch.testing.assert_close(found, expected)
    slopes = scattered(*found.shape).double()
    found.backward(slopes)
    expected.backward(slopes)
    torch.testing.assert_close(rows.grad, same.grad)


def test_one_row_has_no_neighbour() -> None:
    assert nearest_distances(torch.ones(1, 3), k=2)[0].isinf().all()


def test_koleo_tells_neighbours_that_single_precision_does_not() -> None:
    """Two rows of a tight cluster: a Gram matrix in single precision takes any of its rows for the nearest."""
    cluster = torch.eye(2, 16)[:1] + 1e-5 * scattered(64, 16)
    rows = torch.cat([cluster, -cluster])
    units = torch.nn.functional.normalize(rows, dim=1)
    expected = -(exact(units, 1) + 1e-8).log().mean().item()
    assert koleo_loss(rows).item() == pytest.approx(expected, rel=1e-3)
