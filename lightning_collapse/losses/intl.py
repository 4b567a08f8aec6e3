"""INTL: views agree after IterNorm, and a trace loss evens the spectrum that IterNorm leaves."""

import math

from torch import Tensor

from lightning_collapse.losses.spectral_transformation import Axis, SpectralTransformation, transformed
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.registry import register_loss


@full_precision
def intl_terms(first: Tensor, second: Tensor, iterations: int = 4, axis: Axis = "samples") -> dict[str, Tensor]:
    """The two terms of :class:`INTL`, unweighted.

    Collective: as :func:`~lightning_collapse.losses.spectral_transformation_terms`.

    Args:
        first: Representations of one view, shape ``(N, D)``.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        iterations: Of IterNorm.
        axis: What is made white, features or samples.

    Returns:
        Scalars ``invariance`` and ``trace``, at least ``float32``, of the global batch.

    Raises:
        ValueError: If the views are not matrices of one shape, or have fewer than two rows over all processes.

    Example:
        >>> import torch
        >>> first = torch.arange(12.0).reshape(4, 3).sin()
        >>> second = first.flip(1)
        >>> {name: round(value.item(), 3) for name, value in intl_terms(first, second).items()}
        {'invariance': 3.011, 'trace': 0.0}
    """
    terms, axes = transformed("intl_terms", first, second, None, iterations, axis)
    return {"invariance": terms["invariance"], "trace": _growth(axes) * terms["trace"]}


@register_loss
class INTL(SpectralTransformation):
    r"""IterNorm with trace loss: ``SpectralTransformation`` with the published rule for its coefficient.

    .. math:: \beta = 0.01\, \max(0, \log_2 M - 3)

    with ``M`` the number of whitened axes: the rows of the global batch with ``axis="samples"``, as published, or the
    features. The term ``trace`` is the trace loss of both views times the logarithm, its coefficient the 0.01. Below
    8 axes the published rule would reward what it is to penalize; there it is 0.

    ``axis="samples"`` asks for more features than rows: the paper's projector has 8192 for a batch of 256. The trace
    loss cannot reach 0, see :class:`SpectralTransformation`: 20.96 is what the whole loss reads at best for 256.

    Args:
        iterations: ``T``; published default.
        trace: What the logarithm is multiplied by; published default.
        axis: Whose covariance it is; published default.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Weng et al., *Modulate Your Spectrum in Self-Supervised Learning*, ICLR 2024.
        https://arxiv.org/abs/2305.16789, code at https://github.com/winci-ai/INTL.

    Example:
        >>> round(INTL().at_perfection(256, 8192), 2)
        20.96
    """

    source = (
        "Weng et al., ICLR 2024, arXiv 2305.16789, IterNorm with trace loss, released-code form: samples whitened "
        "over features"
    )

    def __init__(self, iterations: int = 4, trace: float = 0.01, axis: Axis = "samples") -> None:
        super().__init__(power=None, iterations=iterations, trace=trace, axis=axis)

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`intl_terms`; two views of shape ``(N, D)``."""
        first, second = views
        return intl_terms(first, second, self.iterations, self.axis)

    def trace_weight(self, axes: int) -> float:
        """The published rule."""
        return self.coefficients["trace"] * _growth(axes)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"iterations={self.iterations}, trace={self.coefficients['trace']}, axis={self.axis!r}"


def _growth(axes: int) -> float:
    return max(0.0, math.log2(axes) - 3)
