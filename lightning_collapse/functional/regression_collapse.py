"""Neural regression collapse: features and weights of a regression head against the targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.eigenvalues import eigenvectors, safe_sqrt
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.row_space import row_space
from lightning_collapse.spectral.rows import finite_rows

RESOLUTION = torch.finfo(torch.float32).eps
"""Singular values of a weight below this share of the largest, times its longer side, are rounding."""


class RegressionCollapseReading(NamedTuple):
    """What :func:`regression_collapse` finds, all 0-dimensional.

    Attributes:
        nrc1: See :func:`nrc1`.
        nrc2: See :func:`nrc2`.
        nrc3: See :func:`nrc3`.
        n: Number of rows behind them.
        rank: Numerical rank of the weight; NaN without one.
    """

    nrc1: Tensor
    nrc2: Tensor
    nrc3: Tensor
    n: Tensor
    rank: Tensor


@torch.no_grad()
@full_precision
def nrc1(covariance: Tensor, directions: Tensor, targets: int) -> Tensor:
    r"""Share of the features' directions outside of as many principal axes as there are targets.

    .. math:: \mathrm{NRC1} = \frac1M\sum_i \big\|\tilde h_i - \operatorname{proj}(\tilde h_i \mid H_{\mathrm{PCA}_n})
        \big\|^2 = 1 - \operatorname{tr}(P^\top S P), \quad \tilde h = h/\|h\|, \;
        S = \frac1M\sum_i \tilde h_i\tilde h_i^\top

    Whether the principal components are of centered features the paper does not state; that is for the caller to
    choose with ``covariance``, and the same in the optimum, where the mean of the features is zero.

    Args:
        covariance: What the principal axes are of, at any scale: the covariance of the features, or their second
            moment. Shape ``(D, D)``.
        directions: Second moment ``S`` of the normalized features, not centered, shape ``(D, D)``, at any scale.
        targets: Number of targets ``n``.

    Returns:
        Scalar, ``float64``, 0 (collapsed) to 1; isotropic features read about ``1 - n / D``. NaN where there are no
        features, or bad numbers. Not defined where the ``n``-th and the next eigenvalue are equal.

    Raises:
        ValueError: On matrices that do not fit, or if ``targets`` is not positive.

    References:
        Andriopoulos et al., *The Prevalence of Neural Collapse in Neural Multivariate Regression*, NeurIPS 2024.
        https://arxiv.org/abs/2409.04180

    Example:
        >>> nrc1(torch.diag(torch.tensor([5.0, 1.0])), torch.diag(torch.tensor([0.75, 0.25])), targets=1)
        tensor(0.2500, dtype=torch.float64)
    """
    _check_square(covariance=covariance, directions=directions)
    if targets < 1:
        raise ValueError(f"`targets` is the number of targets and must be positive, got {targets}.")
    if covariance.shape != directions.shape:
        raise ValueError(
            f"`covariance` and `directions` must have one shape, got {tuple(covariance.shape)} and"
            f" {tuple(directions.shape)}."
        )
    return _outside(_double(directions), _principal_axes(_double(covariance), targets))


@torch.no_grad()
@full_precision
def nrc2(directions: Tensor, weight: Tensor) -> Tensor:
    r"""Share of the features' directions outside of the space that the rows of the head's weight span.

    .. math:: \mathrm{NRC2} = \frac1M\sum_i \big\|\tilde h_i - \operatorname{proj}(\tilde h_i \mid W^\top)\big\|^2

    Args:
        directions: Second moment of the normalized features, not centered, shape ``(D, D)``, at any scale.
        weight: Shape ``(n, D)``, what the head multiplies by; may be rank-deficient.

    Returns:
        Scalar, ``float64``, 0 (collapsed) to 1; NaN where there are no features, or bad numbers.

    Raises:
        ValueError: On matrices that do not fit.

    References:
        Andriopoulos et al., NeurIPS 2024. https://arxiv.org/abs/2409.04180

    Example:
        >>> nrc2(torch.diag(torch.tensor([0.75, 0.25])), torch.tensor([[0.0, 2.0]]))
        tensor(0.7500, dtype=torch.float64)
    """
    _check_square(directions=directions)
    _check_weight(weight, len(directions))
    return _outside(_double(directions), row_space(_double(weight), RESOLUTION))


@torch.no_grad()
@full_precision
def nrc3(weight: Tensor, target_covariance: Tensor, gamma: float | Tensor | None = None) -> Tensor:
    r"""Distance of the shape of the head's weight from the one that the targets prescribe.

    .. math:: \mathrm{NRC3} = \min_\gamma \Big\| \frac{WW^\top}{\|WW^\top\|_F}
        - \frac{\Sigma^{1/2} - \gamma^{1/2} I}{\|\Sigma^{1/2} - \gamma^{1/2} I\|_F} \Big\|_F^2, \quad
        0 \le \gamma \le \lambda_{\min}(\Sigma)

    The minimum is in closed form, see :func:`nrc3_gamma`. In the optimum of a regularized unconstrained feature model
    it is zero, at the product of the two penalties.

    Args:
        weight: Shape ``(n, D)``, what the head multiplies by.
        target_covariance: :math:`\Sigma`, shape ``(n, n)``; divided by the number of rows, not by one less. Targets as
            the loss sees them: it depends on their scales.
        gamma: Take this one instead of the best.

    Returns:
        Scalar, ``float64``, 0 (collapsed) to 4. NaN for a single target, where it means nothing, for a weight or
        targets of zero, and for bad numbers.

    Raises:
        ValueError: On matrices that do not fit.

    References:
        Andriopoulos et al., NeurIPS 2024. https://arxiv.org/abs/2409.04180

    Example:
        >>> root = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
        >>> nrc3(torch.linalg.cholesky(root - 0.25 * torch.eye(2)), root @ root) < 1e-6
        tensor(True)
    """
    root, product = _roots(weight, target_covariance)
    if gamma is None:
        return (
            _distances(root, product, _candidates(root, product))
            .nan_to_num(torch.inf)
            .amin()
            .nan_to_num(posinf=torch.nan)
        )
    t = torch.as_tensor(gamma, dtype=root.dtype, device=root.device).reshape(1).sqrt()
    return _distances(root, product, t)[0]


@torch.no_grad()
@full_precision
def nrc3_gamma(weight: Tensor, target_covariance: Tensor) -> Tensor:
    r"""The :math:`\gamma` at which :func:`nrc3` is smallest.

    With :math:`A = WW^\top`, :math:`p = \langle A, \Sigma^{1/2}\rangle`, :math:`q = \operatorname{tr} A`,
    :math:`s_1 = \operatorname{tr} \Sigma^{1/2}` and :math:`s_2 = \operatorname{tr} \Sigma`, the derivative
    vanishes only at

    .. math:: \sqrt\gamma = \frac{q s_2 - p s_1}{q s_1 - n p},

    which is compared with the ends 0 and :math:`\lambda_{\min}(\Sigma)`. The closed form in the paper's appendix,
    :math:`\sqrt\gamma = (s_1 - q)/n`, belongs to the distance without the norms; in this one it does not give the
    minimum, nor zero in the optimum.

    Args:
        weight: Shape ``(n, D)``.
        target_covariance: Shape ``(n, n)``.

    Returns:
        Scalar, ``float64``, between 0 and the smallest eigenvalue of ``target_covariance``; NaN where there is none.

    Raises:
        ValueError: On matrices that do not fit.

    Example:
        >>> root = torch.diag(torch.tensor([2.0, 1.0]))
        >>> nrc3_gamma((root - 0.5 * torch.eye(2)).sqrt(), root.square())
        tensor(0.2500, dtype=torch.float64)
    """
    root, product = _roots(weight, target_covariance)
    candidates = _candidates(root, product)
    distances = _distances(root, product, candidates).nan_to_num(torch.inf)
    best = candidates[distances.argmin()].square()
    return torch.where(distances.isfinite().any(), best, torch.nan)


@torch.no_grad()
@full_precision
def regression_collapse(
    features: Tensor, targets: Tensor, weight: Tensor | None = None, mask: Tensor | None = None, center: bool = True
) -> RegressionCollapseReading:
    """The three measures of neural regression collapse from rows, by the smaller side.

    Rows with NaN or infinity in features or targets are left out; rows of zeros have no direction.

    Args:
        features: What the head receives, shape ``(M, D)``.
        targets: Shape ``(M, n)``.
        weight: What the head multiplies by, shape ``(n, D)``. Without it ``nrc2`` and ``nrc3`` are NaN.
        mask: Boolean, shape ``(M,)``: rows to consider.
        center: Take the principal axes of centered features, or of features as they are, which the paper leaves open.

    Raises:
        ValueError: On shapes that do not fit.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
        >>> reading = regression_collapse(rows, rows[:, :1], weight=torch.tensor([[1.0, 0.0]]))
        >>> reading.nrc1.item(), reading.nrc2.item()
        (0.0, 0.0)
    """
    if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
        raise ValueError(
            "`features` must have shape (M, D) and `targets` (M, n), got"
            f" {tuple(features.shape)} and {tuple(targets.shape)}."
        )
    width = features.shape[1]
    joint, _, counts = finite_rows(torch.cat([_double(features), _double(targets)], dim=1), mask)
    rows, values = joint[:, :width], joint[:, width:]
    n = counts.sum()
    directions = unit_rows(rows)
    around = (rows - rows.sum(dim=0) / n.clamp_min(1)) * counts.unsqueeze(1) if center else rows
    nothing = torch.full_like(n, torch.nan)
    first = _outside_of_rows(directions, _principal_axes_of_rows(around, targets.shape[1]))
    if weight is None:
        return RegressionCollapseReading(first, nothing, nothing, n, nothing)
    _check_weight(weight, width, targets.shape[1])
    basis = row_space(_double(weight), RESOLUTION)
    values = (values - values.sum(dim=0) / n.clamp_min(1)) * counts.unsqueeze(1)
    third = nrc3(weight, values.T @ values / n.clamp_min(1))
    return RegressionCollapseReading(first, _outside_of_rows(directions, basis), third, n, rank_of_basis(basis))


def unit_rows(rows: Tensor) -> Tensor:
    """Rows ``(M, D)`` divided by their norms, at any scale; zeros stay zeros."""
    tiny = torch.finfo(rows.dtype).tiny
    rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(tiny)  # squares must not overflow
    units: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(tiny)
    return units


def rank_of_basis(basis: Tensor) -> Tensor:
    """How many columns of a basis ``(D, K)`` are there; NaN for a basis of NaN."""
    rank: Tensor = basis.square().sum().round()
    return rank


def _outside(moment: Tensor, axes: Tensor) -> Tensor:
    trace = moment.trace()
    inside = (axes * (moment @ axes)).sum()
    return _share(trace - inside, trace)


def _outside_of_rows(directions: Tensor, axes: Tensor) -> Tensor:
    total = directions.square().sum()
    return _share(total - (directions @ axes).square().sum(), total)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, (part / whole).clamp(0.0, 1.0), torch.nan)


def _principal_axes(gram: Tensor, count: int) -> Tensor:
    values, vectors = eigenvectors(gram)
    return vectors[:, :count] * _is_there(values[:count], values[:1], len(gram))


def _principal_axes_of_rows(rows: Tensor, count: int) -> Tensor:
    if len(rows) >= rows.shape[1]:
        return _principal_axes(rows.T @ rows, count)
    if not len(rows):
        return rows.new_zeros(rows.shape[1], count)
    values, vectors = eigenvectors(rows @ rows.T)
    there = _is_there(values[:count], values[:1], len(rows))
    return rows.T @ (vectors[:, :count] / torch.where(there, values[:count].sqrt(), torch.inf))


def _is_there(values: Tensor, top: Tensor, size: int) -> Tensor:
    """Whether eigenvalues are more than rounding; a NaN is."""
    return ~(values <= size * torch.finfo(values.dtype).eps * top)


def _roots(weight: Tensor, target_covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the root of the covariance, and the weight's outer product along its eigenvectors, scaled."""
    _check_square(target_covariance=target_covariance)
    if weight.ndim != 2 or len(weight) != len(target_covariance):
        raise ValueError(
            f"`weight` must have shape (n, D) with one row per target, got {tuple(weight.shape)} for"
            f" {len(target_covariance)} targets."
        )
    values, vectors = eigenvectors(_double(target_covariance))
    weight = _double(weight)
    scale = weight.abs().amax() if weight.numel() else weight.new_zeros(())
    turned = vectors.T @ (weight / torch.where(scale > 0, scale, 1.0))
    return safe_sqrt(values), turned @ turned.T


def _candidates(root: Tensor, product: Tensor) -> Tensor:
    p, q = (product.diagonal() * root).sum(), product.trace()
    first, second = root.sum(), root.square().sum()
    stationary = (q * second - p * first) / (q * first - len(root) * p)
    least = root[-1]
    inside = torch.minimum(stationary.nan_to_num(0.0).clamp_min(0.0), least)
    return torch.stack([inside, torch.zeros_like(least), least])


def _distances(root: Tensor, product: Tensor, t: Tensor) -> Tensor:
    """The distance at several square roots of gamma, ``(K,)``; NaN where a norm is zero."""
    shifted = root - t.unsqueeze(1)
    tolerance = len(root) * torch.finfo(root.dtype).eps * torch.linalg.vector_norm(root)
    norms = torch.linalg.vector_norm(shifted, dim=1)
    exists = (norms > tolerance) & (len(root) > 1)
    shape = torch.diag_embed(shifted / torch.where(exists, norms, torch.nan).unsqueeze(1))
    distances: Tensor = (product / torch.linalg.matrix_norm(product) - shape).square().sum(dim=(-2, -1))
    return distances


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.device))


def _check_square(**matrices: Tensor) -> None:
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise ValueError(f"`{name}` must be a square matrix, got shape {tuple(matrix.shape)}.")


def _check_weight(weight: Tensor, width: int, targets: int | None = None) -> None:
    if weight.ndim != 2 or weight.shape[1] != width or (targets is not None and len(weight) != targets):
        rows = "n" if targets is None else targets
        raise ValueError(f"`weight` must have shape ({rows}, {width}), got {tuple(weight.shape)}.")
