"""MaxSup: keep the largest logit near the mean one, whichever class it is of; and what label smoothing does instead."""

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.labels import named_rows
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.registry import register_loss


@full_precision
def max_suppression(logits: Tensor) -> Tensor:
    r"""Mean distance of the largest logit from the mean logit.

    .. math:: \tfrac{1}{N} \sum_i \Big(\max_k z_{ik} - \tfrac{1}{K} \sum_k z_{ik}\Big)

    Its gradient with respect to the logits of a row is :math:`(1 - 1/K) / N` at the largest, :math:`-1 / (K N)` at the
    others. Logits that tie share the former evenly. It needs no label, so mixed targets are no obstacle.

    Collective: every process must call it; one all-reduce of 3 numbers.

    Args:
        logits: Shape ``(N, K)``, with at least one row over all processes.

    Returns:
        Scalar, at least ``float32``, the value on the global batch: 0 if all logits of a row are equal.

    Raises:
        ValueError: If ``logits`` is not a matrix, or if there is no row over all processes.

    References:
        Zhou et al., *MaxSup*, NeurIPS 2025. https://arxiv.org/abs/2502.15798

    Example:
        >>> max_suppression(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        tensor(1.)
    """
    (logits,) = separate_views("max_suppression", logits=logits)
    return mean_of_rows("max_suppression", (logits.amax(dim=1) - logits.mean(dim=1)).unsqueeze(1)).squeeze(0)


@full_precision
def label_smoothing_terms(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    r"""What label smoothing adds to the cross-entropy, in the part that regularizes and the part that amplifies errors.

    With :math:`z_y` the logit of the label, cross-entropy with label smoothing :math:`\alpha` is exactly

    .. math:: \operatorname{CE} + \alpha \Big(z_y - \tfrac{1}{K} \sum_k z_k\Big)
        = \operatorname{CE} + \alpha \Big(\tfrac{1}{K} \sum_{z_k < z_y} (z_y - z_k)
        + \tfrac{1}{K} \sum_{z_k > z_y} (z_y - z_k)\Big)

    The first sum holds the right logit near those below it; the second, never positive, is there if the row is
    classified wrongly and pushes the wrong logits further up. :func:`max_suppression` has no such part.

    Collective: every process must call it; one all-reduce of 5 numbers.

    Args:
        logits: Shape ``(N, K)``, with at least one row over all processes.
        labels: Class of each row, integers of shape ``(N,)``; rows whose label names no class, such as -100, are left
            out.

    Returns:
        Scalars ``cross_entropy``, ``regularization`` and ``error_amplification``, the latter two without
        :math:`\alpha`, at least ``float32``, of the global batch.

    Raises:
        ValueError: If ``logits`` is not a matrix, the labels are not integers, one per row, or if there is no row over
            all processes.

    References:
        Zhou et al., *MaxSup*, NeurIPS 2025, theorem 3.3 and its corollary. https://arxiv.org/abs/2502.15798

    Example:
        >>> terms = label_smoothing_terms(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([0]))
        >>> [round(value.item(), 3) for value in terms.values()]
        [2.17, 0.333, -0.667]
    """
    (logits,) = separate_views("label_smoothing_terms", logits=logits)
    labels, named = named_rows("label_smoothing_terms", logits, labels, logits.shape[1])
    margins = logits.gather(1, labels.unsqueeze(1)) - logits
    cross_entropy = torch.logsumexp(-margins, dim=1)  # of logits less that of the label
    above, below = margins.clamp_min(0).mean(dim=1), margins.clamp_max(0).mean(dim=1)
    means = mean_of_rows("label_smoothing_terms", torch.stack([cross_entropy, above, below], dim=1), named)
    return dict(zip(("cross_entropy", "regularization", "error_amplification"), means.unbind(), strict=True))


@register_loss
class MaxSup(AntiCollapseLoss):
    r"""Max suppression of the logits, to be added to the cross-entropy with hard labels.

    .. math:: \alpha\, \tfrac{1}{N} \sum_i \Big(\max_k z_{ik} - \tfrac{1}{K} \sum_k z_{ik}\Big)

    Where the row is classified rightly this is what label smoothing adds; where it is not, label smoothing pushes the
    wrong logits up, see :func:`label_smoothing_terms`, and draws the rows of a class together more than MaxSup does.
    One term, ``max_suppression``.

    Published with a constant :math:`\alpha`; the authors' code lets it rise linearly from 0.1 to 0.2 while training
    runs: ``weight=LinearRamp(first=1.0, last=2.0, steps=...)`` with the default here.

    Args:
        max_suppression: Coefficient α; the published value by default.

    References:
        Zhou et al., *MaxSup: Overcoming Representation Collapse in Label Smoothing*, NeurIPS 2025.
        https://arxiv.org/abs/2502.15798, code at https://github.com/ZhouYuxuanYX/Maximum-Suppression-Regularization.

    Example:
        >>> round(MaxSup()(torch.tensor([[3.0, 0.0, 0.0]])).item(), 6)
        0.2
    """

    source = (
        "Zhou et al., NeurIPS 2025, arXiv 2502.15798; of logits, beside the cross-entropy, in place of label smoothing"
    )

    def __init__(self, max_suppression: float = 0.1) -> None:
        super().__init__()
        self.coefficients = {"max_suppression": max_suppression}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"max_suppression": max_suppression(logits)}`` for logits of shape ``(N, K)``."""
        (logits,) = views
        return {"max_suppression": max_suppression(logits)}

    @property
    def value_at_perfection(self) -> float:
        """0, its least value: all logits of a row are equal."""
        return 0.0

    @property
    def value_at_collapse(self) -> float:
        """0 where all logits are equal; rows that are equal but hold different logits read what each of them reads."""
        return 0.0

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"max_suppression={self.coefficients['max_suppression']}"
