"""Feature learning: rich or lazy, when a representation begins to form, and which directions a network learns first."""

from lightning_collapse.functional.feature_learning.alignment import (
    KernelAlignment,
    SignSimilarity,
    kernel_alignment,
    kernel_alignment_null,
    representation_alignment,
    sign_similarity,
)
from lightning_collapse.functional.feature_learning.emergence import emergence_cosine
from lightning_collapse.functional.feature_learning.linear_modes import (
    ModeStrengths,
    mode_half_time,
    mode_strength_at,
    mode_strengths,
)
from lightning_collapse.functional.feature_learning.symmetry_breaking import (
    CriticalBeta,
    CriticalTemperature,
    critical_beta,
    critical_temperature,
)
from lightning_collapse.functional.feature_learning.tangent_kernel import projected_tangent_kernel, tangent_kernel
from lightning_collapse.functional.feature_learning.weight_change import (
    low_rank_weight,
    null_space_share,
    outlying_singular_values,
    relative_weight_change,
)

__all__ = [
    "CriticalBeta",
    "CriticalTemperature",
    "KernelAlignment",
    "ModeStrengths",
    "SignSimilarity",
    "critical_beta",
    "critical_temperature",
    "emergence_cosine",
    "kernel_alignment",
    "kernel_alignment_null",
    "low_rank_weight",
    "mode_half_time",
    "mode_strength_at",
    "mode_strengths",
    "null_space_share",
    "outlying_singular_values",
    "projected_tangent_kernel",
    "relative_weight_change",
    "representation_alignment",
    "sign_similarity",
    "tangent_kernel",
]
