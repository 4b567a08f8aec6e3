"""Rows of rare classes: parallel, orthogonal, in a simplex, vanished, and where nothing is rare."""

import math

import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import minority_cosine, minority_norm

RARE = torch.tensor([100, 60, 10, 3, 49, 0])


def rows(*minority: list[float], large: float = 2.0) -> Tensor:
    """A classifier of six classes, of which the third to fifth are rare and the last was never seen."""
    others = [[large, 0.0, 0.0, 0.0], [0.0, -large, 0.0, 0.0]]
    return torch.tensor([*others, *minority, [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("minority", "cosine", "norm"),
    [
        (([0, 0, 3.0, 0], [0, 0, 0, 1.0], [2.0, 0, 0, 0]), 0.0, 1.0),
        (([0, 0, 3.0, 0], [0, 0, 1.0, 0], [0, 0, 0.5, 0]), 1.0, 0.75),
        (([0, 0, 3.0, 0], [0, 0, -1.5, math.sqrt(6.75)], [0, 0, -1.5, -math.sqrt(6.75)]), -0.5, 1.5),
        (([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]), 1.0, 0.0),
        (([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 3.0, 0]), 1 / 3, 0.5),
        (([0, 0, math.nan, 0], [0, 0, 1.0, 0], [0, 0, 1.0, 0]), math.nan, math.nan),
    ],
    ids=["orthogonal", "equal", "simplex", "vanished", "two vanished", "nan"],
)
def test_closed_forms(minority: tuple[list[float], ...], cosine: float, norm: float) -> None:
    weight = rows(*minority)
    assert minority_cosine(weight, RARE).item() == pytest.approx(cosine, abs=1e-12, nan_ok=True)
    assert minority_norm(weight, RARE).item() == pytest.approx(norm, abs=1e-12, nan_ok=True)
    assert minority_cosine(weight.float(), RARE.double()).item() == pytest.approx(cosine, abs=1e-6, nan_ok=True)


def test_whole_simplex_reads_what_the_simplex_has() -> None:
    classes = 10
    simplex = torch.eye(classes, dtype=torch.float64) - 1 / classes
    counts = torch.tensor([100] + [5] * (classes - 1))
    assert minority_cosine(simplex, counts).item() == pytest.approx(-1 / (classes - 1), rel=1e-12)
    pairs = torch.nn.functional.normalize(torch.randn(classes, 4, dtype=torch.float64), dim=1)
    gram = pairs[1:] @ pairs[1:].T
    expected = gram[~torch.eye(classes - 1, dtype=torch.bool)].mean().item()
    assert minority_cosine(7 * pairs, counts).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("counts", [[10, 10, 10], [20, 11, 10], [20, 10, 0], [0, 0, 0]])
def test_without_a_minority_there_is_nothing_to_read(counts: list[int]) -> None:
    weight = torch.eye(3)
    assert minority_cosine(weight, torch.tensor(counts)).isnan()
    assert minority_norm(weight, torch.tensor(counts)).isnan()


def test_one_rare_class_has_a_length_but_no_pair() -> None:
    weight, counts = torch.diag(torch.tensor([4.0, 4.0, 1.0])), torch.tensor([21, 20, 10])
    assert minority_cosine(weight, counts).isnan()
    assert minority_norm(weight, counts) == 0.25


def test_half_precision_is_computed_in_full() -> None:
    weight = rows([0, 0, 3.0, 0], [0, 0, 1.0, 0], [0, 0, 0.5, 0]).bfloat16()
    assert minority_cosine(weight, RARE).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert minority_cosine(weight, RARE).item() == pytest.approx(1.0, abs=1e-6)


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="must have shape"):
        minority_cosine(torch.eye(3), torch.ones(4))
