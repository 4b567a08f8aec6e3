"""Run dashboard: charts for what a run has drawn so far, and what these mean; sent anew when a chart is new."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.loggers import Logger
from torch.utils.weak import WeakIdKeyDictionary

from lightning_collapse.reporting.dashboard import dashboard_layout
from lightning_collapse.reporting.logger_adapters import log_dashboard, log_data, log_text
from lightning_collapse.reporting.nulls import NULLS, null_records
from lightning_collapse.reporting.tables import legend
from lightning_collapse.utilities.points import Point

Kind = tuple[str, str]
"""Family and measure."""


@dataclass
class _Drawn:
    """What a logger has: a curve of every kind, the kinds it was told the meaning of, and the nulls by curve."""

    curves: dict[Kind, str] = field(default_factory=dict)
    told: set[Kind] = field(default_factory=set)
    nulls: dict[str, float] = field(default_factory=dict)


_DRAWN: Any = WeakIdKeyDictionary()  # by identity: a logger of the user's own need not be hashable


def update_dashboard(logger: Logger, points: Sequence[Point]) -> None:
    """Lay the dashboard of ``logger`` out for the curves that it has, if one among ``points`` is of a new kind.

    So no chart is empty, whichever monitors there are and whenever they begin. What the new curves mean is told once,
    as the text ``legend/curves`` (text tabs sort by name: verdicts come first), and nulls that have moved as data.
    """
    if (drawn := _DRAWN.get(logger)) is None:
        drawn = _DRAWN[logger] = _Drawn()
    new = {kind: point for point in points if (kind := (point.family, point.measure)) not in drawn.curves}
    if new:
        drawn.curves |= {kind: point.key for kind, point in new.items()}
        log_dashboard(logger, dashboard_layout(drawn.curves.values()))
        kinds = {(family.removeprefix("val/"), measure) for family, measure in new} - drawn.told
        drawn.told |= kinds
        if len(table := legend(kinds).splitlines()) > 2:
            log_text(logger, "legend/curves", "\n".join(table), points[0].step)
    if records := null_records(points, drawn.nulls):
        log_data(logger, NULLS, records, points[0].step)
