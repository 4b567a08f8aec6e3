"""Policy covariance: log-probabilities of actions against their advantages, over the rows of all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.functional.output_entropy import advantage_covariance
from lightning_collapse.monitoring.output_hooks import Outputs
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import all_gather_rows, all_reduce_sum

TOP = 0.9998
"""The quantile that Clip-Cov and KL-Cov look at."""
MOST = 256
"""Largest values that each process brings for it: enough for a million rows."""


def advantages_of_rows(advantages: Tensor, outputs: Outputs) -> Tensor | None:
    """One advantage for each row of logits ``(n,)``, from as many or from one per sequence; ``None`` if neither fits.

    Args:
        advantages: Any shape.
        outputs: What the head returned.
    """
    flat, rows = advantages.flatten(), len(outputs.counted)
    if len(flat) == rows:
        return flat
    lengths = [length for count, length in outputs.sequences for _ in range(count)]
    if len(flat) != len(lengths) or sum(lengths) != rows:
        return None
    return flat.repeat_interleave(torch.tensor(lengths, device=flat.device), output_size=rows)


def policy_sums(outputs: Outputs | None, advantages: Tensor | None, device: torch.device) -> Tensor:
    """Number of rows, mean entropy and covariance, share above zero and upper quantile, shape ``(5,)``; NaN without.

    Collective: every process must call it, with ``None`` where it has no rows.
    """
    dtype = accumulation_dtype(device)
    if outputs is None or advantages is None:
        entropy = log_probs = gains = torch.zeros(0, dtype=dtype, device=device)
        counted = torch.zeros(0, dtype=torch.bool, device=device)
    else:
        entropy, log_probs = (field.to(device, dtype) for field in (outputs.rows.entropy, outputs.rows.log_prob))
        gains, counted = advantages.to(device, dtype), outputs.counted.to(device)
    valid = counted & entropy.isfinite() & log_probs.isfinite() & gains.isfinite()
    first = [valid.to(dtype), *(x.where(valid, 0.0) for x in (entropy, log_probs, gains))]
    n, *means = all_reduce_sum(torch.stack([x.sum() for x in first])).unbind()
    means = [mean / n for mean in means]
    covariance = advantage_covariance(log_probs, gains, valid, (means[1], means[2]))
    kept = covariance.where(valid, 0.0)
    both = all_reduce_sum(torch.stack([kept.sum(), (kept > 0).sum().to(dtype)])) / n
    mine = covariance.where(valid, -torch.inf)
    largest, there = all_gather_rows(mine.topk(min(MOST, len(mine))).values.unsqueeze(1))
    return torch.stack([n, means[0], *both.unbind(), _quantile(largest[:, 0].where(there, -torch.inf), n)])


def _quantile(largest: Tensor, n: Tensor) -> Tensor:
    """The upper quantile of ``n`` values of which the largest are given."""
    if not len(largest):
        return n * torch.nan
    ordered = largest.sort(descending=True).values
    place = ((1 - TOP) * (n - 1)).clamp(0, len(ordered) - 1)
    below, above = (ordered[end.long()] for end in (place.ceil(), place.floor()))
    found = above + (below - above) * (place - place.floor())
    return torch.where(n > 0, found, torch.nan)
