"""Regularization: how far weights are from orthonormal, a Jacobian from symmetric, and samples from balanced."""

from lightning_collapse.functional.regularization.jacobian import jacobian_homeostasis, jacobian_norm
from lightning_collapse.functional.regularization.orthogonality import gram_error, parseval_step, soft_orthogonality
from lightning_collapse.functional.regularization.sample_weights import DecorrelatingWeights, decorrelating_weights

__all__ = [
    "DecorrelatingWeights",
    "decorrelating_weights",
    "gram_error",
    "jacobian_homeostasis",
    "jacobian_norm",
    "parseval_step",
    "soft_orthogonality",
]
