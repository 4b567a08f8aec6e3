"""NC3: how near the rows of the classifier are to its own features' class means (self-duality)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.class_means import (
    CenteredMeans,
    centered_means,
    in_input_precision,
    unit,
)
from lightning_collapse.functional.neural_collapse.nc2 import frame_distance


@in_input_precision
def nc3(
    means: Tensor,
    weight: Tensor,
    counts: Tensor | None = None,
    global_mean: Tensor | None = None,
    method: Literal["squared", "distance", "simplex"] = "squared",
) -> Tensor:
    r"""Self-duality: distance between the classifier and the centered class means, both scaled to unit norm.

    .. math:: \left\| \frac{W}{\|W\|_F} - \frac{M}{\|M\|_F} \right\|_F^2 = 2 - 2 \cos(W, M)

    Published forms: the square is what the authors' code of [1] computes and the default; ``"distance"`` is its root;
    ``"simplex"`` is :math:`\| W M^\top / \|W M^\top\|_F - (I - \mathbf 1 \mathbf 1^\top / C) / \sqrt{C - 1} \|_F` [2].

    Args:
        means: Class means, shape ``(C, D)``.
        weight: Weight of the classifier, shape ``(C, D)``, as in ``nn.Linear.weight``.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out, of the classifier too.
        global_mean: Shape ``(D,)``; the mean of the class means by default.
        method: See above.

    Returns:
        0-dimensional; 0 (collapsed: dual) to 4 for ``"squared"``, about 2 for unrelated matrices, and to 2 for the
        others; NaN if the class means coincide.

    Raises:
        ValueError: If the shapes differ or ``method`` is unknown.

    References:
        [1] Papyan, Han, Donoho, PNAS 2020. https://arxiv.org/abs/2008.08186
        [2] Zhu et al., NeurIPS 2021. https://arxiv.org/abs/2105.02375

    Example:
        >>> nc3(torch.tensor([[5.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) < 1e-12
        tensor(True)
    """
    if method not in ("squared", "distance", "simplex"):
        raise ValueError(f'`method` must be "squared", "distance" or "simplex", got {method!r}.')
    part = centered_means(means, counts, global_mean)
    if method == "simplex":
        return frame_distance(_weight_of(part, weight), part.rows, part.present)
    distance = duality_distance(part, weight)
    return distance.square() if method == "squared" else distance


@in_input_precision
def unc3(means: Tensor, weight: Tensor, counts: Tensor | None = None, global_mean: Tensor | None = None) -> Tensor:
    r"""Uniform duality: variance over the classes of the cosine between classifier row and centered class mean.

    .. math:: \operatorname{Var}_c \cos(w_c, \mu_c - \mu_G)

    Asks only that all classes agree on how dual they are, for vocabularies that are larger than the width. On cosines:
    the variance of the plain products grows with the norms.

    Args:
        means: Class means, shape ``(C, D)``.
        weight: Weight of the classifier, shape ``(C, D)``.
        counts: Rows of each class, shape ``(C,)``; classes without rows are left out.
        global_mean: Shape ``(D,)``; the mean of the class means by default.

    Returns:
        0-dimensional, 0 (collapsed: uniform) to 1, divided by ``C``; NaN for no classes or where a row is zero.

    Raises:
        ValueError: If the shapes differ.

    References:
        Wu, Papyan, *Linguistic Collapse*, NeurIPS 2024. https://arxiv.org/abs/2405.17767; that the variance is divided
        by ``C`` and not ``C - 1`` is our choice.

    Example:
        >>> unc3(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [-3.0, 3.0]])) < 1e-12
        tensor(True)
    """
    return cosine_variance(centered_means(means, counts, global_mean), weight)


@in_input_precision
def bias_collapse(weight: Tensor, bias: Tensor | None, global_mean: Tensor) -> Tensor:
    r"""Length of the logits of the global mean, :math:`\| W \mu_G + b \|_2`.

    Args:
        weight: Weight of the classifier, shape ``(C, D)``.
        bias: Shape ``(C,)``; zero if ``None``.
        global_mean: Shape ``(D,)``.

    Returns:
        0-dimensional, 0 (collapsed) or more, in units of the logits.

    References:
        The public code of Zhu et al., NeurIPS 2021. https://arxiv.org/abs/2105.02375

    Example:
        >>> bias_collapse(torch.eye(2), torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0]))
        tensor(0.)
    """
    wide = torch.promote_types(weight.dtype, global_mean.dtype)
    logits = weight.to(wide) @ global_mean.to(wide)
    length: Tensor = torch.linalg.vector_norm(logits if bias is None else logits + bias.to(wide))
    return length


def duality_distance(part: CenteredMeans, weight: Tensor) -> Tensor:
    """:func:`nc3`, the root of the square, of class means that are centered already."""
    rows, weight = part.rows, _weight_of(part, weight)
    difference = weight / torch.linalg.matrix_norm(weight) - rows / torch.linalg.matrix_norm(rows)
    distance: Tensor = torch.linalg.matrix_norm(difference)
    return distance


def cosine_variance(part: CenteredMeans, weight: Tensor) -> Tensor:
    """:func:`unc3` of class means that are centered already."""
    rows, present, classes = part
    cosine = torch.where(present, (unit(rows) * unit(_weight_of(part, weight))).sum(dim=1), 0.0)
    return torch.where(present, cosine - cosine.sum() / classes, 0.0).square().sum() / classes


def _weight_of(part: CenteredMeans, weight: Tensor) -> Tensor:
    """The rows of the classifier for the classes that are there, in the precision of their means."""
    if weight.shape != part.rows.shape:
        raise ValueError(
            f"`weight` must have the shape of `means`, a row per class, got {tuple(weight.shape)} and"
            f" {tuple(part.rows.shape)}."
        )
    return torch.where(part.present.unsqueeze(1), weight.to(part.rows), 0.0)
