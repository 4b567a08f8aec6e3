"""Pure functions: tensors in, tensors out."""

from lightning_collapse.functional.null import expected_under_isotropy
from lightning_collapse.functional.rank import (
    effective_rank,
    eigenvalue_effective_rank,
    nesum,
    numerical_rank,
    participation_ratio,
    rankme,
    srank,
    stable_rank,
    unbiased_participation_ratio,
)
from lightning_collapse.functional.rows import (
    alignment,
    dead_dimensions,
    feature_std,
    feature_std_floor,
    mean_cosine,
    relative_spread,
    uniformity,
)
from lightning_collapse.functional.spectral_alignment import (
    expected_majority_fraction,
    majority_fraction,
    mean_energy_share,
    sign_diversity,
    spectral_alignment,
)
from lightning_collapse.functional.spectrum_shape import (
    alpha_req,
    alpha_req_fit,
    condition_number,
    isotropy,
    top_k_share,
)

__all__ = [
    "alignment",
    "alpha_req",
    "alpha_req_fit",
    "condition_number",
    "dead_dimensions",
    "effective_rank",
    "eigenvalue_effective_rank",
    "expected_majority_fraction",
    "expected_under_isotropy",
    "feature_std",
    "feature_std_floor",
    "isotropy",
    "majority_fraction",
    "mean_cosine",
    "mean_energy_share",
    "nesum",
    "numerical_rank",
    "participation_ratio",
    "rankme",
    "relative_spread",
    "sign_diversity",
    "spectral_alignment",
    "srank",
    "stable_rank",
    "top_k_share",
    "unbiased_participation_ratio",
    "uniformity",
]
