"""Effective rank, RankMe, participation ratio and other ranks, each a function of singular values ``(..., K)``."""

import torch
from torch import Tensor

from lightning_collapse.spectral.deterministic import running_sum
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.spectrum import Spectrum, values_of
from lightning_collapse.utilities.registry import register_measure


@register_measure(range="1 to min(n - 1, d)", collapsed="near 1", source="Roy & Vetterli, EUSIPCO 2007")
@full_precision
def effective_rank(singular_values: Tensor | Spectrum) -> Tensor:
    r"""Exponential of the entropy of the normalized singular values.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \quad p_i = \sigma_i / \|\sigma\|_1

    Sensitive to small singular values: half-precision rounding noise lifts it on a collapsed representation, where
    :func:`eigenvalue_effective_rank` and :func:`participation_ratio` hold still.

    Args:
        singular_values: Of centered features, non-negative, shape ``(..., K)``, or a ``Spectrum`` record.

    Returns:
        Shape ``(...)``, between 1 (all rows on a line) and ``K`` (isotropic); 0 for an all-zero spectrum.

    References:
        Roy & Vetterli, *The effective rank*, EUSIPCO 2007.

    Example:
        >>> effective_rank(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]))
        tensor([4., 1.])
    """
    return _exp_entropy(values_of(singular_values))


@register_measure(
    record=True,
    spectrum="raw",
    range="1 to min(n, d), a hair more for the epsilon",
    collapsed="near 1",
    source="Garrido et al., ICML 2023, arXiv 2210.02885",
    sketchable=False,
)
@full_precision
def rankme(singular_values: Tensor | Spectrum, eps: float = 1e-7) -> Tensor:
    r"""RankMe: the effective rank of *uncentered* features, with the paper's epsilon.

    .. math:: \exp\Big(-\sum_k p_k \log p_k\Big), \quad p_k = \sigma_k / \|\sigma\|_1 + \epsilon

    The epsilon is added after normalization, so the value may exceed ``K`` by a hair (2050.8 at ``K = 2048``). A mean
    that dominates the spread reads as collapse. Compare runs of one method at one ``n`` only.

    Args:
        singular_values: Of the features as they are, non-negative, shape ``(..., K)``, or a ``Spectrum`` record.
        eps: The paper's constant for ``float32``.

    Returns:
        Shape ``(...)``, between 1 (all rows parallel) and about ``K``; 0 for an all-zero spectrum.

    References:
        Garrido et al., *RankMe*, ICML 2023. https://arxiv.org/abs/2210.02885

    Example:
        >>> rankme(torch.ones(8))
        tensor(8.0000)
    """
    values = values_of(singular_values)
    if not isinstance(singular_values, Spectrum):
        return _exp_entropy(values, eps)
    # a matrix of n rows has n singular values: no epsilon for the others of a d x d Gram matrix
    exists = torch.arange(values.shape[-1], device=values.device) < singular_values.count.unsqueeze(-1)
    return _exp_entropy(values, eps * exists)


@register_measure(
    range="1 to min(n - 1, d)",
    collapsed="near 1",
    source="von Neumann entropy; 'RankMe' of arXiv 2509.23024",
)
@full_precision
def eigenvalue_effective_rank(singular_values: Tensor | Spectrum) -> Tensor:
    r"""Exponential of the entropy of the normalized covariance eigenvalues.

    .. math:: \exp\Big(-\sum_i q_i \log q_i\Big), \quad q_i = \sigma_i^2 / \|\sigma\|_2^2

    Weighs directions by variance: hardly touched by rounding noise, and what verdicts rest on. On singular values of a
    weight matrix it is the "eRank" of the Muon literature.

    Args:
        singular_values: Of centered features, non-negative, shape ``(..., K)``, or a ``Spectrum`` record.

    Returns:
        Shape ``(...)``, between 1 (all rows on a line) and ``K`` (isotropic); 0 for an all-zero spectrum. Never above
        :func:`effective_rank`.

    References:
        Called RankMe in *Tracing the Representation Geometry of Language Models*, 2025.
        https://arxiv.org/abs/2509.23024

    Example:
        >>> eigenvalue_effective_rank(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        tensor(2.)
    """
    return _exp_entropy(_relative(singular_values).square())


@register_measure(
    record=True,
    from_gram=lambda gram, record: _participation(*_power_sums(gram), record),
    range="1 to min(n - 1, d)",
    collapsed="near 1",
    source="Gao & Ganguli 2015; Recanatesi et al. 2022",
)
@full_precision
def participation_ratio(singular_values: Tensor | Spectrum) -> Tensor:
    r"""Squared sum over sum of squares of the covariance eigenvalues.

    .. math:: \frac{(\sum_i \lambda_i)^2}{\sum_i \lambda_i^2}, \quad \lambda_i \propto \sigma_i^2

    Of ``n`` rows of isotropic noise it reads about ``d / (1 + d / n)``; :func:`unbiased_participation_ratio` removes
    that bias. For a sketched record the widening by the projection is removed.

    Args:
        singular_values: Of centered features, non-negative, shape ``(..., K)``, or a ``Spectrum`` record.

    Returns:
        Shape ``(...)``, between 1 (all rows on a line) and ``K`` (isotropic); 0 for an all-zero spectrum.

    Example:
        >>> participation_ratio(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        tensor(3.)
    """
    energy = _relative(singular_values).square()
    return _participation(energy.sum(dim=-1).square(), energy.square().sum(dim=-1), singular_values)


@register_measure(
    record=True,
    from_gram=lambda gram, record: _unbiased_participation(*_power_sums(gram), record),
    range="1 to d",
    collapsed="near 1",
    source="Himeno & Yamada, J. Multivariate Analysis 2014",
    null=lambda n, d: float(d) if n > 3 else float("nan"),
)
@full_precision
def unbiased_participation_ratio(spectrum: Spectrum) -> Tensor:
    r"""Participation ratio from unbiased estimates of its numerator and denominator: it does not grow with ``n``.

    With :math:`S` the sample covariance and :math:`Q = \frac{1}{n-1} \sum_i \|x_i - \bar x\|^4`,

    .. math::
        \widehat{\operatorname{tr} \Sigma^2} &= c\,[(n-1)(n-2) \operatorname{tr} S^2 + (\operatorname{tr} S)^2 - nQ] \\
        \widehat{(\operatorname{tr} \Sigma)^2} &= c\,[2 \operatorname{tr} S^2 + (n^2-3n+1)(\operatorname{tr} S)^2 - nQ]

    with :math:`c = (n-1) / (n (n-2)(n-3))`, unbiased for any distribution with four moments. Their ratio is not: it is
    biased by the order of :math:`1/n`, for n = 48 rows of d = 40 by 4 % (Gaussian) to 12 % (exponential).

    Args:
        spectrum: A ``Spectrum`` record of centered features (singular values alone do not hold :math:`n` and
            :math:`Q`).

    Returns:
        Shape ``(...)``, clamped to ``[1, d]``; NaN for fewer than four rows, 0 for an all-zero spectrum.

    Raises:
        TypeError: If given singular values alone.

    References:
        Himeno & Yamada, *Estimations for some functions of covariance matrix in high dimension under non-normality
        and its applications*, J. Multivariate Analysis 2014.

    Example:
        >>> from lightning_collapse.spectral import spectrum_of
        >>> features = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        >>> record = spectrum_of(features)
        >>> of_noise = unbiased_participation_ratio(record), participation_ratio(record.singular_values)
        >>> [round(ratio.item()) for ratio in of_noise]
        [64, 6]
    """
    if not isinstance(spectrum, Spectrum) or spectrum.kurtosis is None:
        raise TypeError(
            "`unbiased_participation_ratio` needs the `Spectrum` record of centered features, got"
            f" {type(spectrum).__name__}. Use `lightning_collapse.spectral.spectrum_of(features)`."
        )
    energy = _relative(spectrum).square()
    return _unbiased_participation(energy.sum(dim=-1).square(), energy.square().sum(dim=-1), spectrum)


@register_measure(
    range="1 to min(n - 1, d)", collapsed="near 1", source="Rudelson & Vershynin 2007, arXiv math/0503442"
)
@full_precision
def stable_rank(singular_values: Tensor | Spectrum) -> Tensor:
    r"""Squared Frobenius over squared spectral norm, :math:`\|\sigma\|_2^2 / \sigma_1^2`.

    Of centered features it equals :func:`nesum`, the eigenvalue sum over the largest eigenvalue.

    Args:
        singular_values: Non-negative, shape ``(..., K)``, or a ``Spectrum`` record.

    Returns:
        Shape ``(...)``, between 1 (one direction dominates) and ``K``; 0 for an all-zero spectrum.

    References:
        Rudelson & Vershynin, *Sampling from large matrices*, J. ACM 2007. https://arxiv.org/abs/math/0503442

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 1.0, 0.0]))
        tensor(1.5000)
    """
    return _relative(singular_values).square().sum(dim=-1)


@register_measure(
    range="1 to min(n - 1, d)",
    collapsed="near 1",
    source="He & Ozay, ICML 2022",
)
@full_precision
def nesum(singular_values: Tensor | Spectrum) -> Tensor:
    r"""Normalized eigenvalue sum, :math:`\sum_i \lambda_i / \lambda_1` of the covariance.

    The name that the self-supervised literature gives the :func:`stable_rank` of centered features.

    Args:
        singular_values: Of centered features, non-negative, shape ``(..., K)``, or a ``Spectrum`` record.

    Returns:
        Shape ``(...)``, between 1 (one direction dominates) and ``K``; 0 for an all-zero spectrum.

    References:
        He & Ozay, *Exploring the Gap between Collapsed & Whitened Features in Self-Supervised Learning*, ICML 2022.

    Example:
        >>> nesum(torch.tensor([2.0, 1.0, 1.0, 0.0]))
        tensor(1.5000)
    """
    return stable_rank(singular_values)


@register_measure(
    record=True,
    range="0 to min(n - 1, d), an integer",
    collapsed="few",
    source="tolerance of NumPy's matrix_rank",
    sketchable=False,
)
@full_precision
def numerical_rank(singular_values: Tensor | Spectrum, rtol: float | None = None) -> Tensor:
    r"""Number of singular values above rounding noise, :math:`\#\{\sigma_i > \sigma_1 \cdot \text{rtol}\}`.

    Args:
        singular_values: Non-negative, shape ``(..., K)``, or a ``Spectrum`` record.
        rtol: Relative tolerance. The default is ``K * eps`` of the dtype of a tensor, and ``max(n, d)`` times the
            ``eps`` of ``float32`` for a record, whose features are ``float32`` at best as a rule.

    Returns:
        Shape ``(...)``, a whole number between 0 (all-zero) and ``K``.

    Example:
        >>> numerical_rank(torch.tensor([5.0, 1.0, 1e-9]))
        tensor(2.)
    """
    values = values_of(singular_values)
    tolerance: Tensor | float = values.shape[-1] * torch.finfo(values.dtype).eps if rtol is None else rtol
    if isinstance(singular_values, Spectrum) and rtol is None:
        tolerance = singular_values.count.clamp_min(singular_values.dim).unsqueeze(-1) * torch.finfo(torch.float32).eps
    top = values.amax(dim=-1, keepdim=True)
    return _keep_nan((values > top * tolerance).sum(dim=-1), values)


@register_measure(
    range="1 to min(n - 1, d), an integer",
    collapsed="near 1",
    source="Kumar et al., ICLR 2021, arXiv 2010.14498",
)
@full_precision
def srank(singular_values: Tensor | Spectrum, delta: float = 0.01) -> Tensor:
    r"""Smallest ``k`` whose leading singular values hold a share ``1 - delta`` of their sum.

    .. math:: \min \Big\{k : \sum_{i \le k} \sigma_i \ge (1 - \delta) \sum_i \sigma_i\Big\}

    Args:
        singular_values: Descending, shape ``(..., K)``, or a ``Spectrum`` record.
        delta: The paper's 0.01. ``K`` equal values then read ``ceil(0.99 K)``.

    Returns:
        Shape ``(...)``, a whole number between 1 and ``K``; 0 for an all-zero spectrum.

    References:
        Kumar et al., *Implicit Under-Parameterization Inhibits Data-Efficient Deep RL*, ICLR 2021.
        https://arxiv.org/abs/2010.14498

    Example:
        >>> srank(torch.ones(200))
        tensor(198.)
    """
    values = values_of(singular_values)
    cumulative = running_sum(values.double() if values.device.type != "mps" else values)
    total = cumulative[..., -1:]
    # without the slack the rounding of the sum decides whether k equal values read k (1 - delta) or one more
    below = cumulative < (1 - delta) * total * (1 - 1e-9)
    return _keep_nan((below.sum(dim=-1) + 1) * (total.squeeze(-1) > 0), values)


def _exp_entropy(mass: Tensor, eps: float | Tensor = 0.0) -> Tensor:
    total = mass.sum(dim=-1, keepdim=True)
    p = mass / total.clamp_min(torch.finfo(mass.dtype).tiny) + eps
    entropy = -(p * p.clamp_min(torch.finfo(mass.dtype).tiny).log()).sum(dim=-1)
    return torch.where(total.squeeze(-1) == 0, torch.zeros_like(entropy), entropy.exp())


def _relative(singular_values: Tensor | Spectrum) -> Tensor:
    """Relative to the largest, so that squares and fourth powers neither overflow nor vanish."""
    values = values_of(singular_values)
    return values / values.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def _power_sums(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared sum and sum of squares of the eigenvalues."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).square(), gram.square().sum(dim=(-2, -1))


def _unbiased_participation(trace2: Tensor, square: Tensor, spectrum: Spectrum) -> Tensor:
    assert spectrum.kurtosis is not None
    n, square = spectrum.count, square / trace2.clamp_min(torch.finfo(trace2.dtype).tiny)
    quartic = (n - 1) * spectrum.kurtosis
    # relative to (tr S)^2; the common factor of both estimates cancels
    numerator = 2 * square + (n**2 - 3 * n + 1) - n * quartic
    denominator = (n - 1) * (n - 2) * square + 1 - n * quartic
    ratio = _participation(numerator, denominator, spectrum)
    # a projection does not know how wide the features were
    most = float("inf") if spectrum.sketched else float(spectrum.dim)
    ratio = torch.where(denominator > 0, ratio, most).clamp(1, most)
    ratio = torch.where(n > 3, ratio, torch.nan)
    return torch.where(trace2 > 0, ratio, torch.where(trace2.isnan(), trace2, 0.0))


def _participation(trace2: Tensor, square: Tensor, singular_values: Tensor | Spectrum) -> Tensor:
    if isinstance(singular_values, Spectrum) and singular_values.sketched:
        k = singular_values.dim  # E tr S^2 of a Gaussian k-sketch is (1 + 1/k) tr S^2 + (tr S)^2 / k
        square = ((square - trace2 / k) / (1 + 1 / k)).clamp_min(torch.finfo(square.dtype).tiny * 1e6)
    return trace2 / square.clamp_min(torch.finfo(square.dtype).tiny)


def _keep_nan(count: Tensor, values: Tensor) -> Tensor:
    return torch.where(values.isnan().any(dim=-1), torch.nan, count.to(values.dtype))
