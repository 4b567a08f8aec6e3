"""Exemplar selection: equal shares of classes, and the rows whose mean is nearest to that of their class."""

import torch
from torch import Tensor

LAST = 1e30
"""A distance beyond all others, and below that of what is chosen already."""


def beyond_quota(keys: Tensor, labels: Tensor, size: int) -> Tensor:
    r"""Rows for which there is no room in a memory that all classes share equally.

    Of :math:`C` classes in a memory of :math:`m` rows each has :math:`\lfloor m / C \rfloor` places, and the first
    :math:`m \bmod C` of them, in the order of their labels, one more; the rows of largest keys have them. A new class
    takes places from all and gives none back, so that what was left out before need not be known. Nothing waits for
    the device.

    Args:
        keys: Shape ``(N,)``; ``-inf`` is no row.
        labels: Integers of shape ``(N,)``.
        size: :math:`m`.

    Returns:
        Boolean, shape ``(N,)``.

    Example:
        >>> keys, labels = torch.tensor([0.5, 0.9, 0.7, 0.1]), torch.tensor([4, 4, 4, 2])
        >>> beyond_quota(keys, labels, size=3)  # two places for class 2, which has one row, and one for class 4
        tensor([ True, False,  True, False])
    """
    if not len(keys):
        return keys > 0
    there = keys > -torch.inf
    order = keys.argsort(descending=True, stable=True)
    sorted_labels, by_label = labels.masked_fill(~there, torch.iinfo(labels.dtype).max)[order].sort(stable=True)
    order = order[by_label]
    first = torch.ones_like(there)
    first[1:] = sorted_labels[1:] != sorted_labels[:-1]
    index = first.cumsum(0) - 1
    place = torch.arange(len(keys), device=keys.device)
    place = place - torch.where(first, place, 0).cummax(0).values
    classes = (first & there[order]).sum().clamp(min=1)
    quota = torch.div(size - index + classes - 1, classes, rounding_mode="floor")
    return torch.zeros_like(there).scatter(0, order, place >= quota)


def herding_order(features: Tensor, count: int) -> Tensor:
    r"""The rows whose running mean stays nearest to the mean of all, one after the other [1].

    .. math:: p_k = \operatorname{argmin}_x \Big\| \mu - \frac{1}{k} \Big(f(x) + \sum_{j<k} f(p_j)\Big) \Big\|

    on features of unit length, each row once; of equally good ones the first. As in the authors' code the mean
    :math:`\mu` of the unit features is not brought to unit length again. The first rows of the order are those of any
    shorter one. Costs ``count * N * D``; waits for the device at no row.

    Args:
        features: Rows of one class, shape ``(N, D)``; a row of zeros stays one; NaN and infinity come last.
        count: Length of the order; all rows if there are fewer.

    Returns:
        Indices, shape ``(min(count, N),)``.

    References:
        [1] Rebuffi et al., *iCaRL: Incremental Classifier and Representation Learning*, CVPR 2017.
        https://arxiv.org/abs/1611.07725

    Example:
        >>> herding_order(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), count=3)
        tensor([1, 0, 2])
    """
    rows = features.detach().to(torch.float32 if features.device.type == "mps" else torch.float64)
    there = rows.isfinite().all(dim=1, keepdim=True)
    rows = torch.where(there, rows, 0.0)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = rows / length.masked_fill(length == 0, 1.0)
    mean, total = rows.sum(dim=0) / there.sum().clamp_min(1), torch.zeros_like(rows[:1].sum(0))
    squares = rows.square().sum(dim=1).masked_fill(~there.squeeze(1), LAST)
    chosen: list[Tensor] = []
    for k in range(1, min(count, len(rows)) + 1):
        # ||k mu - total - x||^2 without what is the same for all x
        distance = squares - 2 * (rows @ (k * mean - total))
        nearest = distance.argmin().reshape(1)
        total = total + rows.index_select(0, nearest).squeeze(0)
        squares = squares.index_fill(0, nearest, torch.inf)
        chosen.append(nearest)
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.long, device=rows.device)
