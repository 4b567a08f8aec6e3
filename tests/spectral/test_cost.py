"""The budget of rows."""

import pytest

from lightning_collapse.spectral.cost import rows_within, spectrum_flops


def test_cost_is_that_of_the_smaller_side() -> None:
    assert spectrum_flops(10, 100) == 4.5 * 10 * 100 * 10 + 10 * 10**3
    assert spectrum_flops(100, 10) == spectrum_flops(10, 100)
    assert spectrum_flops(1000, 10) - spectrum_flops(999, 10) == pytest.approx(450)


@pytest.mark.parametrize("width", [1, 2, 16, 64, 512, 2048])
def test_cost_grows_with_rows(width: int) -> None:
    costs = [spectrum_flops(rows, width) for rows in range(1, 3000, 7)]
    assert costs == sorted(costs)
    assert len(set(costs)) == len(costs)


@pytest.mark.parametrize("width", [1, 8, 100, 512])
@pytest.mark.parametrize("flops", [1e5, 3e6, 5e7, 1e9])
def test_the_most_rows_that_fit(width: int, flops: float) -> None:
    rows = rows_within(flops, width)
    most = max(4 * width, 64)
    assert 64 <= rows <= most
    assert rows == 64 or spectrum_flops(rows, width) <= flops
    assert rows == most or spectrum_flops(rows + 1, width) > flops
    assert rows == max(64, *(r for r in range(1, most + 1) if r == 1 or spectrum_flops(r, width) <= flops))


def test_bounds() -> None:
    assert rows_within(float("inf"), 100, per_feature=2) == 200
    assert rows_within(-1.0, 100, least=7) == 7
    assert rows_within(1e30, 3, least=50) == 50
