"""NC4 and NC5, and the NECO score: where single features and strangers lie beside the class means."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.class_means import in_input_precision, present_rows, unit
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows

BLOCK = 1 << 22  # distances at a time


@full_precision
def nearest_class_center(features: Tensor, means: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""Class whose mean is nearest to each feature, :math:`\arg\min_c \|x - \mu_c\|`.

    Args:
        features: Shape ``(N, D)``.
        means: Class means, shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``; a class without rows is nobody's nearest.

    Returns:
        Shape ``(N,)``, ``int64``; any class for a row with NaN or infinity.

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> nearest_class_center(torch.tensor([[0.9, 0.0], [-3.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor([0, 1])
    """
    _fits(features, means)
    # about the global mean: an offset that all features share would cost the digits that decide
    rows, present, classes = present_rows(means, counts)
    center = rows.sum(dim=0) / classes
    rows = torch.where(present.unsqueeze(1), rows - center, 0.0)
    square = torch.where(present, rows.square().sum(dim=1), torch.inf)
    # features by the block: of all of them and a vocabulary of classes the distances would fill the memory
    blocks = torch.split(features, max(BLOCK // len(rows), 1))
    nearest = [torch.addmm(square, x.to(rows) - center, rows.T, alpha=-2).argmin(dim=1) for x in blocks]
    return torch.cat(nearest)


@in_input_precision
def nc4(features: Tensor, logits: Tensor, means: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""Share of features on which the classifier and the nearest class mean disagree.

    .. math:: 1 - \operatorname{mean}_i \mathbf 1\left[
        \arg\min_c \|x_i - \mu_c\| = \arg\max_c (w_c^\top x_i + b_c) \right]

    The means must be final: those of an earlier pass, of other data, or of an earlier epoch, which then are stale.

    Args:
        features: Shape ``(N, D)``; rows with NaN or infinity do not count.
        logits: What the classifier makes of them, its bias included, shape ``(N, C)``.
        means: Class means, shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``; a class without rows is nobody's nearest.

    Returns:
        0-dimensional, 0 (collapsed: they agree) to 1; NaN for no rows.

    Raises:
        ValueError: If a shape does not fit.

    References:
        Papyan, Han, Donoho, PNAS 2020. https://arxiv.org/abs/2008.08186

    Example:
        >>> means = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> nc4(torch.tensor([[0.9, 0.0], [-3.0, 1.0]]), torch.tensor([[2.0, 1.0], [2.0, 1.0]]), means)
        tensor(0.5000)
    """
    agree, count = agreement_counts(features, logits, means, counts)
    wide = accumulation_dtype(features.device)
    return torch.where(count > 0, 1 - agree.to(wide) / count.clamp_min(1), nan)


def agreement_counts(
    features: Tensor, logits: Tensor, means: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """On how many features classifier and nearest class mean agree, and of how many; the sums behind :func:`nc4`.

    Args:
        features: Shape ``(N, D)``; rows with NaN or infinity do not count.
        logits: Shape ``(N, C)``; rows with NaN do not count.
        means: Class means, shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``.

    Raises:
        ValueError: If a shape does not fit.
    """
    _fits(features, means)
    if logits.shape != (len(features), len(means)):
        raise ValueError(f"`logits` must have shape ({len(features)}, {len(means)}), got {tuple(logits.shape)}.")
    rows, _, valid = finite_rows(features)
    largest, choice = logits.max(dim=1)  # NaN where there is one
    counted = (valid > 0) & ~largest.isnan()
    agree = nearest_class_center(rows, means, counts) == choice
    return (agree & counted).sum(), counted.sum()


@full_precision
def agreement_of_classifier(
    features: Tensor, weight: Tensor, bias: Tensor | None, means: Tensor, counts: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`agreement_counts` of a linear classifier and the means of some classes, a block of logits at a time.

    Args:
        features: Shape ``(N, D)``; rows with NaN or infinity do not count.
        weight: Of the classifier, ``(V, D)``.
        bias: ``(V,)``.
        means: Class means, ``(C, D)``.
        counts: Rows of each class, ``(C,)``.
        classes: Which of the ``V`` classes they are of, ``(C,)``.
    """
    rows, _, valid = finite_rows(features)
    largest, choice = rows.new_full((len(rows),), -torch.inf), torch.zeros_like(valid, dtype=torch.long)
    size = max(BLOCK // max(len(rows), 1), 1)
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        logits = rows @ weight[part].to(rows).T
        best, index = (logits if bias is None else logits + bias[part].to(rows)).max(dim=1)
        higher = (best > largest) | best.isnan()  # NaN stays: nothing is larger
        choice, largest = torch.where(higher, index + start, choice), torch.where(higher, best, largest)
    counted = (valid > 0) & ~largest.isnan()
    agree = classes[nearest_class_center(rows, means, counts)] == choice
    return (agree & counted).sum(), counted.sum()


@in_input_precision
def nc5(means: Tensor, ood_mean: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""How orthogonal the class means are to the mean of out-of-distribution features.

    .. math:: \operatorname{mean}_c |\cos(\mu_c, \mu_G^{\mathrm{OOD}})|

    Args:
        means: Class means of the training distribution, shape ``(C, D)``; not centered here.
        ood_mean: Mean of out-of-distribution features, shape ``(D,)``.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out.

    Returns:
        0-dimensional, 0 (collapsed: orthogonal) to 1; NaN where a mean has no direction.

    References:
        Ben Ammar et al., *NECO*, ICLR 2024. https://arxiv.org/abs/2310.06823; the formula is that of public code.

    Example:
        >>> nc5(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.0, 2.0]))
        tensor(0.)
    """
    rows, present, classes = present_rows(means, counts)
    cosine = unit(rows) @ unit(ood_mean.to(rows))
    return torch.where(present, cosine.abs(), 0.0).sum() / classes


@in_input_precision
def neco_score(
    features: Tensor, components: Tensor, mean: Tensor | None = None, max_logit: Tensor | None = None
) -> Tensor:
    r"""Share of each feature's length that lies in the principal subspace of the training features.

    .. math:: \mathrm{NECO}(x) = \frac{\|P^\top (x - \mu)\|}{\|x\|}

    After collapse features of the training distribution lie in the span of the class means, strangers do not: a low
    score is a sign of an out-of-distribution input. As published only the numerator is centered.

    Args:
        features: Shape ``(N, D)``.
        components: Orthonormal principal directions of the training features in columns, shape ``(D, K)``: of
            standardized features 100 in the authors' code, 128 in ports, and elsewhere as many as explain 90 % of the
            variance. :func:`~lightning_collapse.monitoring.neco` finds them.
        mean: :math:`\mu`, the mean of the training features, shape ``(D,)``; zero by default.
        max_logit: Largest logit of each feature, shape ``(N,)``: multiplies the score, as published for transformers.

    Returns:
        Shape ``(N,)``; 0 to 1 without ``mean`` and ``max_logit``; NaN for a row of zeros or with NaN or infinity.

    Raises:
        ValueError: If ``components`` does not fit.

    References:
        Ben Ammar et al., *NECO*, ICLR 2024. https://arxiv.org/abs/2310.06823

    Example:
        >>> neco_score(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([0.6000])
    """
    if components.ndim != 2 or components.shape[0] != features.shape[-1]:
        raise ValueError(
            f"`components` must have shape ({features.shape[-1]}, K), a direction per column, got"
            f" {tuple(components.shape)}."
        )
    centered = features if mean is None else features - mean
    inside = torch.linalg.vector_norm(centered @ components.to(centered), dim=-1)
    score = inside / torch.linalg.vector_norm(features, dim=-1)
    score = torch.where(score.isfinite(), score, nan)
    return score if max_logit is None else score * max_logit


def _fits(features: Tensor, means: Tensor) -> None:
    if features.ndim != 2 or features.shape[1:] != means.shape[1:]:
        raise ValueError(
            f"`features` must have shape (N, D) and `means` (C, D), got {tuple(features.shape)} and"
            f" {tuple(means.shape)}."
        )
