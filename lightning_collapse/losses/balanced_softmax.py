"""Balanced softmax: cross-entropy that does not learn how frequent the classes are."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.labels import named_rows
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision


@full_precision
def balanced_cross_entropy(logits: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    r"""Cross-entropy of logits to which the logarithm of the size of each class is added.

    .. math:: -\tfrac{1}{N} \sum_i \log \frac{n_{y_i} e^{z_{i y_i}}}{\sum_k n_k e^{z_{ik}}}

    Collective: every process must call it; one all-reduce of 3 numbers.

    Args:
        logits: Shape ``(N, C)``, with at least one row over all processes.
        labels: Class of each row, integers of shape ``(N,)``; rows whose label is negative, such as -100, or of a class
            of size 0, are left out.
        class_counts: Rows of each class in the training set, :math:`n_k`, or their share; shape ``(C,)``.

    Returns:
        Scalar, at least ``float32``, the value on the global batch; for equal sizes the plain cross-entropy.

    Raises:
        ValueError: If ``logits`` is not a matrix with a column per class, the labels are not integers, one per row, or
            if there is no row over all processes; in the memory of a single process, if a label is ``C`` or more.

    References:
        Ren et al., *Balanced Meta-Softmax*, NeurIPS 2020. https://arxiv.org/abs/2007.10740

    Example:
        >>> balanced_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([3.0, 1.0]))  # log 4
        tensor(1.3863)
    """
    (logits,) = separate_views("balanced_cross_entropy", logits=logits)
    if class_counts.shape != logits.shape[1:]:
        raise ValueError(
            f"`logits` of `balanced_cross_entropy` must have a column for each of {len(class_counts)} classes, got"
            f" {logits.shape[1]}."
        )
    labels, named = named_rows("balanced_cross_entropy", logits, labels, len(class_counts))
    counted = named & (class_counts > 0)[labels]
    shifted = logits + class_counts.to(logits.dtype).log()
    right = torch.where(counted, shifted.gather(1, labels.unsqueeze(1)).squeeze(1), 0.0)
    return mean_of_rows("balanced_cross_entropy", (shifted.logsumexp(dim=1) - right).unsqueeze(1), counted).squeeze(0)


class BalancedSoftmax(AntiCollapseLoss):
    """Module form of ``balanced_cross_entropy``, in place of the cross-entropy, with one term, ``cross_entropy``.

    Args:
        class_counts: Rows of each class in the training set (in federated learning, that of the client), such as
            ``torch.bincount(labels)``, or their share.

    Raises:
        ValueError: If there are fewer than two, one is negative or not finite, or all are 0.

    References:
        Ren et al., *Balanced Meta-Softmax for Long-Tailed Visual Recognition*, NeurIPS 2020.
        https://arxiv.org/abs/2007.10740; with a fixed simplex classifier: Li et al., ICCV 2023.
        https://arxiv.org/abs/2303.10058

    Example:
        >>> loss = BalancedSoftmax([90, 10])
        >>> logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
        >>> round(loss(logits, labels).item(), 3)
        1.204
    """

    source = "Ren et al., NeurIPS 2020, arXiv 2007.10740"
    takes_labels = "classes"
    constants = ("class_counts",)
    class_counts: Tensor

    def __init__(self, class_counts: Sequence[float] | Tensor) -> None:
        super().__init__()
        counts = [float(count) for count in class_counts]
        if len(counts) < 2 or not all(0 <= count < math.inf for count in counts) or not any(counts):
            raise ValueError(f"`class_counts` must hold the sizes of two classes or more, got {counts}.")
        self.register_buffer("class_counts", torch.tensor(counts, dtype=torch.float32), persistent=False)
        self.coefficients = {"cross_entropy": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"cross_entropy": balanced_cross_entropy(logits, labels)}`` for logits ``(N, C)`` and labels ``(N,)``."""
        logits, labels = views
        return {"cross_entropy": balanced_cross_entropy(logits, labels, self.class_counts)}

    @property
    def value_at_collapse(self) -> float:
        """Entropy of the class sizes: all logits equal, and classes as frequent in the batch as in the training set."""
        share = self.class_counts.double() / self.class_counts.double().sum()
        return float(-torch.special.xlogy(share, share).sum())

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"class_counts={self.class_counts.tolist()}"
