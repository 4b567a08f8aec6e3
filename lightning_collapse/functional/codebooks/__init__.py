"""Codebooks of vector quantization: how many codes are in use, which are dead, and how they and the encoder move."""

from lightning_collapse.functional.codebooks.drift import (
    QuantizationReading,
    churn,
    codebook_motion,
    moved_idle_codes,
    quantization_reading,
    quantization_sums,
)
from lightning_collapse.functional.codebooks.usage import (
    code_counts,
    code_perplexity,
    dead_codes,
    miller_madow,
    missed_hits,
    unseen_mass,
    usage,
    usage_null,
)

__all__ = [
    "QuantizationReading",
    "churn",
    "code_counts",
    "code_perplexity",
    "codebook_motion",
    "dead_codes",
    "miller_madow",
    "missed_hits",
    "moved_idle_codes",
    "quantization_reading",
    "quantization_sums",
    "unseen_mass",
    "usage",
    "usage_null",
]
