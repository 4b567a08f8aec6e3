"""Properties of the picture, and a history that is bounded and resumes."""

import io
from math import isnan, nan

import numpy as np
import pytest
import torch

from lightning_collapse.reporting import History, heat_map

GREY = [128, 128, 128]


def lightness(image):
    """CIE L* of sRGB colors."""
    rgb = image.astype(float) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(luminance > (6 / 29) ** 3, 116 * np.cbrt(luminance) - 16, (29 / 3) ** 3 * luminance)


def test_equal_differences_are_equal_steps_of_lightness():
    steps = np.diff(lightness(heat_map(np.arange(33.0)[None], cell=1))[0])
    assert steps.min() > 0
    assert steps.max() < 1.5 * steps.min()


def test_cells_are_crisp_squares_and_nan_is_grey():
    values = [[0.0, nan, 2.0], [np.inf, 4.0, -np.inf]]
    image = heat_map(values, cell=5)
    assert image.shape == (10, 15, 3)
    assert image.dtype == np.uint8
    cells = image.reshape(2, 5, 3, 5, 3).transpose(0, 2, 1, 3, 4).reshape(2, 3, 25, 3)
    assert (cells == cells[:, :, :1]).all()
    grey = (cells[:, :, 0] == GREY).all(axis=-1)
    np.testing.assert_array_equal(grey, ~np.isfinite(values))
    assert lightness(cells[0, 0, 0]) < lightness(cells[0, 2, 0]) < lightness(cells[1, 1, 0])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_constant_tables_have_one_color_and_empty_ones_are_grey(shape):
    constant = heat_map(np.full(shape, 3.0), cell=2).reshape(-1, 3)
    assert (constant == constant[0]).all()
    assert constant[0].tolist() != GREY
    assert (heat_map(np.full(shape, nan), cell=2) == GREY).all()


def test_limits_pin_the_colors():
    low, middle, high = heat_map([[0.0, 5.0, 10.0]], cell=1)[0].tolist()
    assert heat_map([[-3.0, 5.0, 12.0]], low=0, high=10, cell=1)[0].tolist() == [low, middle, high]
    assert heat_map([[5.0]], low=0, high=10, cell=1)[0].tolist() == [middle]
    assert (heat_map([[nan]], low=0, high=10) == GREY).all()


@pytest.mark.parametrize("steps", [200, 1024, 1025, 5000])
def test_width_is_bounded_and_the_latest_step_stays(steps):
    values = np.zeros((2, steps))
    values[:, -1] = 1
    image = heat_map(values)
    assert image.shape[1] <= 1024
    assert (image[:, -1] != image[:, 0]).any(axis=-1).all()


@pytest.mark.parametrize("values", [[1.0, 2.0], [[]], np.zeros((0, 3)), np.zeros((1, 1, 1))])
def test_needs_a_table(values):
    with pytest.raises(ValueError, match=r"`values` of shape \(layers, steps\)"):
        heat_map(values)


@pytest.mark.parametrize("columns", [1, 2, 7, 256])
def test_history_is_bounded_ordered_and_keeps_the_latest_point(columns):
    history = History(columns)
    for step in range(3 * columns + 5):
        history.append(step, {"a": float(step), "b": -float(step)})
        assert 1 <= len(history) <= columns
        assert history.steps[-1] == step
        np.testing.assert_array_equal(history.values, [history.steps, [-step for step in history.steps]])
    gaps = np.diff(history.steps)
    assert (gaps[:-1] == gaps[0]).all() if columns > 2 else True
    assert len(history) > columns / 2


def test_history_fills_missing_layers_with_nan():
    history = History()
    assert not history
    assert history.values.shape == (0, 0)
    history.append(10, {"a": 1.0})
    history.append(20, {"b": 2.0})
    assert history.layers == ["a", "b"]
    np.testing.assert_array_equal(history.values, [[1, nan], [nan, 2]])
    assert heat_map(history.values).any()


@pytest.mark.parametrize("cut", [0, 1, 8, 13, 16, 37])
def test_resumed_history_equals_an_uninterrupted_one(cut):
    def fill(history, steps):
        for step in steps:
            history.append(step, {"a": nan if step % 3 else float(step), f"late{step // 20}": 1.0})
        return history

    whole = fill(History(8), range(50))
    state = io.BytesIO()
    torch.save(fill(History(8), range(cut)).state_dict(), state)
    state.seek(0)
    resumed = History(8)
    resumed.load_state_dict(torch.load(state, weights_only=True))
    fill(resumed, range(cut, 50))
    assert (resumed.steps, resumed.layers) == (whole.steps, whole.layers)
    np.testing.assert_array_equal(resumed.values, whole.values)


def test_history_loads_a_longer_one_and_shares_nothing_with_its_state():
    long, short = History(64), History(8)
    for step in range(50):
        long.append(step, {"a": float(step)})
    state = long.state_dict()
    short.load_state_dict(state)
    for step in range(50, 120):
        short.append(step, {"a": float(step)})
    assert len(short) <= 8
    assert short.steps[-1] == 119
    assert state == long.state_dict()
    assert not any(isnan(value) for value in short.values[0])


def test_history_needs_a_column():
    with pytest.raises(ValueError, match="`columns` must be at least 1, got 0"):
        History(0)
