"""Dot regression: features are pulled to the fixed prototype of their class, and pushed by no other."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.labels import count_classes, named_rows, require_fixed
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of
from lightning_collapse.utilities.differentiable_once import once

Lengths = Literal["equal", "batch"]
LENGTHS = get_args(Lengths)


@full_precision
def dot_regression(features: Tensor, labels: Tensor, prototypes: Tensor, lengths: Lengths = "equal") -> Tensor:
    r"""Squared error of the dot product with the prototype of the class.

    .. math:: \tfrac{1}{2 N} \sum_i \tfrac{1}{\|h_i\|} \big(h_i^\top m_{y_i} - \|h_i\| \|m_{y_i}\|\big)^2

    where the lengths :math:`\|h_i\|` carry no gradient. Of rows of length 1 the gradient is
    :math:`-(1 - \cos \angle(h_i, m_{y_i}))\, m_{y_i}`, towards the prototype, where cross-entropy adds a push from the
    prototypes of other classes that drowns rare classes. Can be differentiated once.

    Collective: every process must call it; one all-reduce of 3 numbers, with ``lengths="batch"`` another of ``C``.

    Args:
        features: Shape ``(N, D)``, with at least one row over all processes; of length 1 as published.
        labels: Class of each row, integers of shape ``(N,)``; rows whose label names no class, such as -100, are left
            out.
        prototypes: One row per class, shape ``(C, D)``.
        lengths: ``"equal"`` takes the prototypes as they are, as in the paper's main form; ``"batch"`` multiplies that
            of class ``c`` by :math:`\sqrt{N / (C_+ n_c)}`, with :math:`n_c` of the ``N`` rows and :math:`C_+` classes
            in the global batch, the default of the authors' code. The same on balanced batches.

    Returns:
        Scalar, at least ``float32``, the value on the global batch: 0 if every row points along its prototype.

    Raises:
        ValueError: If ``features`` is not a matrix as wide as the prototypes, the labels are not integers, one per
            row, or if there is no row over all processes.

    References:
        Yang et al., *Inducing Neural Collapse in Imbalanced Learning*, NeurIPS 2022. https://arxiv.org/abs/2203.09081

    Example:
        >>> prototypes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> dot_regression(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), prototypes)
        tensor(0.2500)
    """
    require_one_of(LENGTHS, lengths=lengths)
    (features,) = separate_views("dot_regression", features=features)
    classes, dim = prototypes.shape
    if features.shape[1] != dim:
        raise ValueError(
            f"`features` of `dot_regression` must be as wide as the prototypes, {dim}, got {features.shape[1]}."
            " Make the classifier for the width of the layer."
        )
    labels, named = named_rows("dot_regression", features, labels, classes)
    targets = prototypes.to(features.dtype)[labels]
    if lengths == "batch":
        counts = count_classes(labels, named, classes, like=features)
        share = counts.sum() / (counts > 0).sum().clamp_min(1) / counts.clamp_min(1)
        targets = targets * share.sqrt()[labels].unsqueeze(1)
    length = torch.linalg.vector_norm(features.detach(), dim=1)
    error = (features * targets).sum(dim=1) - length * torch.linalg.vector_norm(targets.detach(), dim=1)
    values = error.square() / (2 * torch.where(length > 0, length, 1.0))
    return once(mean_of_rows("dot_regression", values.unsqueeze(1), named).squeeze(0))


class DotRegression(AntiCollapseLoss):
    """Module form of ``dot_regression``, in place of the cross-entropy, with one term, ``dot_regression``.

    Give it what the classifier compares: ``anti_collapse_loss(classifier.embed(features), labels)`` with an
    :class:`~lightning_collapse.layers.ETFClassifier`.

    Args:
        classifier: A module whose ``weight`` of shape ``(C, D)`` is fixed and holds the prototypes.
        lengths: Whether prototypes of classes that are rare in the batch are longer, see ``dot_regression``.

    Raises:
        ValueError: If the classifier has no such weight, or ``lengths`` is unknown.

    References:
        Yang et al., *Inducing Neural Collapse in Imbalanced Learning: Do We Really Need a Learnable Classifier at the
        End of Deep Neural Network?*, NeurIPS 2022. https://arxiv.org/abs/2203.09081, code at
        https://github.com/NeuralCollapseApplications/ImbalancedLearning.

    Example:
        >>> from lightning_collapse.layers import ETFClassifier
        >>> classifier = ETFClassifier(dim=4, num_classes=3)
        >>> loss = DotRegression(classifier)
        >>> features = classifier.weight[[0, 1]]  # on their prototypes
        >>> round(loss(features, torch.tensor([0, 1])).item(), 3), round(loss(features, torch.tensor([1, 0])).item(), 3)
        (0.0, 1.125)
    """

    source = "Yang et al., NeurIPS 2022, arXiv 2203.09081"
    takes_labels = "classes"

    def __init__(self, classifier: nn.Module, lengths: Lengths = "equal") -> None:
        super().__init__()
        require_fixed(classifier, "ETFClassifier")
        require_one_of(LENGTHS, lengths=lengths)
        self.classifier = classifier
        self.lengths: Lengths = lengths
        self.coefficients = {"dot_regression": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"dot_regression": dot_regression(features, labels, classifier.weight)}``; ``(N, D)`` and ``(N,)``."""
        features, labels = views
        return {"dot_regression": dot_regression(features, labels, self.classifier.weight, self.lengths)}  # type: ignore[arg-type]

    @property
    def value_at_collapse(self) -> float:
        """``C / (2 (C - 1))``: unit rows on one point in the span of a simplex, with as many rows of every class."""
        classes = len(self.classifier.weight)  # type: ignore[arg-type]
        return classes / (2 * (classes - 1))

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"lengths={self.lengths!r}"
