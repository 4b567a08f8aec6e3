"""Deep canonical correlation analysis (DCCA): two views are as correlated as linear maps of them can be."""

import math

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.nuclear_norm import nuclear_norm
from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.statistics import center, covariances, separate_views
from lightning_collapse.losses.support.whitening import inverse_cholesky
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.arguments import require_not_negative, require_whole
from lightning_collapse.utilities.registry import register_loss


@full_precision
def dcca_loss(
    first: Tensor,
    second: Tensor,
    ridge: float = 1e-3,
    largest: int | None = None,
    samples_per_feature: float = 20.0,
) -> Tensor:
    r"""The loss of :class:`DCCA`: minus the sum of the canonical correlations of two views.

    Cholesky factors stand for the roots of the covariances, which leaves the singular values as they are and needs no
    eigenvectors: with the subgradient :math:`U V^\top` the gradient is exact where correlations are equal, too. In
    ``float64`` where the device has it; on CUDA the singular values wait for the device. Can be differentiated once.

    Collective: every process must call it; two all-reduces, about :math:`(D_1 + D_2)^2` numbers.

    Args:
        first: Representations of one view, shape ``(N, D1)``.
        second: Of the other view of the same samples in the same order, shape ``(N, D2)``.
        ridge: Added to the variances.
        largest: How many correlations, from the largest on; all by default.
        samples_per_feature: How many rows there must be for each feature of the wider view.

    Returns:
        Scalar, at least ``float32``, from ``-min(D1, D2)`` to 0.

    Raises:
        ValueError: If a view is no matrix, their rows differ in number, or an argument is out of range.
        TooFewRowsError: If there are too few rows, over all processes.

    Example:
        >>> first = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> round(dcca_loss(first, first @ torch.tensor([[2.0, 1.0], [0.0, 1.0]]) + 5).item(), 2)
        -2.0
    """
    require_not_negative(ridge=ridge, samples_per_feature=samples_per_feature)
    dims = first.shape[-1], second.shape[-1]
    require_whole(1, largest=min(dims) if largest is None else largest)
    if largest is not None and largest > min(dims):
        raise ValueError(f"`largest` must not be above the {min(dims)} correlations that there are, got {largest}.")
    rows = max(2, math.ceil(samples_per_feature * max(dims)))
    return -nuclear_norm(_coherence("dcca_loss", first, second, ridge, rows), largest).to(first.dtype)


@torch.no_grad()
@full_precision
def canonical_correlations(first: Tensor, second: Tensor, ridge: float = 0.0) -> Tensor:
    r"""Canonical correlations of two views, for a look at what :class:`DCCA` has reached.

    Without a ridge, on which small features could hide. A small batch finds correlations where there are none: those
    of unrelated views have :math:`\sum \rho^2` about :math:`D_1 D_2 / (N - 1)`.

    Collective: every process must call it; two all-reduces, about :math:`(D_1 + D_2)^2` numbers.

    Args:
        first: Shape ``(N, D1)``; give it far more rows than features.
        second: Shape ``(N, D2)``, the same samples.
        ridge: Added to the variances.

    Returns:
        Shape ``(min(D1, D2),)``, descending, between 0 and 1 but for rounding.

    Raises:
        ValueError: As :func:`dcca_loss`.

    Example:
        >>> first = torch.tensor([[1.0, 2.0], [3.0, -1.0], [-2.0, 0.5], [0.0, 4.0]])
        >>> canonical_correlations(first, 1e-3 * first.flip(1))
        tensor([1., 1.])
    """
    coherence = _coherence("canonical_correlations", first, second, ridge, 2)
    finite = coherence.isfinite().all()
    return torch.where(finite, torch.linalg.svdvals(torch.where(finite, coherence, 0.0)), torch.nan).to(first.dtype)


def _coherence(function: str, first: Tensor, second: Tensor, ridge: float, rows: int) -> Tensor:
    """The covariance of two views that are white each, whose singular values are the correlations, ``(D1, D2)``."""
    (first,), (second,) = separate_views(function, first=first), separate_views(function, second=second)
    if len(first) != len(second):
        raise ValueError(
            f"The views of `{function}` must have as many rows, got {len(first)} and {len(second)}. Row i of both is"
            " one sample."
        )
    split = first.shape[1]
    batch = center(function, [torch.cat([first, second], dim=1)], rows=rows)
    wide = batch.rows[0].to(accumulation_dtype(first.device))
    covariance = covariances(batch._replace(rows=wide))
    own = covariance[:split, :split], covariance[split:, split:]
    one, other = (inverse_cholesky(c + ridge * torch.eye(len(c), dtype=wide.dtype, device=wide.device)) for c in own)
    return product(product(one, covariance[:split, split:]), other.mT)


@register_loss
class DCCA(AntiCollapseLoss):
    r"""Deep canonical correlation analysis of two views, which need not be of one network or of one width.

    .. math:: -\|T\|_*, \qquad T = S_{11}^{-1/2} S_{12} S_{22}^{-1/2}, \quad
        S_{vv} = \tfrac{1}{N - 1} \bar H_v^\top \bar H_v + r I

    with the nuclear norm, or the sum of the ``largest`` singular values alone. One term, ``correlation``. What is
    whitened cannot collapse, but for the ridge :math:`r`: features of variance far below it read 0.
    :func:`canonical_correlations` reads without it.

    Of few rows the correlations are found, not learned: a batch of 50 unrelated rows of 10 features has about 3.8 of
    10. Fewer than ``samples_per_feature`` rows for each feature are refused, and left out with a warning by callback
    and mixin.

    A DCCA autoencoder (DCCAE) is this loss plus the errors of your own decoders, which reconstruct each view's input.

    Args:
        ridge: Added to the variances; customary.
        largest: How many correlations, from the largest on; all by default.
        samples_per_feature: How many rows there must be for each feature of the wider view, over all processes; ours.
            0 takes any batch of two rows or more.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Andrew, Arora, Bilmes & Livescu, *Deep Canonical Correlation Analysis*, ICML 2013.
        https://proceedings.mlr.press/v28/andrew13.html. DCCAE: Wang, Arora, Livescu & Bilmes, *On Deep Multi-View
        Representation Learning*, ICML 2015. https://proceedings.mlr.press/v37/wangb15.html.

    Example:
        >>> first = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
        >>> round(DCCA()(first, -2 * first).item(), 2), DCCA()(first, torch.zeros(128, 3)).abs().item()
        (-3.0, 0.0)
    """

    source = "Andrew et al., ICML 2013, by singular values; of 20 rows or more for each feature"
    views = 2

    def __init__(self, ridge: float = 1e-3, largest: int | None = None, samples_per_feature: float = 20.0) -> None:
        super().__init__()
        require_not_negative(ridge=ridge, samples_per_feature=samples_per_feature)
        if largest is not None:
            require_whole(1, largest=largest)
        self.ridge = ridge
        self.largest = largest
        self.samples_per_feature = samples_per_feature
        self.coefficients = {"correlation": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"correlation": dcca_loss(first, second)}`` for two views of shape ``(N, D1)`` and ``(N, D2)``."""
        first, second = views
        return {"correlation": dcca_loss(first, second, self.ridge, self.largest, self.samples_per_feature)}

    @property
    def value_at_perfection(self) -> float:
        """``nan``: minus the number of correlations, see :meth:`at_perfection`."""
        return math.nan

    def at_perfection(self, rows: int, dim: int) -> float:
        """Views that are linear maps of each other, of unit variance: ``-dim / (1 + ridge)``."""
        return -min(dim, self.largest or dim) / (1 + self.ridge)

    @property
    def value_at_collapse(self) -> float:
        """0."""
        return 0.0

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"ridge={self.ridge}, largest={self.largest}, samples_per_feature={self.samples_per_feature}"
