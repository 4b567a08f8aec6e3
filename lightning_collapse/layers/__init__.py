"""Layers that resist collapse: drop-in ones, and those that modules of a model are converted into."""

from lightning_collapse.layers.conversion import ConversionError, ConvertedModule, convert_modules, revert_modules
from lightning_collapse.layers.direct_predictor import DirectPredictor
from lightning_collapse.layers.etf_classifier import ETFClassifier, simplex_etf
from lightning_collapse.layers.fed_etf_head import FedETFHead

__all__ = [
    "ConversionError",
    "ConvertedModule",
    "DirectPredictor",
    "ETFClassifier",
    "FedETFHead",
    "convert_modules",
    "revert_modules",
    "simplex_etf",
]
