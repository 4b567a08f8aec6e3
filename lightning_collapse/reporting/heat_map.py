"""Heat map: one measure over all layers and the whole run, and the bounded table it is drawn from."""

from collections.abc import Mapping
from math import nan
from typing import Any

import numpy as np
import numpy.typing as npt

_MAX_PIXELS = 1024

# lightness rises evenly from 14 to 92 (CIE L*) while the hue turns from violet over blue and green to yellow
_COLORS = np.array(
    [
        (43, 23, 82),
        (32, 52, 115),
        (26, 80, 135),
        (27, 110, 140),
        (36, 139, 146),
        (45, 170, 148),
        (49, 203, 112),
        (156, 224, 85),
        (244, 237, 84),
    ]
)
_NO_VALUE = (128, 128, 128)


def heat_map(
    values: npt.ArrayLike, low: float | None = None, high: float | None = None, cell: int = 16
) -> npt.NDArray[np.uint8]:
    """Draw a table of numbers: dark is low, bright is high, grey is no number.

    Args:
        values: Shape ``(L, T)``: one row per layer, the first on top, and one column per step.
        low: Value of the darkest color; ``None`` takes the smallest finite value.
        high: Value of the brightest color; ``None`` takes the largest finite value.
        cell: Pixels per value in both directions; fewer where the picture would exceed 1024 pixels. Of more than 1024
            steps every second, third, ... is drawn, the latest always.

    Returns:
        Shape ``(H, W, 3)``, red, green and blue.

    Raises:
        ValueError: If ``values`` is not a table with at least one number.

    Example:
        >>> heat_map([[1.0, 2.0], [3.0, float("nan")]], cell=4).shape
        (8, 8, 3)
    """
    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"Expected `values` of shape (layers, steps), both at least 1, got {table.shape}.")
    stride = -(-table.shape[1] // _MAX_PIXELS)
    table = table[:, ::-1][:, ::stride][:, ::-1]  # counted from the end, so that the latest step stays
    finite = np.isfinite(table)
    low = np.min(table, where=finite, initial=np.inf) if low is None else low
    high = np.max(table, where=finite, initial=-np.inf) if high is None else high
    span = high - low
    # a constant table gets the middle color, and the same numbers are used for one without a finite value
    position = (np.where(finite, table, low) - low) / span if span > 0 else np.full(table.shape, 0.5)
    knots = np.linspace(0, 1, len(_COLORS))
    colors = np.stack([np.interp(position, knots, channel) for channel in _COLORS.T], axis=-1)
    colors[~finite] = _NO_VALUE
    size = max(1, min(cell, _MAX_PIXELS // max(table.shape)))
    return colors.round().astype(np.uint8).repeat(size, axis=0).repeat(size, axis=1)


class History:
    """One measure over all layers and the whole run, in at most ``columns`` columns.

    When the table is full, neighbouring columns are merged and keep the later of their two points; from then on a
    column stands for twice as many points. So memory does not grow with the run, and the latest point is always there.

    Args:
        columns: Largest number of columns.

    Attributes:
        steps: The step of every column.

    Example:
        >>> history = History(columns=2)
        >>> for step in range(5):
        ...     history.append(step, {"encoder": float(step)})
        >>> history.steps, history.values
        ([3, 4], array([[3., 4.]]))
    """

    def __init__(self, columns: int = 256) -> None:
        if columns < 1:
            raise ValueError(f"`columns` must be at least 1, got {columns}.")
        self.columns = columns
        self.steps: list[int] = []
        self._rows: dict[str, list[float]] = {}
        self._seen = 0
        self._stride = 1

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def layers(self) -> list[str]:
        """The layer of every row, in the order of their first points."""
        return list(self._rows)

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """Shape ``(len(layers), len(steps))``; NaN where a layer has no point."""
        return np.array(list(self._rows.values()), dtype=float).reshape(len(self._rows), len(self.steps))

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add the point of ``step``: one value per layer."""
        while len(self.steps) >= self.columns and self._seen % self._stride == 0:
            self._halve()
        if self._seen % self._stride:  # the last column still waits for its last point
            self._keep(range(len(self.steps) - 1))
        for layer in values:
            self._rows.setdefault(layer, [nan] * len(self.steps))
        self.steps.append(int(step))
        for layer, row in self._rows.items():
            row.append(float(values.get(layer, nan)))
        self._seen += 1

    def state_dict(self) -> dict[str, Any]:
        """The table as lists, dicts, numbers and strings."""
        rows = {layer: list(row) for layer, row in self._rows.items()}
        return {"steps": list(self.steps), "rows": rows, "seen": self._seen, "stride": self._stride}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the table of :meth:`state_dict`, merging columns if it has more than ``columns``."""
        self.steps = list(state["steps"])
        self._rows = {layer: list(row) for layer, row in state["rows"].items()}
        self._seen, self._stride = state["seen"], state["stride"]
        while len(self.steps) > self.columns:
            self._halve()

    def _halve(self) -> None:
        last = len(self.steps) - 1
        self._keep([i for i in range(last + 1) if i % 2 or i == last])
        self._stride *= 2

    def _keep(self, columns: range | list[int]) -> None:
        self.steps = [self.steps[i] for i in columns]
        self._rows = {layer: [row[i] for i in columns] for layer, row in self._rows.items()}
