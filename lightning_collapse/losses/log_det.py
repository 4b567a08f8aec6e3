"""Log-determinant barrier before a singular covariance: every direction keeps some variance."""

import math

import torch
from torch import Tensor

from lightning_collapse.losses.support.jitter import JitteredCovarianceLoss, center_with_jitter, smaller_side
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.arguments import require_positive
from lightning_collapse.utilities.registry import register_loss


@full_precision
def log_det_barrier(features: Tensor, target_std: float = 1.0, eps: float = 1e-4, jitter: float = 1e-5) -> Tensor:
    """The value of :class:`LogDetBarrier` on the covariance of this batch.

    Collective: every process must call it; three all-reduces, about ``D * D`` numbers.

    Args:
        features: Representations, shape ``(N, D)``, with at least two rows over all processes.
        target_std: Standard deviation that every direction is to have, in units of the features.
        eps: Share of the target variance that is added to all directions: the barrier is finite.
        jitter: Standard deviation of what is added to tell equal rows apart, in units of the features.

    Returns:
        Scalar, at least ``float32``, the value on the global batch.

    Raises:
        ValueError: If ``features`` is not a matrix, or if there are fewer than two rows over all processes.

    Example:
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> round(log_det_barrier(features).item(), 3)
        3.587
    """
    batch = center_with_jitter("log_det_barrier", _double(features), jitter)
    return _divergence(smaller_side(batch), features.shape[1], target_std, eps).to(features.dtype)


def _double(features: Tensor) -> Tensor:
    # what is divided by has a condition of 1e7 and more: half of the directions may well have no variance
    return features.to(accumulation_dtype(features.device)) if features.is_floating_point() else features


def _divergence(matrix: Tensor, dim: int, target_std: float, eps: float) -> Tensor:
    matrix = matrix / target_std**2
    trace = matrix.diagonal().sum()
    # beside variances so large that `eps` is below their rounding, that rounding takes its place
    ridge = (dim * torch.finfo(matrix.dtype).eps * trace.detach()).clamp_min(eps)
    factor, _ = torch.linalg.cholesky_ex(
        matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    )
    log_det = 2 * factor.diagonal().log().sum() + (dim - len(matrix)) * ridge.log()
    divergence: Tensor = (trace / dim - 1) / (1 + eps) - log_det / dim + math.log1p(eps)
    return divergence


@register_loss
class LogDetBarrier(JitteredCovarianceLoss):
    r"""Keeps every direction of feature space away from zero variance, and the covariance near a multiple of identity.

    .. math:: \frac{1}{D} \big(\operatorname{tr} A - \log\det A\big) - 1, \qquad
        A = \frac{C / \gamma^2 + \epsilon I}{1 + \epsilon}

    which is :math:`\tfrac{2}{D}` of the Kullback-Leibler divergence between Gaussians of covariance :math:`A` and
    :math:`I`: 0 at :math:`C = \gamma^2 I` and only there. The trace keeps features from growing without bound, which a
    log-determinant alone rewards. With ``N - 1 < D`` rows some directions have no variance, and it reads at least
    ``1 - (N - 1) / D`` of its value at collapse: ``momentum`` helps. Of this package, not of a paper; the
    log-determinant as a regularizer is that of CorInfoMax (https://arxiv.org/abs/2209.07999) and of coding rates.

    Near collapse its gradient is :math:`2 / \epsilon` of the deviations from the mean over ``N * D``: it pushes where
    that of VICReg's variance term fades, which is below ``std = sqrt(eps)`` of that. At *exact* collapse there are no
    deviations but those that ``jitter`` provides; with ``jitter=0`` equal rows stay equal, which is a mathematical fact
    of smooth functions of the covariance. It changes the loss by about ``jitter**2 / eps`` of it at most, and is the
    same in every step and on every process.

    The value is right to 1e-6 where the mean is a thousand times the spread, but rounding gives directions without
    variance one of their own then, and the gradient along them is that of the rounding: large, in no special direction.

    In one process the smaller of the ``N x N`` and the ``D x D`` matrix is factorized, by Cholesky, in ``float64``
    (``float32`` on devices without).

    Args:
        target_std: Standard deviation γ that every direction is to have, in units of the features.
        eps: Share of the target variance that is added to all directions.
        jitter: Standard deviation of what is added to tell equal rows apart, in units of the features.
        momentum: Share of the earlier covariance, see ``JitteredCovarianceLoss``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> LogDetBarrier()(torch.ones(8, 4))
        tensor(8.2105)
    """

    source = "this package"

    def __init__(self, target_std: float = 1.0, eps: float = 1e-4, jitter: float = 1e-5, momentum: float = 0.0) -> None:
        super().__init__(target_std, jitter, momentum)
        require_positive(eps=eps)
        self.eps = eps
        self.coefficients = {"divergence": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"divergence": log_det_barrier(features)}`` for features of shape ``(N, D)``."""
        (features,) = views
        return {"divergence": self._divergence(features)}

    @full_precision
    def _divergence(self, features: Tensor) -> Tensor:
        batch = center_with_jitter("LogDetBarrier", _double(features), self.jitter)
        return _divergence(self.blend(batch), features.shape[1], self.target_std, self.eps).to(features.dtype)

    @property
    def value_at_collapse(self) -> float:
        """``log((1 + eps) / eps) - 1 / (1 + eps)``, 8.21."""
        return math.log((1 + self.eps) / self.eps) - 1 / (1 + self.eps)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"{super().extra_repr()}, eps={self.eps}"
