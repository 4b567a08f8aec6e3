"""A zoo of planted failures, their healthy twins, and healthy runs that look dangerous; ``python -m examples.zoo``."""

from . import (
    agents,
    contrastive,
    deep_plain,
    dormant_units,
    exploding_loss,
    forgetting,
    healthy,
    invariance_alone,
    minority,
    no_covariance,
    no_predictor,
    over_compression,
    posterior,
    sequences,
    sharp_attention,
    tables,
)
from .generative import GENERATIVE
from .vision import VISION

SPECIMENS = (
    invariance_alone.SPECIMEN,
    no_predictor.SPECIMEN,
    posterior.SPECIMEN,
    deep_plain.SPECIMEN,
    no_covariance.SPECIMEN,
    contrastive.SPECIMEN,
    exploding_loss.SPECIMEN,
    sharp_attention.SPECIMEN,
    minority.SPECIMEN,
    over_compression.SPECIMEN,
    forgetting.SPECIMEN,
    dormant_units.SPECIMEN,
    *healthy.SPECIMENS,
    *VISION,
    *GENERATIVE,
    *(*sequences.SPECIMENS, *agents.SPECIMENS, *tables.SPECIMENS),
)
