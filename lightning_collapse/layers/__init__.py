"""Drop-in layers that resist collapse."""

from lightning_collapse.layers.etf_classifier import ETFClassifier, simplex_etf
from lightning_collapse.layers.fed_etf_head import FedETFHead

__all__ = ["ETFClassifier", "FedETFHead", "simplex_etf"]
