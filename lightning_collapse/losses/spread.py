"""Spread loss: classes are told apart, and within each class each view its own sample, against class collapse."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.contrast import masked_logsumexp, masked_mean
from lightning_collapse.losses.support.labels import gather_classes, named_rows
from lightning_collapse.losses.support.pairs import gather_rows
from lightning_collapse.losses.support.products import inner_products
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_not_negative, require_positive

LINEAR = 50.0  # beyond it a softplus is its argument, in double precision too


@full_precision
def spread_terms(first: Tensor, second: Tensor, labels: Tensor, temperature: float = 0.5) -> dict[str, Tensor]:
    r"""The two terms of :class:`SpreadLoss`, unweighted, with :math:`s_{ak} = z'^\top_a z_k / \tau`.

    .. math:: \text{attract} = \frac{1}{N} \sum_a \frac{1}{|P(a)|} \sum_{p \in P(a)}
        -\log \frac{e^{s_{ap}}}{e^{s_{ap}} + \sum_{k \notin P(a)} e^{s_{ak}}}, \qquad
        \text{spread} = \frac{1}{N} \sum_a -\log \frac{e^{s_{aa}}}{\sum_{p \in P(a)} e^{s_{ap}}}

    Anchors are the rows of the second view, keys those of the first, and :math:`P(a)` are the keys of the class of
    :math:`a`, its own other view among them: one positive in each denominator of ``attract``. As released the rows are
    taken as they are; those of length 1 make it a loss of angles.

    Collective: every process must call it; gathers the rows of the first view with their gradient, and all-reduces of
    ``N`` and of four numbers.

    Args:
        first: Representations of one view, shape ``(N, D)``, with at least one row over all processes.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        labels: Class of each sample, integers of shape ``(N,)``; samples whose label is negative, such as -100, are
            left out.
        temperature: τ; that of the authors' code by default.

    Returns:
        Scalars ``attract`` and ``spread``, at least ``float32``, 0 or more, of the global batch. At class collapse,
        all rows of a class equal, ``spread`` is the mean over samples of ``log n``, ``n`` samples in their class.

    Raises:
        ValueError: If the views are not matrices of one shape, the labels are not integers, one per row, or if there
            is no row over all processes.

    Example:
        >>> rows, labels = torch.eye(2)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 1])
        >>> {name: round(value.item(), 3) for name, value in spread_terms(rows, rows, labels).items()}
        {'attract': 0.18, 'spread': 0.824}
    """
    first, second = separate_views("spread_terms", first=first, second=second)
    labels, named = named_rows("spread_terms", first, labels)
    first, second = (torch.where(named.unsqueeze(1), view, 0.0) for view in (first, second))
    everything, begin = gather_rows("spread_terms", first, least=1)
    keys = gather_classes(labels, named, begin, len(everything))
    logits = inner_products(second, everything) / temperature
    same = (labels.unsqueeze(1) == keys) & named.unsqueeze(1)
    negatives = masked_logsumexp(logits, ~same & (keys >= 0) & named.unsqueeze(1))
    attract = masked_mean(softplus(negatives.unsqueeze(1) - logits, threshold=LINEAR), same)
    own = torch.arange(begin, begin + len(first), device=first.device)
    spread = masked_logsumexp(logits, same | ~named.unsqueeze(1)) - logits.gather(1, own.unsqueeze(1)).squeeze(1)
    attract, spread = mean_of_rows("spread_terms", torch.stack([attract, spread], dim=1), named)
    return {"attract": attract, "spread": spread}


class SpreadLoss(AntiCollapseLoss):
    r"""A supervised contrastive loss and a class-conditional InfoNCE, which forces the subclasses of a class apart.

    .. math:: \frac{a_1 L_{\text{attract}} + a_2 L_{\text{spread}}}{a_1 + a_2}

    Args:
        temperature: What dot products are divided by.
        attract: Coefficient ``a_1``.
        spread: Coefficient ``a_2``.

    Raises:
        ValueError: If ``temperature`` is not positive, or the coefficients are negative or both 0.

    References:
        Chen et al., *Perfectly Balanced: Improving Transfer and Robustness of Supervised Contrastive Learning*, ICML
        2022. https://arxiv.org/abs/2204.07596, code at https://github.com/HazyResearch/thanos-code, whose default
        clamps similarities of positives at 1; not here.

    Example:
        >>> views, labels = torch.arange(24.0).reshape(2, 4, 3).sin(), torch.tensor([0, 0, 1, 1])
        >>> round(SpreadLoss()(*views, labels).item(), 3)
        1.368
    """

    views = 2
    takes_labels = "classes"
    source = "Chen et al., ICML 2022, arXiv 2204.07596, released-code form without its clamp of positives"

    def __init__(self, temperature: float = 0.5, attract: float = 1.0, spread: float = 1.0) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        require_not_negative(attract=attract, spread=spread)
        if not attract + spread:
            raise ValueError("`attract` and `spread` must not both be 0: nothing is left of the loss.")
        self.temperature = temperature
        self.coefficients = {"attract": attract / (attract + spread), "spread": spread / (attract + spread)}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`spread_terms`; views of shape ``(N, D)`` and labels ``(N,)``."""
        first, second, labels = views
        return spread_terms(first, second, labels, self.temperature)

    @property
    def value_at_collapse(self) -> float:
        """``nan``: it depends on how many samples each class has, see ``spread_terms``."""
        return math.nan

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"temperature={self.temperature}, " + ", ".join(f"{k}={v}" for k, v in self.coefficients.items())
