"""Output usage: how many outputs a head predicts on average, beside how many the labels of the same rows use."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.functional.assignment import perplexity
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.features import evenly

GROUPS = 256
"""Outputs that are told apart; of more, those whose numbers differ by a multiple of this are one."""
ROWS, NUMBERS = 1024, 2**24
"""Rows of a call that are read, spread over all, and logits, but 64 rows at least: of these there is a copy."""


def usage_sums(logits: Tensor, targets: Tensor | None, counted: Tensor) -> Tensor:
    """Probabilities and labels added up over rows, shape ``(2, 256)``, in double precision where there is any.

    Args:
        logits: Shape ``(..., V)``.
        targets: Integers of shape ``(...)``, below 0 for none; ``None`` without. If any is ``V`` or more, they are no
            labels of this head.
        counted: Boolean, shape ``(...)``.

    Example:
        >>> sure = torch.tensor([[9.0, -99.0, -99.0], [9.0, -99.0, -99.0]])
        >>> predicted, labelled = usage_sums(sure, torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool))
        >>> predicted[:3].tolist(), labelled[:3].tolist()
        ([2.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    """
    limit = min(ROWS, max(NUMBERS // max(logits.shape[-1], 1), 64))
    places = evenly(torch.arange(counted.numel(), device=logits.device), limit)
    index: tuple[Tensor, ...] = ()
    for length in reversed(counted.shape):  # flattened, transposed logits would be copied as a whole
        places, index = places // length, (places % length, *index)
    rows, counted = logits[index].float(), counted[index]
    kept = counted & rows.logsumexp(dim=1).isfinite()
    dtype, size = accumulation_dtype(rows.device), logits.shape[-1]
    sums = torch.zeros(2, GROUPS, dtype=dtype, device=rows.device)
    if targets is not None:
        labels = targets[index].to(rows.device)
        kept = kept & (labels >= 0)
        fit = torch.where(kept, labels, 0).amax() < size if len(labels) else kept.any()
        sums[1].index_add_(0, labels.long() % GROUPS, (kept & fit).to(dtype))
    predicted = rows.softmax(dim=1).where(kept.unsqueeze(1), 0.0).sum(dim=0, dtype=dtype)
    sums[0].index_add_(0, torch.arange(size, device=rows.device) % GROUPS, predicted)
    return sums


def usages(sums: Tensor) -> Tensor:
    r"""Perplexity of the mean prediction and of the labels, and how many rows had a label: shape ``(3,)``.

    .. math:: \exp\Bigl(-\sum_v \bar p_v \log \bar p_v\Bigr), \quad \bar p = \tfrac{1}{n} \sum_i p_i

    A head that cross-entropy has trained predicts every label as often as it is there, on average: at a minimum the
    gradient of a bias, the mean prediction less the frequency, is 0. Training on its own predictions has another
    minimum, one class for all, which Tanaka et al. (2018, arXiv 1803.11364) and Arazo et al. (2019, arXiv 1908.02983)
    keep it from by a divergence of this mean from the prior.

    Args:
        sums: See :func:`usage_sums`, over all rows.

    Example:
        >>> found = usages(usage_sums(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), torch.ones(4, dtype=torch.bool)))
        >>> found.round(decimals=2).tolist()
        [3.0, 2.83, 4.0]
    """
    found = torch.stack([perplexity(row) for row in sums])
    return torch.cat([found.where(found > 0, torch.nan), sums[1].sum().reshape(1)])
