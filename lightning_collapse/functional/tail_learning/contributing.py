"""Gradient starvation: how many samples still contribute to the gradient of the cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision

PER_OCTAVE, OCTAVES = 8, 64
SUMS = 3


def contributing_samples(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    r"""Effective number of samples that contribute, and what the tenth of them contributes that gives most.

    .. math:: n_{\mathrm{eff}} = \frac{(\sum g)^2}{\sum g^2}, \quad g = 1 - p_y

    Both move as a network fits, from 1 and 0.1 towards ``1 / n`` and 1 (Gaussian margins of deviation 1.5 about 0, 2, 5
    and 8: 0.77, 0.50, 0.20, 0.12 and 0.19, 0.33, 0.54, 0.59): alarming only where rare groups are still wrong.

    Args:
        logits: Shape ``(..., C)``.
        labels: Shape ``(...)``, integers; others than ``0 .. C - 1``, such as -100, are left out.

    Returns:
        0-dimensional: ``effective_fraction``, :math:`n_{\mathrm{eff}} / n`, and ``top_tenth``, from a
        histogram of eight bins per octave; both NaN for no sample that contributes. ``n``, samples.

    Raises:
        ValueError: If the shapes do not fit or the labels are not integers.

    References:
        Pezeshki et al., *Gradient Starvation*, NeurIPS 2021, https://arxiv.org/abs/2011.09468; these two are ours.

    Example:
        >>> contributing_samples(torch.zeros(20, 4), torch.arange(20) % 4)["effective_fraction"].round(decimals=6)
        tensor(1., dtype=torch.float64)
    """
    return contribution_readings(contribution_sums(logits, labels))


@full_precision
def contribution_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """The sums behind :func:`contributing_samples`: of 1, g and its square, then of 1 and g in each bin."""
    if logits.shape[:-1] != labels.shape or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` must be integers of shape {tuple(logits.shape[:-1])}, got {labels.dtype} of shape"
            f" {tuple(labels.shape)}."
        )
    logits, labels = logits.flatten(0, -2), labels.flatten().long()
    named = (labels >= 0) & (labels < logits.shape[1])
    index = torch.where(named, labels, 0).unsqueeze(1)
    # not 1 - exp(log p), which is 0 where the network is sure
    others = logits.scatter(1, index, -torch.inf).logsumexp(dim=1)
    gap = (others - logits.gather(1, index).squeeze(1)).to(accumulation_dtype(logits.device))
    named &= ~gap.isnan()
    g = torch.where(named, gap.sigmoid(), 0.0)
    bins = (-g.clamp_min(2.0**-OCTAVES).log2() * PER_OCTAVE).long().clamp_max(PER_OCTAVE * OCTAVES - 1)
    histogram = g.new_zeros(2, PER_OCTAVE * OCTAVES).index_add_(1, bins, torch.stack([named.to(g), g]))
    return torch.cat([torch.stack([named.sum().to(g), g.sum(), g.square().sum()]), histogram.flatten()])


def contribution_readings(sums: Tensor) -> dict[str, Tensor]:
    """What :func:`contributing_samples` returns, from its sums."""
    (n, total, square), (counts, parts) = sums[:SUMS], sums[SUMS:].view(2, -1)
    # bins from the largest contribution down; of the one that the tenth ends in, a proportionate part
    before = counts.cumsum(dim=0) - counts
    taken = ((n / 10 - before) / counts.clamp_min(1)).clamp(0, 1)
    defined = (n > 0) & (total > 0)
    fraction = torch.where(defined, total.square() / square / n, torch.nan)
    return {
        "effective_fraction": fraction,
        "top_tenth": torch.where(defined, (taken * parts).sum() / total, torch.nan),
        "n": n.long(),
    }
