"""SVG plots: lines, rasters and time lines as text; no script, no font, nothing from outside, colors from the page."""

from __future__ import annotations

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from math import ceil, floor, inf, isfinite, log10

import numpy as np
import numpy.typing as npt

from lightning_collapse.reporting.heat_map import heat_map

COLORS = 8
"""How many lines a plot can tell apart; the page gives them the classes ``c0`` to ``c7``."""

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 50, 10, 8, 26
_LABELS, _LETTERS = 216, 26  # of the rows of a raster, at most
_ROW = 16

Marks = Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Line:
    """A curve to draw.

    Attributes:
        name: What the legend calls it.
        steps: In ascending order.
        values: As many; a value that is not finite leaves a gap, and a tick on the floor of the plot.
        style: Class of the page's style sheet: ``c0`` to ``c7``, or ``null``.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    style: str


def text(value: object) -> str:
    """Any value as text for HTML and SVG, elements and quoted attributes alike; what cannot be seen shows as U+FFFD."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value)))


def prose(value: object) -> str:
    """Text for HTML, in which what stands between backticks is code.

    Example:
        >>> prose("add `VICReg()` <here>")
        'add <code>VICReg()</code> &lt;here&gt;'
    """
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(value))


def short(name: str, length: int) -> str:
    """A name in at most ``length`` characters: of layers the two ends tell most."""
    tail = (length - 1) * 2 // 3
    return name if len(name) <= length else f"{name[: length - 1 - tail]}…{name[-tail:]}"


def apart(names: Sequence[str]) -> list[str]:
    """Shortened names, of which those that have become equal begin with a number.

    Example:
        >>> apart(["a…z", "b", "a…z"])
        ['1: a…z', 'b', '2: a…z']
    """
    seen: Counter[str] = Counter()
    many, told = Counter(names), []
    for name in names:
        seen[name] += 1
        told.append(f"{seen[name]}: {name}" if many[name] > 1 and name else name)
    return told


def number(value: float) -> str:
    """Three digits, as a reader wants them."""
    if not isfinite(value):
        return "no number" if value != value else "∞" if value > 0 else "-∞"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def thin(steps: Sequence[int], values: Sequence[float], most: int) -> tuple[list[int], list[float]]:
    """At most ``most`` points of a curve: the ends, and of every stretch the lowest, the highest and a missing value.

    Args:
        steps: In ascending order.
        values: As many.
        most: At least 8.

    Returns:
        Steps and values that are left; a spike, and where a number was missing, are still there.

    Example:
        >>> steps, values = thin(range(1000), [0.0] * 500 + [9.0] + [0.0] * 499, most=50)
        >>> len(steps) <= 50, max(values), steps[0], steps[-1]
        (True, 9.0, 0, 999)
    """
    count = len(steps)
    if count <= most:
        return list(steps), list(values)
    edges = np.linspace(0, count, (most - 2) // 3 + 1).astype(int)
    curve = np.asarray(values, dtype=float)
    keep = {0, count - 1}
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = curve[low:high]
        finite = np.isfinite(part)
        if finite.any():
            keep |= {low + int(np.where(finite, part, inf).argmin()), low + int(np.where(finite, part, -inf).argmax())}
        if not finite.all():
            keep.add(low + int(finite.argmin()))
    chosen = sorted(keep)
    return [steps[i] for i in chosen], [float(values[i]) for i in chosen]


def value_range(lines: Sequence[Line]) -> tuple[float, float, bool]:
    """Smallest and largest finite value, with some air, and whether only a logarithmic axis shows both."""
    values = [value for line in lines for value in line.values if isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low > 0 and high / low > 100:
        return 10 ** floor(log10(low)), 10 ** ceil(log10(high)), True
    if low >= 0 and low < 0.5 * high:
        low = 0.0  # a share of the height is a share of the value
    air = 0.05 * (high - low) or max(0.05 * abs(high), 0.5 if high == 0 else 0.0)
    return (low if low == 0 else low - air), high + air, False


def line_plot(
    title: str,
    lines: Sequence[Line],
    span: tuple[int, int],
    limits: tuple[float, float, bool],
    marks: Marks = (),
    height: int = 200,
) -> str:
    """Curves over steps.

    Args:
        title: What it shows, for those who hear the page.
        lines: What to draw.
        span: First and last step of the axis.
        limits: Of the values, as :func:`value_range` tells.
        marks: Steps to mark by a vertical line, each with its word.
        height: Of the picture, which is 400 wide.

    Returns:
        An ``<svg>`` element.
    """
    floor_ = height - _BOTTOM
    low, high, logarithmic = limits

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - span[0]) / max(span[1] - span[0], 1)

    def y(value: float) -> float:
        share = (log10(value / low) / log10(high / low)) if logarithmic else (value - low) / (high - low)
        return floor_ - (floor_ - _TOP) * share

    parts = []
    for value in _decades(low, high, height // 40) if logarithmic else _ticks(low, high, height // 50):
        parts.append(f'<path class="rule" d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 5}" y="{y(value) + 4:.1f}">{text(number(value))}</text>')
    parts += _step_axis(span, x, height, _LEFT)
    for step, word in marks:
        parts.append(f'<path class="mark" d="M{x(step):.1f} {_TOP}V{floor_}"><title>{text(word)}</title></path>')
    for line in lines:
        name = f"<title>{text(line.name)}</title>"
        if path := _path(line, x, y):
            parts.append(f'<path class="line {line.style}" d="{path}">{name}</path>')
        lost = [step for step, value in zip(line.steps, line.values, strict=True) if not isfinite(value)]
        if lost:
            ticks = "".join(f"M{x(step):.1f} {floor_}v-7" for step in lost)
            parts.append(f'<path class="lost {line.style}" d="{ticks}">{name}</path>')
    return _svg(title, height, parts)


def raster(
    title: str,
    rows: Sequence[str],
    steps: Sequence[int],
    values: npt.ArrayLike,
    limits: tuple[float, float],
    marks: Marks = (),
    numeric: bool = False,
) -> str:
    """A table of numbers as colors, one column per point: dark is low, bright is high, grey is no number.

    Args:
        title: What it shows, for those who hear the page.
        rows: Name of every row, from top to bottom; an empty one is not written.
        steps: Step of every column.
        values: Shape ``(len(rows), len(steps))``.
        limits: Values of the darkest and of the brightest color.
        marks: Steps to mark by a vertical line, each with its word.
        numeric: Whether the rows are an axis, of which a name says where the lower edge of its row is.

    Returns:
        An ``<svg>`` element.
    """
    left = _LEFT if numeric else max(44, min(8 * max(map(len, rows)) + 12, _LABELS))
    tall = 130.0 if numeric else float(_ROW * len(rows))
    width, height = _WIDTH - left - _RIGHT, _TOP + tall + _BOTTOM
    each = tall / len(rows)
    shown = apart([short(name, _LETTERS) for name in rows])
    parts = [
        _axis_name(left, height),
        f'<image x="{left}" y="{_TOP}" width="{width}" height="{tall:.0f}" preserveAspectRatio="none"'
        f' href="{_png(heat_map(values, *limits, cell=1))}"/>',
    ]
    for i, name in enumerate(rows):
        below = _TOP + each * (i + (1 if numeric else 0.5)) + 4
        full = f"<title>{text(name)}</title>" if len(name) > _LETTERS else ""
        if name:
            words = text(shown[i])
            parts.append(f'<text class="y" x="{left - 5}" y="{below:.1f}">{words}{full}</text>')
    column = width / len(steps)
    for step, word in marks:
        at = left + column * (sum(s < step for s in steps))
        parts.append(f'<path class="mark" d="M{at:.1f} {_TOP}v{tall:.0f}"><title>{text(word)}</title></path>')
    last = len(steps) - 1
    for i in sorted({0, last // 2, last}):
        anchor = "start" if i == 0 else "end" if i == last else "middle"
        at = left + (0 if i == 0 else width if i == last else column * (i + 0.5))
        parts.append(f'<text x="{at:.1f}" y="{height - 7:.0f}" text-anchor="{anchor}">{steps[i]}</text>')
    return _svg(title, height, parts)


def color_bar() -> str:
    """The colors of :func:`raster` from low to high, as the address of a picture."""
    return _png(heat_map(np.linspace(0, 1, 64)[None], cell=1))


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    label = text(title)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{label}"><title>{label}</title>'
        f"{''.join(parts)}</svg>"
    )


def _step_axis(span: tuple[int, int], x: Callable[[float], float], height: float, left: float) -> list[str]:
    parts = [_axis_name(left, height)]
    for step in (tick for tick in _ticks(*span, 4) if tick == int(tick)):
        anchor = "start" if x(step) < 20 else "end" if x(step) > _WIDTH - 25 else "middle"
        parts.append(f'<text x="{x(step):.1f}" y="{height - 7:.0f}" text-anchor="{anchor}">{step:.0f}</text>')
    return parts


def _axis_name(left: float, height: float) -> str:
    return f'<text class="y" x="{left - 12:.0f}" y="{height - 7:.0f}">step</text>'


def _path(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """Straight pieces between neighbours; a point without a neighbour is a dot, which a round cap makes visible."""
    parts, pen = [], False
    for step, value in zip(line.steps, line.values, strict=True):
        if not isfinite(value):
            pen = False
            continue
        at = f"{x(step):.1f} {y(value):.1f}"
        parts.append(f"L{at}" if pen else f"M{at}h0")
        pen = True
    return "".join(parts)


def _ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about
    if not raw > 0:
        return [low]
    power = 10.0 ** floor(log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= 0.7 * raw)
    return [i * step for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float, about: int) -> list[float]:
    first, last = round(log10(low)), round(log10(high))
    return [10.0**i for i in range(first, last + 1, ceil((last - first) / about))]


def _png(image: npt.NDArray[np.uint8]) -> str:
    from PIL import Image  # Lightning does not import it, so neither may `import lightning_collapse`

    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
