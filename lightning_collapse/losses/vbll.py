"""Variational Bayesian last layers (VBLL), the loss: a bound of the evidence, data and divergence weighed right."""

import math

from torch import Tensor, nn

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.labels import named_rows
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.utilities.arguments import require_whole


class VBLL(AntiCollapseLoss):
    r"""What a variational head is trained with, in place of the cross-entropy or the squared error.

    .. math:: -\tfrac1N \sum_i \mathbb E \log p(y_i \mid \phi_i) + \tfrac{1}{N_{\text{train}}}
        \big(\operatorname{KL} - \log p(\Sigma)\big)

    with terms ``likelihood``, a mean over the rows of all processes, and ``divergence``, which is no mean over data:
    every process adds all of it, once. It trains the head's parameters, which belong to the optimizer of the model.

    Args:
        head: A ``VBLLClassifier``, or a ``VBLLRegression``.
        train_rows: Number of rows of the training set; with another one the posterior is too wide or too narrow.

    Raises:
        ValueError: If ``head`` is no such head, or ``train_rows`` is not a positive integer. When called, if the
            features are not a matrix of the head's width, targets are not classes, or outputs, one row per row, or if
            there is no row over all processes.

    References:
        Harrison, Willes & Snoek, *Variational Bayesian Last Layers*, ICLR 2024. https://arxiv.org/abs/2404.11599

    Example:
        >>> import torch
        >>> from lightning_collapse.layers import VBLLClassifier
        >>> head = VBLLClassifier(dim=8, num_classes=3)
        >>> loss = VBLL(head, train_rows=1000)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
        >>> head.log_diagonal.grad.shape
        torch.Size([3, 8])
    """

    source = "Harrison et al., ICLR 2024, arXiv 2404.11599; of features, with a variational head"
    takes_labels = "classes"

    def __init__(self, head: nn.Module, train_rows: int) -> None:
        super().__init__()
        if not all(hasattr(head, name) for name in ("log_likelihood", "divergence", "takes_classes")):
            raise ValueError(f"`head` must be a `VBLLClassifier` or a `VBLLRegression`, got {type(head).__name__}.")
        require_whole(1, train_rows=train_rows)
        self.head = head
        self.coefficients = {"likelihood": 1.0, "divergence": 1 / train_rows}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """Both terms, of features ``(N, D)`` and classes ``(N,)`` or outputs ``(N, K)``.

        Collective: every process must call it; one all-reduce of 3 numbers.
        """
        features, targets = views
        (features,) = separate_views("VBLL", features=features)
        head, named = self.head, None
        dim, outputs = int(head.dim), int(head.outputs)  # type: ignore[arg-type]
        if features.shape[1] != dim:
            raise ValueError(f"`features` of `VBLL` must be as wide as the head, {dim}, got {features.shape[1]}.")
        if head.takes_classes:
            targets, named = named_rows("VBLL", features, targets, outputs)
        elif targets.shape != (len(features), outputs) or not targets.is_floating_point():
            raise ValueError(
                f"`targets` of `VBLL` must be floating point of shape ({len(features)}, {outputs}), got"
                f" {targets.dtype} of shape {tuple(targets.shape)}. Add a dimension with `unsqueeze(1)` for one output."
            )
        likelihood: Tensor = head.log_likelihood(features, targets)  # type: ignore[operator]
        mean = mean_of_rows("VBLL", -likelihood.unsqueeze(1), named).squeeze(0)
        return {"likelihood": mean, "divergence": head.divergence().to(mean.dtype)}  # type: ignore[operator]

    @property
    def value_at_perfection(self) -> float:
        """Not a number: it depends on the noise of the data."""
        return math.nan

    @property
    def value_at_collapse(self) -> float:
        """Not a number, for the same reason."""
        return math.nan

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"train_rows={round(1 / self.coefficients['divergence'])}"
