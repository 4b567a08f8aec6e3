"""View points: what is drawn of layers that see two views of the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from lightning_collapse.functional.lidar import lidar_null
from lightning_collapse.monitoring.view_pairs import ViewPairs
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import Curve

VIEWS = "views"
THILAK = "Thilak et al., 2023, arXiv 2312.04000"
VIEW_CURVES = (
    Curve("recall_at_1", "rows whose nearest other view is their own", "0 to 1", "as at its start", family=VIEWS),
    Curve("alignment", "squared distance of two views on the sphere", "0 to 4", "near 0", family=VIEWS),
    Curve("uniformity", "log of the mean potential between rows", "-4 n / (n - 1) to 0", "near 0", family=VIEWS),
    Curve("lidar", "directions in which samples differ more than views", "1 to D", "near 1", THILAK, VIEWS),
)


def view_points(pairs: ViewPairs, step: int, sums: Mapping[str, list[float]]) -> list[Point]:
    """Points of recall, alignment and uniformity; given what ``ViewPairs.read`` returned, on the host."""
    pairs.judge(sums)
    points = []
    for layer, (n, hits, chances, apart, uniform) in sums.items():
        if layer in pairs.layers and n:
            recall, chance = hits / n, chances / n
            error = sqrt(max(recall * (1 - recall), chance) / n)
            values = {"alignment": apart / n, "uniformity": uniform / n}
            points.append(Point(VIEWS, layer, "recall_at_1", step, recall, int(n), chance, error=error))
            points += [Point(VIEWS, layer, name, step, value, int(n)) for name, value in values.items()]
    return points


def lidar_points(step: int, found: Mapping[str, list[float]], widths: Mapping[str, int]) -> list[Point]:
    """Points of LiDAR; given rank, excess and number of samples of layers, on the host, and how wide these are."""
    points = []
    for layer, (rank, _, n) in found.items():
        null = lidar_null(int(n), widths[layer])
        if null > 0:  # with as many features as samples there is nothing to read
            points.append(Point(VIEWS, layer, "lidar", step, rank, int(n), null))
    return points
