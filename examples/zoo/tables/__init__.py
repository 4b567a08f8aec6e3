"""Specimens of tables, graphs and images as tables."""

from . import corrupted_rows, deep_tanh, graph, labels_ride_along, missing_cells, permuted_pixels, unlike_targets

SPECIMENS = (
    *corrupted_rows.SPECIMENS,
    *graph.SPECIMENS,
    *permuted_pixels.SPECIMENS,
    *unlike_targets.SPECIMENS,
    *deep_tanh.SPECIMENS,
    *labels_ride_along.SPECIMENS,
    *missing_cells.SPECIMENS,
)
