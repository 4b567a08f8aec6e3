"""Labelled heat map: a heat map with its title, the names of its rows, its steps, its color scale and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_collapse.reporting.heat_map import heat_map
from lightning_collapse.reporting.labels import labels

_ROW, _COLUMN, _WIDTH, _HEIGHT = 18, 44, 640, 1152  # pixels: of a row and a column, and of all of them at most
_TOP, _BOTTOM, _GAP, _BAR, _LETTER = 26, 24, 6, 12, 14
_DARK, _LIGHT = (20, 20, 20), (250, 250, 250)


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
    table = np.asarray(values, dtype=float)
    if table.shape != (len(rows), len(columns)) or not table.size:
        raise ValueError(
            f"Expected `values` of shape {(len(rows), len(columns))}, a name for each row and column, at least one,"
            f" got {table.shape}."
        )
    low, high = _ends(table, low, high)
    height, width = max(1, min(_ROW, _HEIGHT // len(rows))), max(1, min(_COLUMN, _WIDTH // len(columns)))
    colors = heat_map(table, low, high, cell=1).repeat(height, axis=0).repeat(width, axis=1)
    tall, wide = colors.shape[:2]
    label = labels(rows)
    names = [_ascii(label[name]) for name in rows]
    left = _GAP + max(map(_length, [*names, axis])) + _GAP
    numbers = max(_length(_number(value)) for value in (*table[:, -1], low, high))
    right = left + wide + _GAP + numbers + 2 * _GAP
    size = _TOP + tall + _BOTTOM, max(right + _BAR + _GAP + numbers + _GAP, _GAP + _length(title) + _GAP)
    picture = np.full((*size, 3), 255, dtype=np.uint8)
    picture[_TOP : _TOP + tall, left : left + wide] = colors
    picture[_TOP : _TOP + tall, right : right + _BAR] = heat_map(np.linspace(1, 0, tall)[:, None], cell=1)
    _write(picture, title, _GAP, _TOP / 2)
    for i in range(0, len(names), -(-10 // height)):  # where rows are too thin for a name each, every second, third ...
        middle = _TOP + height * (i + 0.5)
        _write(picture, names[i], left - _GAP, middle, 1.0)
        if width < _COLUMN:
            _write(picture, _number(table[i, -1]), left + wide + _GAP, middle)
    if width == _COLUMN:
        _write_cells(picture, table, (left, height, width))
    _write(picture, axis, left - _GAP, _TOP + tall + _BOTTOM / 2, 1.0)
    _write_columns(picture, [str(column) for column in columns], left, wide, _TOP + tall + _BOTTOM / 2)
    _write(picture, _number(high), right + _BAR + _GAP, _TOP + 6)
    _write(picture, _number(low), right + _BAR + _GAP, _TOP + max(tall - 6, 18))
    return picture


def _write_cells(picture: npt.NDArray[np.uint8], table: npt.NDArray[Any], at: tuple[int, int, int]) -> None:
    left, height, width = at
    for (row, column), value in np.ndenumerate(table):
        x, y = left + width * (column + 0.5), _TOP + height * (row + 0.5)
        bright = picture[int(y), int(x)] @ (0.3, 0.6, 0.1) > 110
        _write(picture, _number(value), x, y, 0.5, _DARK if bright else _LIGHT)


def _write_columns(picture: npt.NDArray[np.uint8], names: Sequence[str], left: int, wide: int, y: float) -> None:
    """The name of every column where there is room for it, else of the first, one in the middle, and the last."""
    each, last = wide / len(names), len(names) - 1
    if all(_length(name) < each for name in names):
        for i, name in enumerate(names):
            _write(picture, name, left + each * (i + 0.5), y, 0.5)
        return
    for i, share in {0: 0.0, last // 2: 0.5, last: 1.0}.items():
        if i in (0, last) or _length(names[0]) + _length(names[i]) + _length(names[last]) < wide / 2:
            _write(picture, names[i], left + each * (i + share), y, share)


def _write(
    picture: npt.NDArray[np.uint8], words: str, x: float, y: float, anchor: float = 0.0, ink: tuple[int, ...] = _DARK
) -> None:
    """Draw words of which the share ``anchor`` is left of ``x``, and whose middle is at ``y``."""
    if words:
        mask = np.concatenate([_glyph(letter) for letter in words], axis=1)
        top, start = max(round(y - _LETTER / 2), 0), max(round(x - anchor * mask.shape[1]), 0)
        place = picture[top : top + _LETTER, start : start + mask.shape[1]]
        mask = mask[: place.shape[0], : place.shape[1], None]
        place[:] = place + (np.array(ink) - place.astype(float)) * mask


def _length(words: str) -> int:
    return sum(_glyph(letter).shape[1] for letter in words)


@lru_cache(maxsize=256)
def _glyph(letter: str) -> npt.NDArray[np.float64]:
    """How much ink there is, shape ``(14, W)``; kept, as drawing a letter takes longer than all the rest."""
    from PIL import Image, ImageDraw, ImageFont  # Lightning does not import it, so neither may our import

    font = ImageFont.load_default()
    mask = Image.new("L", (ceil(font.getlength(letter)), _LETTER))
    ImageDraw.Draw(mask).text((0, 1), letter, fill=255, font=font)
    return np.asarray(mask) / 255


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
