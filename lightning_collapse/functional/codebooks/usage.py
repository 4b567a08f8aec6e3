"""Codebook usage: how many codes are chosen, how evenly, and which of the others are rare and which are dead."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from lightning_collapse.functional.assignment import perplexity
from lightning_collapse.spectral.precision import accumulation_dtype

DUE = 20.0
"""Hits that a code must have missed to be called dead: chance leaves one in ``exp(20)`` alive ones without any."""


def usage_null(n: float, codes: int) -> float:
    r"""Share of the codes that ``n`` independent, equally likely choices hit, :math:`1 - (1 - 1/K)^n`; NaN without any.

    That of the perplexity is :func:`~lightning_collapse.functional.assignment_null`.

    Example:
        >>> round(usage_null(512, 512), 3), round(usage_null(2048, 512), 3)
        (0.632, 0.982)
    """
    return 1 - (1 - 1 / codes) ** n if n > 0 else nan


def code_counts(indices: Tensor, codes: int) -> Tensor:
    """How often every code is chosen, ``int64``, without waiting for the device.

    Args:
        indices: Whole numbers, any shape, also empty.
        codes: Number of codes ``K``.

    Returns:
        Shape ``(K + 1,)``; the last counts indices that are no code, below 0 or above ``K - 1``.

    Raises:
        TypeError: If indices are no whole numbers.

    Example:
        >>> code_counts(torch.tensor([[0, 2], [2, 7]]), codes=3)
        tensor([1, 0, 2, 1])
    """
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"`indices` must be whole numbers, got {indices.dtype}. Return `indices.long()`.")
    flat = indices.detach().flatten().long()
    flat = torch.where((flat < 0) | (flat >= codes), codes, flat)
    return torch.zeros(codes + 1, dtype=torch.int64, device=flat.device).index_add_(0, flat, torch.ones_like(flat))


def usage(counts: Tensor) -> Tensor:
    """Share of the codes that were chosen at least once, of counts ``(K,)``; 0-dimensional, NaN without a choice.

    Example:
        >>> usage(torch.tensor([3, 0, 1, 0]))
        tensor(0.5000, dtype=torch.float64)
    """
    share = (counts > 0).to(accumulation_dtype(counts.device)).mean()
    return torch.where(counts.sum() > 0, share, nan)


def code_perplexity(counts: Tensor) -> Tensor:
    r"""Exponential of the entropy of the choices, :math:`\exp(-\sum_k p_k \log p_k)` [1], from counts ``(K,)``.

    Returns:
        0-dimensional, 1 (one code) to ``K`` (all alike); NaN without any. Few choices read low, see
        :func:`~lightning_collapse.functional.assignment_null`.

    References:
        [1] van den Oord, Vinyals & Kavukcuoglu, *Neural Discrete Representation Learning*, 2017,
        https://arxiv.org/abs/1711.00937.

    Example:
        >>> code_perplexity(torch.tensor([4, 4, 0, 0])).item()
        2.0
    """
    return torch.where(counts.sum() > 0, perplexity(counts.to(accumulation_dtype(counts.device))), nan)


def miller_madow(counts: Tensor) -> Tensor:
    r"""Perplexity whose entropy is corrected for few choices by :math:`+ (\text{codes seen} - 1) / (2 n)` [1].

    Still low where many codes have not been seen at all, see :func:`unseen_mass`.

    References:
        [1] Miller, *Note on the bias of information estimates*, 1955.

    Example:
        >>> round(miller_madow(torch.tensor([4, 4, 0, 0])).item(), 3)
        2.129
    """
    seen, n = (counts > 0).sum(), counts.sum().clamp_min(1)
    return code_perplexity(counts) * ((seen - 1).clamp_min(0) / (2 * n)).exp()


def unseen_mass(counts: Tensor) -> Tensor:
    r"""Probability that the next choice is a code not seen so far: those seen once over all choices (Good-Turing) [1].

    Near 0 where unused codes are dead, above where they are rare. 0-dimensional, 0 to 1; NaN without a choice.

    References:
        [1] Good, *The population frequencies of species*, Biometrika 1953.

    Example:
        >>> unseen_mass(torch.tensor([5, 3, 1, 1, 0])).item()
        0.2
    """
    dtype = accumulation_dtype(counts.device)
    return (counts == 1).sum().to(dtype) / counts.sum().to(dtype)


def missed_hits(missed: Tensor, counts: Tensor, history: Tensor) -> Tensor:
    r"""How many hits every code should have had since its last one, :math:`\sum_t n_t p_k`, by its share so far.

    A code never hit counts with ``1 / K``.

    Args:
        missed: What this returned for the windows before, ``(K,)``; zeros at first.
        counts: Choices of the window, ``(K,)``.
        history: Choices of all windows before, ``(K,)``.

    Returns:
        Shape ``(K,)``, 0 for what the window hit.

    Example:
        >>> missed_hits(torch.zeros(3), torch.tensor([10, 0, 0]), torch.tensor([0, 5, 0])).tolist()[:2]
        [0.0, 10.0]
    """
    past = history.to(missed.dtype)
    share = torch.where(past > 0, past / past.sum().clamp_min(1), 1 / len(counts))
    return torch.where(counts > 0, 0, missed + counts.sum() * share)


def dead_codes(missed: Tensor, history: Tensor) -> Tensor:
    r"""Which codes are dead, and not only rare: 20 hits overdue by their own share.

    Of codes that were never hit nothing is known but their share of the unseen mass: they are dead if that is a
    twentieth of ``1 / K`` or less.

    Args:
        missed: What :func:`missed_hits` returned, ``(K,)``.
        history: Choices of all windows, ``(K,)``.

    Returns:
        Boolean, shape ``(K,)``.

    Example:
        >>> dead_codes(torch.tensor([0.0, 30.0, 3.0, 30.0]), torch.tensor([80, 9, 9, 0]))
        tensor([False,  True, False,  True])
    """
    never = history == 0
    rare = unseen_mass(history) / never.sum().clamp_min(1) > 1 / (DUE * len(history))
    return (missed >= DUE) & ~(never & rare)
