"""Stability gap: how deep accuracies fall while later tasks are learned, and not only after them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_collapse.spectral.precision import full_precision


@full_precision
def min_accuracy(curves: Tensor) -> Tensor:
    r"""Mean over earlier tasks of the lowest accuracy since each was learned (min-ACC).

    .. math:: \text{min-ACC}_k = \frac1{k-1} \sum_{i=1}^{k-1} \min_{t_i < n \le t} A(E_i, f_n)

    A task whose accuracy falls and recovers between two ends of tasks shows here only if it was evaluated in between:
    the paper does so at every step, on a subset of the data.

    Args:
        curves: Accuracies on earlier tasks, shape ``(k - 1, n)``, one column per evaluation; NaN where a task was not
            evaluated or had not ended.

    Returns:
        0-dimensional; NaN without earlier tasks, or if one of them was never evaluated.

    Raises:
        ValueError: If ``curves`` is not a matrix.

    References:
        De Lange et al., *Continual evaluation for lifelong learning: identifying the stability gap*, ICLR 2023.
        https://arxiv.org/abs/2205.13452

    Example:
        >>> min_accuracy(torch.tensor([[0.9, 0.2, 0.6], [torch.nan, 0.8, 0.4]]))
        tensor(0.3000)
    """
    if curves.ndim != 2:
        raise ValueError(f"`curves` must have shape (earlier tasks, evaluations), got {tuple(curves.shape)}.")
    if not curves.numel():
        return curves.new_full((), torch.nan)
    known = ~curves.isnan()
    lowest = torch.where(known, curves, torch.inf).amin(dim=1)
    return torch.where(known.any(dim=1), lowest, torch.nan).mean()


@full_precision
def worst_case_accuracy(current: Tensor, curves: Tensor) -> Tensor:
    r"""Accuracy on the running task, and the lowest on each earlier one, each task weighing the same (WC-ACC).

    .. math:: \text{WC-ACC}_t = \frac1k A(E_k, f_t) + \Big(1 - \frac1k\Big)\, \text{min-ACC}_k

    Args:
        current: Accuracy on the running task now, 0-dimensional.
        curves: As for :func:`min_accuracy`, shape ``(k - 1, n)``.

    Returns:
        0-dimensional, never above :func:`~lightning_collapse.functional.average_accuracy` at the same time.

    Raises:
        ValueError: If ``curves`` is not a matrix.

    References:
        De Lange et al., *Continual evaluation for lifelong learning: identifying the stability gap*, ICLR 2023.
        https://arxiv.org/abs/2205.13452

    Example:
        >>> worst_case_accuracy(torch.tensor(0.8), torch.tensor([[0.2, 0.6]]))
        tensor(0.5000)
    """
    share = 1 / (len(curves) + 1)
    return current if share == 1 else share * current + (1 - share) * min_accuracy(curves)


@full_precision
def windowed_forgetting(curves: Tensor, window: int) -> Tensor:
    r"""Largest fall of an accuracy within any ``window`` evaluations in a row (WF).

    .. math:: \text{WF}^w = \max_{m \le n < m + w} A(E, f_m) - A(E, f_n)

    With the pair of an evaluation and itself, so that a curve that never falls reads 0 and not a rise.

    Args:
        curves: Accuracies, shape ``(..., n)``; NaN where a task was not evaluated. Average over tasks for the figure of
            a sequence.
        window: :math:`w`, at least 2; the paper takes 10 and 100 with an evaluation at every step.

    Returns:
        Shape ``(...)``, 0 (never fell) to 1; NaN without a number.

    Raises:
        ValueError: If ``window`` is less than 2, or ``curves`` has no dimension.

    References:
        De Lange et al., *Continual evaluation for lifelong learning: identifying the stability gap*, ICLR 2023.
        https://arxiv.org/abs/2205.13452

    Example:
        >>> windowed_forgetting(torch.tensor([0.9, 0.8, 0.7, 0.2, 0.9]), window=2)
        tensor(0.5000)
    """
    if window < 2:
        raise ValueError(f"`window` must hold at least 2 evaluations, got {window}.")
    if not curves.ndim:
        raise ValueError("`curves` must have at least one dimension, the evaluations; got a single number.")
    if not curves.shape[-1]:
        return curves.new_full(curves.shape[:-1], torch.nan)
    known = ~curves.isnan()
    padded = pad(torch.where(known, curves, -torch.inf), (window - 1, 0), value=-torch.inf)
    best = padded.unfold(-1, window, 1).amax(dim=-1)  # of the evaluation and those before it
    fall = torch.where(known, best - curves, -torch.inf)
    return torch.where(known.any(dim=-1), fall.amax(dim=-1), torch.nan)


@full_precision
def windowed_plasticity(curves: Tensor, window: int) -> Tensor:
    r"""Largest rise of an accuracy within any ``window`` evaluations in a row (WP).

    .. math:: \text{WP}^w = \max_{m \le n < m + w} A(E, f_n) - A(E, f_m)

    Args:
        curves: As for :func:`windowed_forgetting`.
        window: As for :func:`windowed_forgetting`.

    Returns:
        Shape ``(...)``, 0 (never rose) to 1; NaN without a number.

    Raises:
        ValueError: If ``window`` is less than 2, or ``curves`` has no dimension.

    References:
        De Lange et al., *Continual evaluation for lifelong learning: identifying the stability gap*, ICLR 2023.
        https://arxiv.org/abs/2205.13452

    Example:
        >>> windowed_plasticity(torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8]), window=3)
        tensor(0.7000)
    """
    return windowed_forgetting(-curves, window)
