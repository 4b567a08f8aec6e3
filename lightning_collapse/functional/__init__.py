"""Pure functions: tensors in, tensors out."""

from lightning_collapse.functional.attention_entropy import HeadEntropy, attention_entropy, entropy_bound
from lightning_collapse.functional.cdnv import Cdnv, cdnv
from lightning_collapse.functional.continual import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
)
from lightning_collapse.functional.evenness import eigenvalue_quartile_ratio, quartile_ratio, svd_entropy
from lightning_collapse.functional.geometry_phase import Phase, PhaseTracker
from lightning_collapse.functional.gradient_noise import GradientNoise, gradient_coherence, gradient_noise_scale
from lightning_collapse.functional.hyperspherical import LogKernel, gnc2
from lightning_collapse.functional.intrinsic_dimension import (
    LocalIntrinsicDimension,
    TwoNN,
    local_intrinsic_dimension,
    two_nn,
)
from lightning_collapse.functional.marchenko_pastur import MarchenkoPasturFit, marchenko_pastur_fit
from lightning_collapse.functional.minority import minority_cosine, minority_norm
from lightning_collapse.functional.nearest_center import nc4, nc5, nearest_class_center, neco_score
from lightning_collapse.functional.neural_collapse import between_rank, nc1, nc1_null
from lightning_collapse.functional.null import expected_under_isotropy
from lightning_collapse.functional.orthogonal_frame import (
    OrthogonalFrame,
    gof_error,
    norm_count_slope,
    orthogonal_frame,
)
from lightning_collapse.functional.plasticity import dead_fraction, dormant_fraction
from lightning_collapse.functional.power_law import PowerLaw, power_law_alpha, power_law_null
from lightning_collapse.functional.pq_index import pq_index
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
from lightning_collapse.functional.regression_collapse import (
    RegressionCollapseReading,
    nrc1,
    nrc2,
    nrc3,
    nrc3_gamma,
    regression_collapse,
)
from lightning_collapse.functional.rows import (
    alignment,
    dead_dimensions,
    direction_spread,
    feature_std,
    feature_std_floor,
    mean_cosine,
    relative_spread,
    uniformity,
)
from lightning_collapse.functional.self_duality import bias_collapse, nc3, unc3
from lightning_collapse.functional.simplex import etf_error, etf_error_floor, nc2_equiangular, nc2_equinorm
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
from lightning_collapse.functional.stability_gap import (
    min_accuracy,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)
from lightning_collapse.functional.vci import vci

__all__ = [
    "Cdnv",
    "GradientNoise",
    "HeadEntropy",
    "LocalIntrinsicDimension",
    "LogKernel",
    "MarchenkoPasturFit",
    "OrthogonalFrame",
    "Phase",
    "PhaseTracker",
    "PowerLaw",
    "RegressionCollapseReading",
    "TwoNN",
    "alignment",
    "alpha_req",
    "alpha_req_fit",
    "attention_entropy",
    "average_accuracy",
    "backward_transfer",
    "between_rank",
    "bias_collapse",
    "cdnv",
    "condition_number",
    "dead_dimensions",
    "dead_fraction",
    "direction_spread",
    "dormant_fraction",
    "effective_rank",
    "eigenvalue_effective_rank",
    "eigenvalue_quartile_ratio",
    "entropy_bound",
    "etf_error",
    "etf_error_floor",
    "expected_majority_fraction",
    "expected_under_isotropy",
    "feature_std",
    "feature_std_floor",
    "forgetting",
    "forward_transfer",
    "gnc2",
    "gof_error",
    "gradient_coherence",
    "gradient_noise_scale",
    "intransigence",
    "isotropy",
    "learning_accuracy",
    "local_intrinsic_dimension",
    "majority_fraction",
    "marchenko_pastur_fit",
    "mean_cosine",
    "mean_energy_share",
    "min_accuracy",
    "minority_cosine",
    "minority_norm",
    "nc1",
    "nc1_null",
    "nc2_equiangular",
    "nc2_equinorm",
    "nc3",
    "nc4",
    "nc5",
    "nearest_class_center",
    "neco_score",
    "nesum",
    "norm_count_slope",
    "nrc1",
    "nrc2",
    "nrc3",
    "nrc3_gamma",
    "numerical_rank",
    "orthogonal_frame",
    "participation_ratio",
    "power_law_alpha",
    "power_law_null",
    "pq_index",
    "quartile_ratio",
    "rankme",
    "regression_collapse",
    "relative_spread",
    "sign_diversity",
    "spectral_alignment",
    "srank",
    "stable_rank",
    "svd_entropy",
    "top_k_share",
    "two_nn",
    "unbiased_participation_ratio",
    "unc3",
    "uniformity",
    "vci",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
]
