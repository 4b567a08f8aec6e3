"""Layers that resist collapse: drop-in ones, and those that modules of a model are converted into."""

from lightning_collapse.layers.attention_temperature import AttentionTemperature
from lightning_collapse.layers.augmented_shortcut import AugmentedBranch, AugmentedShortcut
from lightning_collapse.layers.auxiliary_head import AuxiliaryHead
from lightning_collapse.layers.conversion import ConversionError, ConvertedModule, convert_modules, revert_modules
from lightning_collapse.layers.direct_predictor import DirectPredictor
from lightning_collapse.layers.ema_vector_quantizer import EMAVectorQuantizer
from lightning_collapse.layers.etf_classifier import ETFClassifier, simplex_etf
from lightning_collapse.layers.fed_etf_head import FedETFHead
from lightning_collapse.layers.fixed_classifier import FixedClassifier
from lightning_collapse.layers.growing_classifier import GrowingClassifier, grow_head
from lightning_collapse.layers.ha_frame_classifier import HAFrameClassifier
from lightning_collapse.layers.head_temperature import HeadTemperature
from lightning_collapse.layers.inverse_lipschitz import InverseLipschitzDecoder
from lightning_collapse.layers.layer_scale import LayerScale, ReZero, layer_scale_init
from lightning_collapse.layers.mv_split import MVSplitResidual
from lightning_collapse.layers.nested_dropout import NestedDropout
from lightning_collapse.layers.normalized_features import CosineClassifier, NormalizedFeatures, required_scale
from lightning_collapse.layers.reparametrized import Reparametrized
from lightning_collapse.layers.series_activation import SeriesActivation
from lightning_collapse.layers.sigma_reparam import SigmaReparam
from lightning_collapse.layers.sim_vq import SimVQ
from lightning_collapse.layers.sparse_etf_classifier import SparseETFClassifier
from lightning_collapse.layers.vbll import VBLLClassifier, VBLLRegression
from lightning_collapse.layers.vector_quantizer import Quantized, VectorQuantizer

__all__ = [
    "AttentionTemperature",
    "AugmentedBranch",
    "AugmentedShortcut",
    "AuxiliaryHead",
    "ConversionError",
    "ConvertedModule",
    "CosineClassifier",
    "DirectPredictor",
    "EMAVectorQuantizer",
    "ETFClassifier",
    "FedETFHead",
    "FixedClassifier",
    "GrowingClassifier",
    "HAFrameClassifier",
    "HeadTemperature",
    "InverseLipschitzDecoder",
    "LayerScale",
    "MVSplitResidual",
    "NestedDropout",
    "NormalizedFeatures",
    "Quantized",
    "ReZero",
    "Reparametrized",
    "SeriesActivation",
    "SigmaReparam",
    "SimVQ",
    "SparseETFClassifier",
    "VBLLClassifier",
    "VBLLRegression",
    "VectorQuantizer",
    "convert_modules",
    "grow_head",
    "layer_scale_init",
    "required_scale",
    "revert_modules",
    "simplex_etf",
]
