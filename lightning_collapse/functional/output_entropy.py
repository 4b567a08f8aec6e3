"""Output entropy: how sure a softmax over tokens, classes or actions is, and what an update makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision

CHUNK = 1024
"""Rows of logits that are read at a time: the only ones of which there is a copy in full precision."""
BINS = 32
"""Of the histogram of entropies."""


class OutputRows(NamedTuple):
    """What a row of logits comes to; every field has the shape of the logits without their last dimension.

    Attributes:
        entropy: Of the softmax, in nats, between 0 and ``log V``; NaN where a logit is NaN or plus infinity.
        log_z: Logarithm of the partition function, ``logsumexp``.
        max_logit: The largest logit.
        log_prob: Log-probability of the target; NaN without one.
    """

    entropy: Tensor
    log_z: Tensor
    max_logit: Tensor
    log_prob: Tensor


@torch.no_grad()
def output_rows(logits: Tensor, targets: Tensor | None = None, chunk: int = CHUNK) -> OutputRows:
    r"""Entropy, log-partition, largest logit and log-probability of the target, of every row of logits.

    .. math:: H = \log Z - \sum_v p_v z_v, \quad p = \operatorname{softmax}(z), \quad \log Z = \log \sum_v e^{z_v}

    Half precision is read in ``float32``, ``chunk`` rows at a time, so that logits of a vocabulary are never copied
    as a whole. Adding a constant to all logits of a row changes ``log_z`` and ``max_logit`` alone. Logits of minus
    infinity, such as those of actions that are not allowed, have no share in it.

    Args:
        logits: Shape ``(..., V)``.
        targets: Integers of shape ``(...)``; those below 0, such as -100, are none.
        chunk: Rows at a time.

    Returns:
        Fields of shape ``(...)``, ``float32`` or ``float64``; without gradient.

    Raises:
        ValueError: If the shapes do not fit, or there are no logits in a row.

    References:
        Shannon, *A mathematical theory of communication*, 1948. The log-partition as a sign of drifting logits:
        Chowdhery et al., *PaLM*, 2022, https://arxiv.org/abs/2204.02311; Wortsman et al., 2023,
        https://arxiv.org/abs/2309.14322.

    Example:
        >>> found = output_rows(torch.tensor([[0.0, 0.0, -torch.inf], [5.0, 5.0, 5.0]]), torch.tensor([1, -100]))
        >>> found.entropy.exp().round(decimals=4), found.log_prob.exp()
        (tensor([2., 3.]), tensor([0.5000,    nan]))
    """
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"`logits` must have shape (..., V), got {tuple(logits.shape)}.")
    if targets is not None and targets.shape != logits.shape[:-1]:
        raise ValueError(f"`targets` must have shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}.")
    wanted = None if targets is None else targets.flatten()
    read: list[tuple[Tensor, ...]] = []
    start = 0
    for part in _chunks(logits, chunk):
        read.append(_read(part, None if wanted is None else wanted[start : start + len(part)]))
        start += len(part)
    return OutputRows(*(torch.cat(column).view(logits.shape[:-1]) for column in zip(*read, strict=True)))


@full_precision
def entropy_change(logits: Tensor, change: Tensor) -> Tensor:
    r"""By how much the entropy of a softmax changes with its logits, to first order.

    .. math:: dH = -\operatorname{Cov}_{a \sim \pi}\bigl(\log \pi(a), u(a)\bigr)

    Where an update raises what is likely already, the covariance is positive and the entropy falls: that is how
    reinforcement learning exhausts it [1].

    Args:
        logits: Finite, shape ``(..., V)``.
        change: Of the logits, :math:`u`, of the same shape: the advantages for a natural gradient step, or
            :math:`\pi(A - \bar A)` for a vanilla one.

    Returns:
        Shape ``(...)``, any sign.

    References:
        [1] Cui et al., *The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models*, 2025,
        https://arxiv.org/abs/2505.22617.

    Example:
        >>> logits = torch.tensor([2.0, 0.0], dtype=torch.float64)
        >>> step = torch.tensor([1e-4, 0.0], dtype=torch.float64)  # what is likely becomes likelier
        >>> moved = (output_rows(logits + step).entropy - output_rows(logits - step).entropy) / 2
        >>> torch.allclose(entropy_change(logits, step), moved), entropy_change(logits, step).item() < 0
        (True, True)
    """
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    center = log_p - (p * log_p).sum(dim=-1, keepdim=True)
    return -(p * center * (change - (p * change).sum(dim=-1, keepdim=True))).sum(dim=-1)


def advantage_covariance(
    log_probs: Tensor, advantages: Tensor, counted: Tensor | None = None, means: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    r"""Covariance of every token's log-probability with its advantage.

    .. math:: c_i = (A_i - \bar A) (\log \pi_i - \overline{\log \pi})

    Its mean falls with the entropy in healthy training; positive while the entropy runs to 0 it is the mechanism [1].

    Args:
        log_probs: Of the actions that were taken, shape ``(N,)``.
        advantages: Of these actions, shape ``(N,)``.
        counted: Boolean, shape ``(N,)``; all by default.
        means: Of the two, where they are of more tokens than these; by default of the tokens that count.

    Returns:
        ``float64`` (``float32`` on devices without), shape ``(N,)``; NaN where a token does not count.

    Raises:
        ValueError: If the shapes differ.

    References:
        [1] Cui et al., 2025, https://arxiv.org/abs/2505.22617.

    Example:
        >>> log_probs, advantages = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.0, 0.0, -1.0])
        >>> advantage_covariance(log_probs, advantages)
        tensor([1., 0., 1.], dtype=torch.float64)
    """
    if log_probs.shape != advantages.shape:
        raise ValueError(f"`advantages` must have shape {tuple(log_probs.shape)}, got {tuple(advantages.shape)}.")
    dtype = accumulation_dtype(log_probs.device)
    x, y = log_probs.detach().to(dtype), advantages.detach().to(log_probs.device, dtype)
    valid = x.isfinite() & y.isfinite() & (torch.ones_like(x, dtype=torch.bool) if counted is None else counted)
    if means is None:
        n = valid.sum()
        means = x.where(valid, 0).sum() / n, y.where(valid, 0).sum() / n
    return ((x - means[0]) * (y - means[1])).where(valid, torch.nan)


def output_sums(rows: OutputRows, vocabulary: int, counted: Tensor | None = None) -> Tensor:
    """What adds up over rows, for :func:`output_readings`: ``(8 + BINS,)`` in double precision where there is any.

    Args:
        rows: See :func:`output_rows`.
        vocabulary: Number of outputs ``V``.
        counted: Boolean, of the shape of the fields: rows to count; all by default.
    """
    dtype = accumulation_dtype(rows.entropy.device)
    entropy, log_z, _, log_prob = (field.flatten().to(dtype) for field in rows)
    asked = torch.ones_like(entropy, dtype=torch.bool) if counted is None else counted.flatten()
    kept = asked & entropy.isfinite()
    told = kept & log_prob.isfinite()
    share = entropy / max(log(vocabulary), 1e-12)
    bins = (share.nan_to_num(0.0) * BINS).long().clamp(0, BINS - 1)
    histogram = torch.zeros(BINS, dtype=dtype, device=entropy.device).index_add_(0, bins, kept.to(dtype))
    powers = [entropy, entropy.square(), log_z, log_z.square()]
    sums = [kept.sum(), *(values.where(kept, 0.0).sum() for values in powers)]
    sums += [told.sum(), -log_prob.where(told, 0.0).sum(), (asked & ~kept).sum()]
    return torch.cat([torch.stack([each.to(dtype) for each in sums]), histogram])


def output_readings(sums: Tensor, vocabulary: Tensor | float) -> dict[str, Tensor]:
    """Means of what :func:`output_sums` added up.

    Args:
        sums: Over all rows.
        vocabulary: Number of outputs ``V``.

    Returns:
        ``entropy`` in nats with its standard ``error`` (of independent rows), ``entropy_fraction`` of ``log V``,
        ``log_z`` and ``log_z_rms``, ``cross_entropy`` of the targets, the counts ``n`` and ``nonfinite``, and the
        ``histogram`` of fractions; NaN without a row.

    Example:
        >>> found = output_readings(output_sums(output_rows(torch.zeros(3, 8)), 8), 8)
        >>> found["entropy_fraction"].round(decimals=6).item(), found["log_z"].exp().round().item(), found["n"].item()
        (1.0, 8.0, 3.0)
    """
    n, entropy, squares, log_z, log_z_squares, told, surprise, lost = sums[:8].unbind()
    mean = entropy / n
    spread = (squares / n - mean.square()).clamp_min(0) * n / (n - 1).clamp_min(1)
    return {
        "entropy": mean,
        "error": (spread / n).sqrt(),
        "entropy_fraction": mean / torch.as_tensor(vocabulary, dtype=sums.dtype, device=sums.device).log(),
        "log_z": log_z / n,
        "log_z_rms": (log_z_squares / n).sqrt(),
        "cross_entropy": surprise / told,
        "n": n,
        "nonfinite": lost,
        "histogram": sums[8:],
    }


def _chunks(logits: Tensor, chunk: int) -> Iterator[Tensor]:
    """Rows of logits, some at a time; views, where the layout of the logits allows it."""
    width = logits.shape[-1]
    if logits.ndim < 2 or logits.is_contiguous() or not logits.numel():
        yield from torch.split(logits.reshape(-1, width), chunk)
        return
    inner = max(logits[0].numel() // width, 1)
    for part in torch.split(logits, max(chunk // inner, 1)):
        yield from torch.split(part.reshape(-1, width), chunk)


@full_precision
def _read(logits: Tensor, targets: Tensor | None) -> tuple[Tensor, ...]:
    top = logits.amax(dim=-1)
    shifted = logits - top.unsqueeze(-1)
    mass = shifted.exp()
    total = mass.sum(dim=-1)
    log_total = total.log()
    # a logit of minus infinity has no mass, and zero times infinity is no number
    energy = mass.mul_(shifted.clamp_min_(torch.finfo(shifted.dtype).min)).sum(dim=-1) / total
    entropy = (log_total - energy).clamp_min(0)
    log_z = top + log_total
    if targets is None:
        return entropy, log_z, top, torch.full_like(top, torch.nan)
    known = (targets >= 0) & (targets < logits.shape[-1])  # an index out of range would end a run on an accelerator
    index = targets.long().where(known, torch.zeros_like(targets, dtype=torch.long))
    log_prob = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) - log_z
    return entropy, log_z, top, log_prob.where(known, torch.nan)
