"""Class collapse of subclasses: what features of one class still tell of the finer classes inside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.cdnv import cdnv
from lightning_collapse.spectral.neighbors import nearest_rows
from lightning_collapse.spectral.rows import finite_rows


class SubclassAccuracy(NamedTuple):
    """How often neighbours within the class name the subclass; every field 0-dimensional, ``float64``.

    Attributes:
        accuracy: 0 to 1; NaN if no class has ``k + 1`` rows.
        null: Mean of the same with subclasses dealt anew within each class: collapse leaves nothing more.
        error: Standard deviation over the deals, the noise of ``accuracy`` at collapse.
        n: Rows that were asked, ``int64``.
    """

    accuracy: Tensor
    null: Tensor
    error: Tensor
    n: Tensor


class SubclassCdnv(NamedTuple):
    """Class-distance normalized variance over pairs of subclasses of one class; every field 0-dimensional.

    Attributes:
        mean: Over resolved pairs: small for distinct subclasses; NaN if there is none.
        null: What subclasses without any structure read, plain and nearly: the mean of
            ``1 / (1 / n + 1 / n') - 1 / 2``, which is ``(n - 1) / 2`` for equal ones.
        pairs: Of subclasses that share a class.
        unresolved: Pairs among them whose means cannot be told apart.
    """

    mean: Tensor
    null: Tensor
    pairs: Tensor
    unresolved: Tensor


@torch.no_grad()
def subclass_accuracy(
    features: Tensor, labels: Tensor, subclasses: Tensor, k: int = 5, permutations: int = 20, seed: int = 0
) -> SubclassAccuracy:
    """Leave-one-out accuracy of ``k`` nearest neighbours of the same class for the subclass.

    Neighbours are searched by the block within each class: no ``N x N`` matrix. The nearer of equally many votes
    decide. The null is by permutation with neighbours as they are, from a generator of its own.

    Args:
        features: Shape ``(N, D)``; rows with NaN or infinity are left out.
        labels: Class of each row, shape ``(N,)``, integers.
        subclasses: Subclass of each row, shape ``(N,)``, integers of at least 0.
        k: How many neighbours vote; classes with ``k`` rows or fewer are left out.
        permutations: How many deals the null is of, at least 2.
        seed: Of the deals.

    Returns:
        Accuracy, null, error and number of rows. Waits for the device.

    Raises:
        ValueError: If a shape does not fit, or ``k`` or ``permutations`` is too small.

    References:
        Subclass collapse: Chen et al., *Perfectly balanced*, ICML 2022. https://arxiv.org/abs/2204.07596

    Example:
        >>> rows = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> found = subclass_accuracy(rows, torch.zeros(4, dtype=int), torch.tensor([0, 0, 1, 1]), k=1)
        >>> found.accuracy.item(), found.n.item()
        (1.0, 4)
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or subclasses.shape != labels.shape:
        found = ", ".join(str(tuple(part.shape)) for part in (features, labels, subclasses))
        raise ValueError(f"`features`, `labels` and `subclasses` must have shapes (N, D), (N,) and (N,), got {found}.")
    if k < 1 or permutations < 2:
        raise ValueError(f"`k` must be at least 1 and `permutations` at least 2, got {k} and {permutations}.")
    finite = finite_rows(features)[2] > 0
    generator = torch.Generator().manual_seed(seed)
    right, n = torch.zeros(1 + permutations, dtype=torch.int64), 0
    for label in torch.unique(labels[finite]):
        member = finite & (labels == label)
        fine = torch.unique(subclasses[member], return_inverse=True)[1]
        if len(fine) <= k:
            continue
        near = nearest_rows(features[member], k)
        deals = [
            fine,
            *(fine[torch.randperm(len(fine), generator=generator).to(fine.device)] for _ in range(permutations)),
        ]
        right += torch.stack([(_vote(deal[near]) == deal).sum() for deal in deals]).cpu()
        n += len(fine)
    share = right.double() / n if n else torch.full((1 + permutations,), torch.nan, dtype=torch.float64)
    return SubclassAccuracy(share[0], share[1:].mean(), share[1:].std(), torch.tensor(n))


def subclass_cdnv(
    means: Tensor, variances: Tensor, counts: Tensor, classes: Tensor, debiased: bool = False
) -> SubclassCdnv:
    """Class-distance normalized variance of subclasses within their class: grows to its null as they fold into one.

    Args:
        means: Means of subclasses, shape ``(S, D)``.
        variances: Mean squared distance to them, shape ``(S,)``.
        counts: Rows of each subclass, shape ``(S,)``; those without rows are left out.
        classes: Class of each subclass, shape ``(S,)``, integers.
        debiased: As in :func:`~lightning_collapse.functional.cdnv`.

    Returns:
        Mean over the pairs of all classes, and its null.

    Raises:
        ValueError: If a shape does not fit.

    References:
        Galanti, Gyorgy, Hutter, ICLR 2022. https://arxiv.org/abs/2112.15121; within classes, and the null: ours.

    Example:
        >>> means = torch.tensor([[0.0], [2.0], [90.0], [94.0]])
        >>> found = subclass_cdnv(means, torch.ones(4), torch.full((4,), 9), torch.tensor([0, 0, 1, 1]))
        >>> found.mean, found.null
        (tensor(0.1562), tensor(4.))
    """
    if classes.shape != means.shape[:1]:
        raise ValueError(f"`classes` must have shape ({len(means)},), one per subclass, got {tuple(classes.shape)}.")
    found, nulls = [], [means.new_zeros(0)]
    for label in torch.unique(classes):
        member = classes == label
        found.append(cdnv(means[member], variances[member], counts[member], debiased))
        rows = counts[member][counts[member] > 0].to(found[-1].mean)
        nulls.append(1 / torch.combinations(1 / rows, 2).sum(dim=1) - 0.5)
    pairs, unresolved = (torch.stack([getattr(one, name) for one in found]) for name in ("pairs", "unresolved"))
    resolved = pairs - unresolved
    sums = torch.where(resolved > 0, torch.stack([one.mean for one in found]) * resolved, 0.0)
    mean = torch.where(resolved.sum() > 0, sums.sum() / resolved.sum(), torch.nan)
    return SubclassCdnv(mean, torch.cat(nulls).mean(), pairs.sum(), unresolved.sum())


def _vote(near: Tensor) -> Tensor:
    """The most frequent number of each row ``(N, k)``, of equally frequent ones that which comes first."""
    alike = near.unsqueeze(2) == near.unsqueeze(1)
    return near.gather(1, alike.sum(dim=2).argmax(dim=1, keepdim=True)).squeeze(1)
