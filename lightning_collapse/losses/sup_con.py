"""Supervised contrastive loss (SupCon): each row tells those of its class from all others; jointly with SimCLR."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.contrast import contrast, masked_logsumexp, masked_mean
from lightning_collapse.losses.support.labels import gather_classes, named_rows
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import stack_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_positive

Form = Literal["out", "in"]
FORMS = get_args(Form)


@full_precision
def sup_con_terms(
    first: Tensor, second: Tensor, labels: Tensor, temperature: float = 0.1, form: Form = "out"
) -> dict[str, Tensor]:
    r"""The two terms of :class:`SupCon`, unweighted.

    .. math:: \text{supervised} = \frac{1}{2N} \sum_a \frac{-1}{|P(a)|} \sum_{p \in P(a)}
        \log \frac{e^{s_{ap}}}{\sum_{k \ne a} e^{s_{ak}}}, \qquad s_{ak} = u_a^\top u_k / \tau

    over the ``2 N`` rows of both views of the global batch, of length 1, with :math:`P(a)` all others of the class of
    :math:`a`. ``self_supervised`` has the other view of the same sample in place of :math:`P(a)`:
    :func:`~lightning_collapse.losses.info_nce_loss`.

    Collective: every process must call it; gathers all rows with their gradient, and all-reduces of ``N`` and of four
    numbers.

    Args:
        first: Representations of one view, shape ``(N, D)``, with at least one row over all processes.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        labels: Class of each sample, integers of shape ``(N,)``; samples whose label is negative, such as -100, are
            left out.
        temperature: :math:`\tau`; the paper's value by default.
        form: ``"out"`` has the mean over :math:`P(a)` outside of the logarithm, as above, which the paper finds
            better; ``"in"`` inside.

    Returns:
        Scalars ``supervised`` and ``self_supervised``, at least ``float32``, of the global batch; both are
        ``log(2 N - 1)`` if all rows are equal. At class collapse, where classes are points far from each other, both
        are ``log(2 n - 1)`` of classes of ``n`` samples: the least there is of the first, and not of the second.

    Raises:
        ValueError: If the views are not matrices of one shape, the labels are not integers, one per row, or if there
            is no row over all processes.

    Example:
        >>> first, second = torch.eye(2), torch.eye(2)
        >>> terms = sup_con_terms(first, second, torch.tensor([0, 0]))
        >>> {name: round(value.item(), 3) for name, value in terms.items()}
        {'supervised': 6.667, 'self_supervised': 0.0}
    """
    require_one_of(FORMS, form=form)
    views = stack_views("sup_con_terms", first=first, second=second)
    labels, named = named_rows("sup_con_terms", first, labels)
    pairs = contrast("sup_con_terms", torch.where(named.unsqueeze(1), views, 0.0), temperature)
    keys = gather_classes(labels, named, pairs.first, pairs.logits.shape[1] // 2).repeat(2)
    anchors, counted = labels.repeat(2), named.repeat(2)
    others = pairs.others & (keys >= 0)
    positives = others & (anchors.unsqueeze(1) == keys) & counted.unsqueeze(1)
    total = masked_logsumexp(pairs.logits, others | ~counted.unsqueeze(1))
    if form == "out":
        likeness = masked_mean(pairs.logits, positives)
    else:
        sums = masked_logsumexp(pairs.logits, positives | ~counted.unsqueeze(1))
        likeness = sums - positives.sum(dim=1).clamp_min(1).log()
    values = torch.stack([total - likeness, total - pairs.other_view()], dim=1)
    supervised, self_supervised = mean_of_rows("sup_con_terms", values, counted)
    return {"supervised": supervised, "self_supervised": self_supervised}


class SupCon(AntiCollapseLoss):
    r"""Supervised contrastive loss; with ``beta`` the joint loss that keeps classes from collapsing to points.

    .. math:: (1 - \beta)\, L_{\text{supervised}} + \beta\, L_{\text{self-supervised}}

    With labels alone all that is not the class goes, subclasses with it. The joint form [2] [3], a convex combination
    with SimCLR's loss, keeps rows of a class apart. How much is enough depends on the temperature, see [3].

    Args:
        temperature: What cosines are divided by.
        beta: Share of the self-supervised term; none in [1].
        form: Where the mean over the rows of a class is, see ``sup_con_terms``.

    Raises:
        ValueError: If ``temperature`` is not positive, ``beta`` not between 0 and 1, or ``form`` unknown.

    References:
        [1] Khosla et al., *Supervised Contrastive Learning*, NeurIPS 2020. https://arxiv.org/abs/2004.11362

        [2] Xue et al., *Which Features are Learnt by Contrastive Learning?*, ICML 2023.
        https://arxiv.org/abs/2305.16536

        [3] Lee et al., *A Theoretical Framework for Preventing Class Collapse in Supervised Contrastive Learning*,
        2025. https://arxiv.org/abs/2503.08203

    Example:
        >>> views, labels = torch.arange(24.0).reshape(2, 4, 3).sin(), torch.tensor([0, 0, 1, 1])
        >>> round(SupCon()(*views, labels).item(), 3), round(SupCon(beta=0.5)(*views, labels).item(), 3)
        (13.411, 7.598)
    """

    views = 2
    takes_labels = "classes"
    source = "Khosla et al., NeurIPS 2020, arXiv 2004.11362, the mean outside; `beta=` for a joint loss with SimCLR's"

    def __init__(self, temperature: float = 0.1, beta: float = 0.0, form: Form = "out") -> None:
        super().__init__()
        require_positive(temperature=temperature)
        require_one_of(FORMS, form=form)
        if not 0 <= beta <= 1:
            raise ValueError(f"`beta` must be between 0 and 1, got {beta}. It is the share of SimCLR's loss.")
        self.temperature = temperature
        self.form: Form = form
        self.coefficients = {"supervised": 1.0 - beta, "self_supervised": beta}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`sup_con_terms`; views of shape ``(N, D)`` and labels ``(N,)``."""
        first, second, labels = views
        return sup_con_terms(first, second, labels, self.temperature, self.form)

    @property
    def value_at_collapse(self) -> float:
        """``nan``: it depends on the number of rows, see :meth:`at_collapse`."""
        return math.nan

    def at_collapse(self, rows: int, dim: int) -> float:
        """``log(2 N - 1)``: all rows are one point."""
        return math.log(2 * rows - 1)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"temperature={self.temperature}, beta={self.coefficients['self_supervised']}, form={self.form!r}"
