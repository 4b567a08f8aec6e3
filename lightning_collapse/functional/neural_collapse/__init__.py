"""Neural collapse: NC1 to NC5, their generalizations, and collapse of rare classes."""

from lightning_collapse.functional.neural_collapse.cdnv import Cdnv, cdnv
from lightning_collapse.functional.neural_collapse.fisher import fisher_discriminant_null, fisher_discriminant_ratio
from lightning_collapse.functional.neural_collapse.gnc2 import LogKernel, gnc2
from lightning_collapse.functional.neural_collapse.gof import (
    OrthogonalFrame,
    gof_error,
    norm_count_slope,
    orthogonal_frame,
)
from lightning_collapse.functional.neural_collapse.minority import minority_cosine, minority_norm
from lightning_collapse.functional.neural_collapse.nc1 import between_rank, nc1, nc1_null
from lightning_collapse.functional.neural_collapse.nc2 import (
    etf_error,
    etf_error_floor,
    nc2_equiangular,
    nc2_equinorm,
)
from lightning_collapse.functional.neural_collapse.nc3 import bias_collapse, nc3, unc3
from lightning_collapse.functional.neural_collapse.nc4 import nc4, nc5, nearest_class_center, neco_score
from lightning_collapse.functional.neural_collapse.nulls import collapse_nulls
from lightning_collapse.functional.neural_collapse.vci import vci

__all__ = [
    "Cdnv",
    "LogKernel",
    "OrthogonalFrame",
    "between_rank",
    "bias_collapse",
    "cdnv",
    "collapse_nulls",
    "etf_error",
    "etf_error_floor",
    "fisher_discriminant_null",
    "fisher_discriminant_ratio",
    "gnc2",
    "gof_error",
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
    "norm_count_slope",
    "orthogonal_frame",
    "unc3",
    "vci",
]
