"""Long-tailed loss: the mean loss of classes or tokens, by how often they occur."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype

SHOTS = (20, 101)
"""Few, medium and many shot: below 20, 20 to 100, and above 100 training samples."""


def loss_by_frequency(
    sums: Tensor, counts: Tensor, frequencies: Tensor, edges: Sequence[float] = SHOTS, per_class: bool = True
) -> tuple[Tensor, Tensor]:
    """Mean loss in each bin of class frequency.

    Args:
        sums: Sum of the losses of each class, shape ``(C,)``.
        counts: How many losses that is of, shape ``(C,)``; classes without any are in no bin.
        frequencies: How often each class occurs in training, shape ``(C,)``.
        edges: Ascending; bin ``i`` holds the classes of ``edges[i - 1] <= frequency < edges[i]``. The default divides
            few, medium and many shot as published; powers of ten suit the tokens of a language model.
        per_class: Mean of the classes' means, as for long-tailed recognition, or else mean over all losses, as for
            tokens.

    Returns:
        Mean loss and number of classes of each bin, ``(len(edges) + 1,)``; NaN for an empty bin.

    Raises:
        ValueError: If a shape does not fit or the edges do not ascend.

    References:
        Liu et al., *Large-scale long-tailed recognition in an open world*, CVPR 2019. https://arxiv.org/abs/1904.05160

    Example:
        >>> loss, classes = loss_by_frequency(torch.tensor([2.0, 9.0]), torch.tensor([2, 3]), torch.tensor([500, 8]))
        >>> loss, classes
        (tensor([3., nan, 1.], dtype=torch.float64), tensor([1, 0, 1]))
    """
    if not sums.shape == counts.shape == frequencies.shape or sums.ndim != 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in (sums, counts, frequencies))
        raise ValueError(f"`sums`, `counts` and `frequencies` must all have shape (C,), got {shapes}.")
    if list(edges) != sorted(set(edges)):
        raise ValueError(f"`edges` must ascend, got {edges}.")
    sums, counts = (part.to(accumulation_dtype(sums.device)) for part in (sums, counts))
    bounds = torch.tensor(edges, dtype=sums.dtype, device=sums.device)
    bins = torch.bucketize(frequencies.to(sums), bounds, right=True)
    seen = counts > 0
    values, weights = (sums / counts.clamp_min(1), seen.to(sums)) if per_class else (sums, counts)
    totals = sums.new_zeros(3, len(edges) + 1)
    totals.index_add_(1, bins, torch.stack([torch.where(seen, values, 0.0), weights, seen.to(sums)]))
    return torch.where(totals[1] > 0, totals[0] / totals[1].clamp_min(1), torch.nan), totals[2].long()
