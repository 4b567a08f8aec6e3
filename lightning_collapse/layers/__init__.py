"""Drop-in layers that resist collapse."""

from lightning_collapse.layers.direct_predictor import DirectPredictor
from lightning_collapse.layers.etf_classifier import ETFClassifier, simplex_etf
from lightning_collapse.layers.fed_etf_head import FedETFHead

__all__ = ["DirectPredictor", "ETFClassifier", "FedETFHead", "simplex_etf"]
