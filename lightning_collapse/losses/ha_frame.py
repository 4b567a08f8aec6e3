"""HAFrame loss: cross-entropy, and the cosines of features with a fixed hierarchy-aware frame."""

import math

import torch
from torch import Tensor, nn

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.labels import named_rows, require_fixed
from lightning_collapse.losses.support.rows import mean_of_rows, unit_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.product import product


class HAFrameLoss(AntiCollapseLoss):
    r"""Features go to the row of their class in a hierarchy-aware frame, at the cosines that near classes have.

    .. math:: (1 - a)\, \operatorname{CE}(W h) + a\, \tfrac1N \sum_i \sum_c
        \big(\cos \angle(w_c, h_i) - S_{y_i c}\big)^2, \qquad S = W W^\top

    in place of the cross-entropy, with terms ``cross_entropy`` and ``cosines``. A row of zeros has cosines of 0.

    Collective: every process must call it; one all-reduce of 4 numbers.

    Args:
        classifier: A module whose ``weight`` of shape ``(C, D)`` is fixed and holds rows of length 1.
        mixing: ``a``, between 0 and 1; that of the authors' script for CIFAR-100 by default, 0.5 for others.

    Raises:
        ValueError: If the classifier has no such weight, or ``mixing`` is out of range.

    References:
        Liang & Davis, *Inducing Neural Collapse to a Fixed Hierarchy-Aware Frame for Reducing Mistake Severity*, ICCV
        2023. https://arxiv.org/abs/2303.05689

    Example:
        >>> from lightning_collapse.layers import HAFrameClassifier
        >>> classifier = HAFrameClassifier([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [2.0, 2.0, 0.0]])
        >>> loss = HAFrameLoss(classifier)
        >>> terms = loss.terms(5 * classifier.weight, torch.arange(3))
        >>> {name: round(term.item(), 4) for name, term in terms.items()}
        {'cross_entropy': 0.0021, 'cosines': 0.0}
    """

    source = "Liang & Davis, ICCV 2023, arXiv 2303.05689; of features, with a fixed frame"
    takes_labels = "classes"

    def __init__(self, classifier: nn.Module, mixing: float = 0.4) -> None:
        super().__init__()
        require_fixed(classifier, "HAFrameClassifier")
        if not 0 <= mixing <= 1:
            raise ValueError(f"`mixing` must be between 0 and 1, got {mixing}.")
        self.classifier = classifier
        self.coefficients = {"cross_entropy": 1 - mixing, "cosines": mixing}

    @full_precision
    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """Both terms; features of shape ``(N, D)`` and labels ``(N,)``, of which those that name no class count not."""
        (features,) = separate_views("HAFrameLoss", features=views[0])
        frame: Tensor = self.classifier.weight.to(features.dtype)  # type: ignore[assignment]
        if features.shape[1] != frame.shape[1]:
            raise ValueError(
                f"`features` of `HAFrameLoss` must be as wide as the frame, {frame.shape[1]}, got {features.shape[1]}."
                " Make the classifier for the width of the layer."
            )
        labels, named = named_rows("HAFrameLoss", features, views[1], len(frame))
        logits = product(features, frame.T)
        entropy = logits.logsumexp(dim=1) - logits.gather(1, labels.unsqueeze(1)).squeeze(1)
        errors = (product(unit_rows(features), frame.T) - (frame @ frame.T)[labels]).square().sum(dim=1)
        means = mean_of_rows("HAFrameLoss", torch.stack([entropy, errors], dim=1), named)
        return {"cross_entropy": means[0], "cosines": means[1]}

    @property
    def value_at_collapse(self) -> float:
        """All features 0, with as many rows of every class: log C and the mean square of a row of S."""
        weight: Tensor = self.classifier.weight.double()  # type: ignore[assignment]
        square = float((weight @ weight.T).square().sum() / len(weight))
        return self.coefficients["cross_entropy"] * math.log(len(weight)) + self.coefficients["cosines"] * square

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"mixing={self.coefficients['cosines']}"
