"""Compatible representations (CL2R): whether features of a newer model can be searched among those of an older one."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.prototypes.scores import require_rows, unit_rows
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive, require_whole

BLOCK = 1 << 22  # cosines at a time


class Compatibility(NamedTuple):
    """How far models of a sequence can be searched among each other; every field 0-dimensional, NaN for one model.

    Attributes:
        average: Share of pairs of a newer and an older model that are compatible, ties included, 0 to 1 (AC).
        backward: What the last model gains in the galleries of all others; negative where these must be made anew (BC).
        forward: What each loses in the gallery of the model before; near 0 where a new gallery gains nothing (FC).
    """

    average: Tensor
    backward: Tensor
    forward: Tensor


@full_precision
def compatibility(scores: Tensor) -> Compatibility:
    r"""Compatibility of a sequence of models, from how well each finds its own in the gallery of each.

    .. math:: \mathrm{AC} = \tfrac{2}{T (T - 1)} \sum_{i > j} [M_{ij} \ge M_{jj}], \quad
        \mathrm{BC} = \tfrac{1}{T-1} \sum_{j < T} M_{Tj} - M_{jj}, \quad
        \mathrm{FC} = \tfrac{1}{T-1} \sum_{i > 1} M_{i,i-1} - M_{ii}

    Args:
        scores: :math:`M`, shape ``(T, T)``: queries of model ``i`` in a gallery of model ``j``, such as
            :func:`cross_recall`; what is above the diagonal does not matter.

    Raises:
        ValueError: If ``scores`` is no square matrix.

    References:
        Biondi et al., *CL2R: Compatible Lifelong Learning Representations*, TOMM 2022.
        https://arxiv.org/abs/2211.09032

    Example:
        >>> compatibility(torch.tensor([[0.6, 0.0, 0.0], [0.65, 0.7, 0.0], [0.5, 0.75, 0.8]]))
        Compatibility(average=tensor(0.6667), backward=tensor(-0.0250), forward=tensor(-0.0500))
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(
            f"`scores` must have shape (T, T), a row per model and a column per gallery, got {tuple(scores.shape)}."
        )
    own = scores.diagonal()
    gains = scores - own
    older = torch.ones_like(gains, dtype=torch.bool).tril(-1)
    compatible = torch.where(gains.isnan(), torch.nan, (gains >= 0).to(gains))
    average = torch.where(older, compatible, 0.0).sum() / older.sum()
    return Compatibility(average, gains[-1, :-1].mean(), (scores.diagonal(-1) - own[1:]).mean())


def compatibility_weight(new: int, old: int, base: float = 10.0) -> float:
    r"""Factor of the feature distillation on replayed rows, :math:`b \sqrt{n_{new} / n_{old}}`, by numbers of classes.

    Example:
        >>> compatibility_weight(new=10, old=40)
        5.0
    """
    require_whole(1, new=new, old=old)
    require_positive(base=base)
    return base * math.sqrt(new / old)


@torch.no_grad()
@full_precision
def cross_recall(
    queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, same_rows: bool = False
) -> Tensor:
    """Recall@1 between models: share of queries whose nearest gallery row, by cosine, is of their class.

    Args:
        queries: Features of one model, shape ``(N, D)``.
        labels: Their classes, shape ``(N,)``.
        gallery: Features of another one, shape ``(M, D)``.
        gallery_labels: Their classes, shape ``(M,)``.
        same_rows: Row ``i`` of both is one sample, which is not to find itself.

    Returns:
        0-dimensional, 0 to 1; NaN for no query.

    Raises:
        ValueError: If a shape does not fit or the gallery is empty.

    Example:
        >>> cross_recall(torch.eye(2), torch.tensor([0, 1]), 3 * torch.eye(2), torch.tensor([0, 0]))
        tensor(0.5000)
    """
    require_rows(queries.shape[-1], gallery=gallery)
    for name, rows, classes in (("labels", queries, labels), ("gallery_labels", gallery, gallery_labels)):
        if classes.shape != rows.shape[:1]:
            raise ValueError(f"`{name}` must have shape ({len(rows)},), one per row, got {tuple(classes.shape)}.")
    if same_rows and len(gallery) != len(queries):
        raise ValueError(f"`same_rows` needs as many rows in both, got {len(queries)} and {len(gallery)}.")
    own, units, hits = torch.arange(len(queries), device=queries.device), unit_rows(gallery).T, []
    for part in torch.split(own, max(BLOCK // len(gallery), 1)):
        cosines = unit_rows(queries[part]) @ units.to(queries)
        if same_rows:
            cosines.scatter_(1, part.unsqueeze(1), -torch.inf)
        hits.append(gallery_labels[cosines.argmax(dim=1)] == labels[part])
    return torch.cat(hits).to(queries.dtype).mean() if hits else queries.new_full((), torch.nan)
