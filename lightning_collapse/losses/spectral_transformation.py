"""Spectral transformation loss: views agree after a function of their covariance has evened their spectra."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.rows import require_rows
from lightning_collapse.losses.support.statistics import center, covariances, separate_views, without_mean
from lightning_collapse.losses.support.symmetric_power import iter_norm, symmetric_power
from lightning_collapse.losses.support.whitening import cosine_distances
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_positive, require_whole
from lightning_collapse.utilities.distributed import all_gather_rows_with_grad, all_reduce_sum_with_grad
from lightning_collapse.utilities.registry import register_loss

Axis = Literal["features", "samples"]
AXES = get_args(Axis)


@full_precision
def spectral_transformation_terms(
    first: Tensor, second: Tensor, power: float | None = 0.5, iterations: int = 4, axis: Axis = "features"
) -> dict[str, Tensor]:
    """The two terms of :class:`SpectralTransformation`, unweighted.

    Collective: every process must call it; with ``axis="features"`` three all-reduces, of about ``2 D * D`` numbers;
    with ``axis="samples"`` two, of ``2 N * D`` numbers for all ``N`` rows, and a wait for their number.

    Args:
        first: Representations of one view, shape ``(N, D)``.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        power: Exponent of the covariance, negated; ``None`` for IterNorm.
        iterations: Of IterNorm.
        axis: Whose covariance it is, see :class:`SpectralTransformation`.

    Returns:
        Scalars ``invariance`` and ``trace``, at least ``float32``, of the global batch.

    Raises:
        ValueError: If the views are not matrices of one shape, or have fewer than two rows over all processes.

    Example:
        >>> first = torch.arange(12.0).reshape(4, 3).sin()
        >>> second = first.flip(1)
        >>> {name: round(value.item(), 3) for name, value in spectral_transformation_terms(first, second).items()}
        {'invariance': 2.0, 'trace': 0.64}
    """
    return transformed("spectral_transformation_terms", first, second, power, iterations, axis)[0]


def transformed(
    function: str, first: Tensor, second: Tensor, power: float | None, iterations: int, axis: Axis
) -> tuple[dict[str, Tensor], int]:
    """The terms of :func:`spectral_transformation_terms`, called ``function`` in messages, and the number of axes."""
    require_one_of(AXES, axis=axis)
    pair = separate_views(function, first=first, second=second)
    if axis == "features":
        batch = center(function, pair, grad_of_mean=True)
        covariance = covariances(batch)
        matrix = _transform(covariance, power, iterations)
        views = product(batch.rows, matrix)
        invariance = all_reduce_sum_with_grad(cosine_distances(views[0], views[1]).sum()) / batch.samples
    else:
        rows, _ = all_gather_rows_with_grad(torch.stack(pair))
        require_rows(function, 2, rows.shape[1], len(first))
        rows = without_mean(rows, dim=2)
        covariance = product(rows, rows.mT) / max(rows.shape[2] - 1, 1)
        matrix = _transform(covariance, power, iterations)
        rows = product(matrix, rows)
        invariance = cosine_distances(rows[0], rows[1]).mean()
    variance = (product(matrix, covariance) * matrix.mT).sum(dim=-1)  # the diagonal of the product of three
    return {"invariance": invariance, "trace": (variance - 1).square().sum()}, covariance.shape[-1]


def _transform(covariance: Tensor, power: float | None, iterations: int) -> Tensor:
    return iter_norm(covariance, iterations) if power is None else symmetric_power(covariance, power)


@register_loss
class SpectralTransformation(AntiCollapseLoss):
    r"""Two views agree after a spectral transformation of each.

    .. math:: \frac{1}{N} \sum_i \Big\|\frac{v_i}{\|v_i\|} - \frac{v'_i}{\|v'_i\|}\Big\|^2
        + \beta \sum_j \big[(\hat C_{jj} - 1)^2 + (\hat C'_{jj} - 1)^2\big], \qquad
        v = \Phi(C)\, (z - \bar z), \quad \hat C = \Phi C \Phi

    The transformation keeps the eigenvectors of the covariance :math:`C` and maps its eigenvalues:

    - ``power=p``: :math:`\Phi = C^{-p}`. One half is whitening (ZCA); the paper finds that from 0.45 to 0.55 nothing
      collapses. Far below, dimensions do. On CUDA every step waits for the device: eigenvectors are computed.
    - ``power=None``: IterNorm, ``iterations`` of Newton's iteration towards :math:`C^{-1/2}`. It evens the spectrum
      only partly, and is published together with the trace loss, see :class:`~lightning_collapse.losses.INTL`. It
      does not wait.

    With ``axis="features"`` the features are made white, which asks for more rows than features; with
    ``axis="samples"``, "channel whitening", the samples are, each centered over its own features, which asks for more
    features than rows. Both use the rows of all processes.

    The trace loss of IterNorm cannot reach 0: with ``M`` whitened axes it is at least
    :math:`M (1 - \varphi_T(1 / M))^2` per view, where :math:`\varphi_T` is the ``T``-fold composition of
    :math:`\varphi(x) = x (1.5 - 0.5 x)^2`, and is that much where the covariance is isotropic: 209.6 for 256 and
    ``T = 4``. :meth:`at_perfection` tells it.

    Args:
        power: Exponent ``p``; ``None`` for IterNorm.
        iterations: ``T`` of IterNorm; published default.
        trace: Coefficient β; by default the term is computed and not added.
        axis: Whose covariance it is.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Weng et al., *Modulate Your Spectrum in Self-Supervised Learning*, ICLR 2024.
        https://arxiv.org/abs/2305.16789, code at https://github.com/winci-ai/INTL.

    Example:
        >>> import torch
        >>> first = torch.randn(64, 8)
        >>> SpectralTransformation()(first, 3 * first).abs() < 1e-4
        tensor(True)
    """

    source = "Weng et al., ICLR 2024, arXiv 2305.16789: `power=` of the covariance, or IterNorm with `power=None`"
    views = 2

    def __init__(
        self,
        power: float | None = 0.5,
        iterations: int = 4,
        trace: float = 0.0,
        axis: Axis = "features",
    ) -> None:
        super().__init__()
        require_positive(power=1.0 if power is None else power)
        require_whole(1, iterations=iterations)
        require_one_of(AXES, axis=axis)
        self.power = power
        self.iterations = iterations
        self.axis: Axis = axis
        self.coefficients = {"invariance": 1.0, "trace": trace}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`spectral_transformation_terms`; two views of shape ``(N, D)``."""
        first, second = views
        return spectral_transformation_terms(first, second, self.power, self.iterations, self.axis)

    def trace_weight(self, axes: int) -> float:
        """What multiplies the trace losses of both views, each a sum over ``axes``."""
        return self.coefficients["trace"]

    @property
    def value_at_perfection(self) -> float:
        """0 for whitening or without the trace loss; otherwise it depends on the shape, see :meth:`at_perfection`."""
        return math.nan if self.power is None and self.coefficients["trace"] else 0.0

    @property
    def value_at_collapse(self) -> float:
        """2 without the trace loss; otherwise it depends on the shape, see :meth:`at_collapse`."""
        return math.nan if self.axis == "samples" or self.coefficients["trace"] else 2.0

    def at_perfection(self, rows: int, dim: int) -> float:
        """The floor of the trace loss, at an isotropic covariance; an exponent can always scale to 0."""
        axes = dim if self.axis == "features" else rows
        floor = axes * (1 - iter_norm_eigenvalue(1 / axes, self.iterations)) ** 2 if self.power is None else 0.0
        return 2 * self.trace_weight(axes) * floor

    def at_collapse(self, rows: int, dim: int) -> float:
        """Nothing is left of features: 2, and 1 per axis of the trace loss.

        Equal samples point to one direction: they agree, and the one eigenvalue is shared by all axes; with an
        exponent other than one half its size depends on the scale (not a number).
        """
        weight = 2 * self.trace_weight(dim if self.axis == "features" else rows)
        if self.axis == "features":
            return 2.0 + weight * dim
        if self.power not in (None, 0.5) and weight:
            return math.nan
        return weight * (rows - 1) ** 2 / rows

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        trace = self.coefficients["trace"]
        return f"power={self.power}, iterations={self.iterations}, trace={trace}, axis={self.axis!r}"


def iter_norm_eigenvalue(share: float, iterations: int) -> float:
    """What IterNorm makes of an eigenvalue that is a ``share`` of the trace.

    Example:
        >>> round(iter_norm_eigenvalue(1 / 256, 4), 4)
        0.0952
    """
    for _ in range(iterations):
        share = share * (1.5 - 0.5 * share) ** 2
    return share
