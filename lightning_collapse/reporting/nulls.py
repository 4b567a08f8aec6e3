"""Nulls as data: what noise of the same size would read beside a curve, logged where it has moved."""

import json
from collections.abc import MutableMapping, Sequence
from contextlib import suppress

from lightning_collapse.reporting.events import Run
from lightning_collapse.utilities.points import Point

NULLS = "legend/nulls_json"
_SCHEMA = 1
_MOVED = 0.001  # of its value: nulls move with the number of rows, which is the same at nearly every point


def null_records(points: Sequence[Point], last: MutableMapping[str, float]) -> list[str]:
    """The nulls that have moved by more than a thousandth, each as one line of JSON.

    Args:
        points: Of one step.
        last: What was recorded last, by the name of the curve; kept up to date.

    Example:
        >>> last = {}
        >>> null_records([Point("collapse", "z", "effective_rank", 9, 3.0, null=7.5)], last)
        ['{"schema": 1, "curve": "collapse/z/effective_rank", "step": 9, "null": 7.5}']
        >>> null_records([Point("collapse", "z", "effective_rank", 19, 3.0, null=7.505)], last)
        []
    """
    records = []
    for point in points:
        if point.null == point.null:
            before = last.get(key := point.key)
            if before is None or abs(point.null - before) > _MOVED * abs(before):
                last[key] = point.null
                record = {"schema": _SCHEMA, "curve": key, "step": point.step, "null": float(f"{point.null:.4g}")}
                records.append(json.dumps(record))
    return records


def find_nulls(run: Run) -> dict[str, dict[int, float]]:
    """The nulls of a run by curve and step; each holds until the next one.

    Example:
        >>> find_nulls(Run("a", texts={NULLS: {9: '{"schema": 1, "curve": "a/b/c", "step": 9, "null": 7.5}'}}))
        {'a/b/c': {9: 7.5}}
    """
    nulls: dict[str, dict[int, float]] = {}
    for line in "\n".join(run.texts.get(NULLS, {}).values()).splitlines():
        with suppress(ValueError, TypeError, KeyError):  # of a later version, or not written by a monitor
            record = json.loads(line)
            if record["schema"] == _SCHEMA:
                nulls.setdefault(str(record["curve"]), {})[int(record["step"])] = float(record["null"])
    return {curve: dict(sorted(steps.items())) for curve, steps in nulls.items()}
