"""Midpoint mixup: the network sees the midpoint of two samples, and is to answer with the classes of both."""

import torch
from torch import Generator, Tensor

from lightning_collapse.losses.support.labels import named_rows
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision


def midpoint_mixup(
    inputs: Tensor, labels: Tensor, lam: float = 0.5, generator: Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mix each sample with one that a permutation of the batch assigns to it: :math:`\lambda x_i + (1-\lambda) x_j`.

    The share is always one half: common helpers draw it from a Beta law and take its parameter, where 0 means no
    mixup at all. Pairs of one class, and a sample with itself, are allowed, as published.

    Args:
        inputs: Floating point, shape ``(N, ...)``.
        labels: Shape ``(N,)``.
        lam: Share :math:`\lambda` of the sample itself.
        generator: Of the permutation; by default that of the device.

    Returns:
        Mixed inputs, the labels, and the labels of the partners, for :func:`mixup_cross_entropy`.

    Raises:
        ValueError: If the inputs are not floating point, there is not one label per sample, or ``lam`` is not between
            0 and 1.

    References:
        Chidambaram et al., *Provably learning diverse features in multi-view data with midpoint mixup*, ICML 2023.
        https://arxiv.org/abs/2210.13512

    Example:
        >>> mixed, labels, partners = midpoint_mixup(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]))
        >>> bool((mixed.flatten() == (labels + partners)).all())
        True
    """
    _require_share(lam)
    if not inputs.is_floating_point() or labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"`inputs` of `midpoint_mixup` must be floating point of shape (N, ...), and `labels` (N,), got"
            f" {inputs.dtype} of shape {tuple(inputs.shape)} and {tuple(labels.shape)}."
        )
    order = torch.randperm(len(inputs), device=inputs.device, generator=generator)
    return torch.lerp(inputs[order], inputs, lam), labels, labels[order.to(labels.device)]


@full_precision
def mixup_cross_entropy(logits: Tensor, labels: Tensor, partners: Tensor, lam: float = 0.5) -> Tensor:
    r"""Cross-entropy of mixed samples to the labels of both parts.

    .. math:: -\tfrac{1}{N} \sum_i \lambda \log p_i(y_i) + (1 - \lambda) \log p_i(y_j)

    Collective: every process must call it; one all-reduce of three numbers.

    Args:
        logits: Of the mixed inputs, shape ``(N, C)``, with at least one row over all processes.
        labels: Class of each sample, integers of shape ``(N,)``; rows of which either label names no class, such as
            -100, are left out.
        partners: Class of what it was mixed with, ``(N,)``.
        lam: Share :math:`\lambda` of the first.

    Returns:
        Scalar, at least ``float32``, the value on the global batch. Pairs of different classes cost ``log(2)`` at
        least, at the midpoint, where both have probability one half.

    Raises:
        ValueError: If ``logits`` is not a matrix, labels are not integers, one per row, or ``lam`` is not between 0
            and 1; if there is no row over all processes.

    Example:
        >>> mixup_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1]))  # log 2
        tensor(0.6931)
    """
    _require_share(lam)
    (logits,) = separate_views("mixup_cross_entropy", logits=logits)
    log_p = logits.log_softmax(dim=1)
    both = [named_rows("mixup_cross_entropy", logits, y, logits.shape[1]) for y in (labels, partners)]
    own, other = (log_p.gather(1, y.unsqueeze(1)) for y, _ in both)
    return mean_of_rows("mixup_cross_entropy", -torch.lerp(other, own, lam), both[0][1] & both[1][1]).squeeze(0)


def _require_share(lam: float) -> None:
    if not 0 <= lam <= 1:
        raise ValueError(f"`lam` must be between 0 and 1, got {lam}. It is the share of the sample itself, 0.5 here.")
