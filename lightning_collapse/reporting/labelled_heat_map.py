"""Labelled heat map: a heat map with its title, the names of its rows, its steps, its color scale and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_collapse.reporting.heat_map import heat_map
from lightning_collapse.reporting.labels import labels

_ROW, _COLUMN, _WIDTH, _HEIGHT = 18, 44, 640, 1152  # pixels: of a row and a column, and of all of them at most
_TOP, _BOTTOM, _GAP, _BAR = 26, 24, 6, 12
_PAPER, _INK, _DARK, _LIGHT = (255, 255, 255), (29, 33, 38), (20, 20, 20), (250, 250, 250)


def labelled_heat_map(
    values: npt.ArrayLike,
    rows: Sequence[str],
    columns: Sequence[object],
    title: str = "",
    axis: str = "step",
    low: float | None = None,
    high: float | None = None,
) -> npt.NDArray[np.uint8]:
    """Draw a table of numbers so that it can be read by itself: dark is low, bright is high, grey is no number.

    Numbers stand in the cells where these are wide enough, and else the last of every row beside it. Without
    matplotlib: the text is Pillow's, which comes with TensorBoard.

    Args:
        values: Shape ``(L, T)``: one row per layer, the first on top, and one column per step.
        rows: Name of every row; what all begin with is not drawn.
        columns: Step of every column.
        title: What is drawn.
        axis: What the columns are.
        low: Value of the darkest color; ``None`` takes the smallest finite value.
        high: Value of the brightest color; ``None`` takes the largest finite value.

    Returns:
        Shape ``(H, W, 3)``, red, green and blue.

    Raises:
        ValueError: If ``values`` is not a table with at least one number, with a name for every row and column.

    Example:
        >>> picture = labelled_heat_map([[1.0, 2.0], [3.0, 4.0]], ["encoder", "head"], [49, 99], "effective_rank")
        >>> picture.shape[2], picture.shape[1] > heat_map([[1.0, 2.0]]).shape[1]
        (3, True)
    """
    from PIL import Image, ImageDraw, ImageFont  # Lightning does not import it, so neither may our import

    table = np.asarray(values, dtype=float)
    if table.shape != (len(rows), len(columns)) or not table.size:
        raise ValueError(
            f"Expected `values` of shape {(len(rows), len(columns))}, a name for each row and column, at least one,"
            f" got {table.shape}."
        )
    low, high = _ends(table, low, high)
    font = ImageFont.load_default()
    height, width = max(1, min(_ROW, _HEIGHT // len(rows))), max(1, min(_COLUMN, _WIDTH // len(columns)))
    colors = heat_map(table, low, high, cell=1).repeat(height, axis=0).repeat(width, axis=1)
    tall, wide = colors.shape[:2]
    label = labels(rows)
    names = [_ascii(label[name]) for name in rows]
    left = _GAP + round(max(font.getlength(name) for name in names)) + _GAP
    numbers = round(max(font.getlength(_number(value)) for value in (*table[:, -1], low, high)))
    right = left + wide + _GAP + numbers + 2 * _GAP
    size = max(right + _BAR + _GAP + numbers + _GAP, _GAP + round(font.getlength(title)) + _GAP), _TOP + tall + _BOTTOM
    picture = Image.new("RGB", size, _PAPER)
    picture.paste(Image.fromarray(colors), (left, _TOP))
    bar = heat_map(np.linspace(1, 0, tall)[:, None], cell=1).repeat(_BAR, axis=1)
    picture.paste(Image.fromarray(bar), (right, _TOP))
    draw = ImageDraw.Draw(picture)

    def write(words: str, x: float, y: float, anchor: float = 0.0, ink: tuple[int, int, int] = _INK) -> None:
        """``anchor`` is the share of the words that is left of ``x``; ``y`` is their middle."""
        draw.text((x - anchor * font.getlength(words), y - 6), words, fill=ink, font=font)

    write(title, _GAP, _TOP / 2)
    for i in range(0, len(names), -(-10 // height)):  # where rows are too thin for a name each, every second, third ...
        middle = _TOP + height * (i + 0.5)
        write(names[i], left - _GAP, middle, 1.0)
        if width < _COLUMN:
            write(_number(table[i, -1]), left + wide + _GAP, middle)
    if width == _COLUMN:
        _write_cells(write, table, colors, (left, height, width))
    for i in sorted({0, (len(columns) - 1) // 2, len(columns) - 1}):
        share = 0.0 if i == 0 else 1.0 if i == len(columns) - 1 else 0.5
        words, x = f"{axis} {columns[i]}" if i == 0 else str(columns[i]), wide * (i + share) / len(columns)
        if i == 0 or x > font.getlength(f"{axis} {columns[0]}") + 40:
            write(words, left + x, _TOP + tall + _BOTTOM / 2, share)
    write(_number(high), right + _BAR + _GAP, _TOP + 6)
    write(_number(low), right + _BAR + _GAP, _TOP + max(tall - 6, 16))
    return np.asarray(picture)


def _write_cells(write: Any, table: npt.NDArray[Any], colors: npt.NDArray[Any], at: tuple[int, int, int]) -> None:
    left, height, width = at
    for (row, column), value in np.ndenumerate(table):
        x, y = width * (column + 0.5), height * (row + 0.5)
        bright = colors[int(y), int(x)] @ (0.3, 0.6, 0.1) > 110
        write(_number(value), left + x, _TOP + y, 0.5, _DARK if bright else _LIGHT)


def _ends(table: npt.NDArray[np.float64], low: float | None, high: float | None) -> tuple[float, float]:
    finite = table[np.isfinite(table)]
    low = (float(finite.min()) if finite.size else 0.0) if low is None else low
    return low, (float(finite.max()) if finite.size else low) if high is None else high


def _number(value: float) -> str:
    return f"{value:.3g}" if isfinite(value) else "-"


def _ascii(name: str) -> str:
    """The two ends of a long name, in characters that every font has."""
    name = name.encode("ascii", "replace").decode()
    return name if len(name) <= 48 else f"{name[:15]}...{name[-30:]}"
