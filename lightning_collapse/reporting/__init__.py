"""Reporting: points to loggers and readers, the TensorBoard dashboard, its legend, and pictures for any logger."""

from lightning_collapse.reporting.containments import try_again
from lightning_collapse.reporting.dashboard import HEALTH, dashboard_layout
from lightning_collapse.reporting.heat_map import History, heat_map
from lightning_collapse.reporting.labelled_heat_map import labelled_heat_map
from lightning_collapse.reporting.logger_adapters import log_dashboard, log_data, log_histogram, log_image, log_text
from lightning_collapse.reporting.page import report
from lightning_collapse.reporting.publish import PointReader, publish
from lightning_collapse.reporting.spectrum import LOG10_EDGES, log10_histogram
from lightning_collapse.reporting.tables import TABLES, Table, legend
from lightning_collapse.reporting.verdicts import verdict_records

__all__ = [
    "HEALTH",
    "LOG10_EDGES",
    "TABLES",
    "History",
    "PointReader",
    "Table",
    "dashboard_layout",
    "heat_map",
    "labelled_heat_map",
    "legend",
    "log10_histogram",
    "log_dashboard",
    "log_data",
    "log_histogram",
    "log_image",
    "log_text",
    "publish",
    "report",
    "try_again",
    "verdict_records",
]
