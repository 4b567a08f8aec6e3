"""A heat map that can be read by itself: names, steps, color scale and numbers stand where they belong."""

import numpy as np
import pytest

from lightning_collapse.reporting import heat_map, labelled_heat_map
from lightning_collapse.reporting.labels import labels

WHITE = [255, 255, 255]
BLOCK = np.arange(6.0).reshape(2, 3)


def differs(first, second):
    """The box around all pixels that differ: top, bottom, left, right."""
    rows, columns = np.nonzero((first != second).any(axis=-1))
    return rows.min(), rows.max(), columns.min(), columns.max()


def test_the_colors_are_those_of_the_heat_map():
    picture = labelled_heat_map(np.arange(40.0).reshape(2, 20), ["a", "b"], range(20))
    expected = heat_map(np.arange(40.0).reshape(2, 20), cell=1)
    seen = {tuple(color) for color in picture.reshape(-1, 3).tolist()}
    assert {tuple(color) for color in expected.reshape(-1, 3).tolist()} <= seen
    assert picture.dtype == np.uint8
    assert picture[0, 0].tolist() == WHITE


@pytest.mark.parametrize("columns", [3, 40])
def test_names_steps_title_and_ends_are_drawn(columns):
    values = np.arange(2.0 * columns).reshape(2, columns)
    names, steps = ["encoder.0", "encoder.2"], list(range(columns))
    plain = labelled_heat_map(values, names, steps, "a title")
    middle = plain.shape[0] // 2
    top, bottom, _, right = differs(plain, labelled_heat_map(values, ["encoder.0", "encoder.3"], steps, "a title"))
    assert top > 26  # below the title, left of the colors
    assert right < 80
    assert bottom < plain.shape[0] - 24
    other = labelled_heat_map(values, names, [*steps[:-1], 999], "a title")
    assert differs(plain, other)[0] > middle
    assert differs(plain, labelled_heat_map(values, names, steps, "a tilte"))[1] < 26
    assert (
        differs(plain, labelled_heat_map(values, names, steps, "a title", high=10.0 ** len(str(2 * columns)) - 1))[3]
        > 0
    )


def test_numbers_stand_in_wide_cells_and_beside_narrow_ones():
    few = labelled_heat_map(BLOCK, ["a", "b"], [0, 1, 2])
    many = labelled_heat_map(BLOCK.repeat(30, axis=1), ["a", "b"], range(90))
    pure = {tuple(color) for color in heat_map(BLOCK, cell=1).reshape(-1, 3).tolist()}
    assert len({tuple(color) for color in few[30:40, 30:130].reshape(-1, 3).tolist()} - pure) > 3
    block = many[30:60, 40:500].reshape(-1, 3).tolist()
    assert {tuple(color) for color in block} <= pure


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (300, 7), (2, 5000), (5000, 1)])
def test_any_size_is_drawn_within_bounds(rows, columns):
    picture = labelled_heat_map(
        np.zeros((rows, columns)), [f"a{'x' * 99}.\u7de8{i}" for i in range(rows)], range(columns)
    )
    assert picture.shape[0] <= 5100
    assert picture.shape[1] <= 1600


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros((2, 2)), [1.0, 2.0, 3.0]])
def test_needs_a_table_with_names(values):
    with pytest.raises(ValueError, match="a name for each row and column, at least one"):
        labelled_heat_map(values, ["a"][: len(values)], [0, 1, 2])


def test_labels_stay_apart():
    assert list(labels(["a.all", "all", "a.b"]).values()) == ["a.all", "all", "a.b"]
    assert list(labels(["net.0", "net.1", "all"]).values()) == ["net.0", "net.1", "all"]
    assert list(labels(["m.net.up.x", "m.net.down.x"]).values()) == ["up.x", "down.x"]
    assert list(labels(["m.x"]).values()) == ["m.x"]
