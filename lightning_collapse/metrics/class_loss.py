"""Long-tailed loss, streaming: the mean loss of every class, and over bins of class frequency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.tail_learning.frequency import SHOTS, loss_by_frequency
from lightning_collapse.metrics.sums import SumsMetric
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_whole


class ClassLoss(SumsMetric):
    """Mean loss by class and by class frequency, of any loss and whatever split.

    As input to ``update``: losses of ``reduction="none"``, and as many labels; labels that name no class and losses
    that are NaN are left out.

    As output of ``compute``, 0-dimensional: ``loss`` over everything, ``macro``, the mean of the classes' means, and of
    the bins ``few``, ``medium`` and ``many`` (below 20, 20 to 100, above 100 training samples), or of other edges
    ``below_10``, ``from_10``, ``from_100`` and so on. NaN for what was not seen.

    Args:
        num_classes: Number of classes, or size of the vocabulary.
        frequencies: How often each class occurs in training, shape ``(num_classes,)``; by default how often it was seen
            here.
        edges: Of the bins, see :func:`~lightning_collapse.functional.tail_learning.loss_by_frequency`.
        per_class: As there: ``False`` weighs tokens alike.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Attributes:
        sums: Losses and their number by class, shape ``(2, num_classes)``.

    Raises:
        ValueError: If a shape does not fit, or labels are not integers.

    Example:
        >>> metric = ClassLoss(2, frequencies=torch.tensor([500, 8]))
        >>> metric.update(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0, 0, 1]))
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'loss': 1.67, 'macro': 2.0, 'few': 3.0, 'medium': nan, 'many': 1.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    sums: Tensor
    frequencies: Tensor | None

    def __init__(
        self,
        num_classes: int,
        frequencies: Tensor | None = None,
        edges: Sequence[float] = SHOTS,
        per_class: bool = True,
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_whole(1, num_classes=num_classes)
        self.edges, self.per_class = tuple(edges), per_class
        self.register_buffer("frequencies", frequencies, persistent=False)
        zeros = torch.zeros(2, num_classes, dtype=dtype)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        loss_by_frequency(
            zeros[0], zeros[1], zeros[0] if frequencies is None else frequencies, edges
        )  # refuses bad arguments

    @full_precision
    def update(self, losses: Tensor, labels: Tensor) -> None:
        """Add losses and labels of one shape."""
        if losses.shape != labels.shape or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"`labels` must be integers of the shape of `losses`, {tuple(losses.shape)}, got {labels.dtype} of"
                f" {tuple(labels.shape)}. Compute the loss with `reduction='none'`."
            )
        losses, labels = losses.flatten().to(self.sums.dtype), labels.flatten().long()
        counted = (labels >= 0) & (labels < self.sums.shape[1]) & ~losses.isnan()
        rows = torch.stack([torch.where(counted, losses, 0.0), counted.to(losses)])
        self.sums = self.sums.index_add(1, torch.where(counted, labels, 0), rows)

    def compute(self) -> dict[str, Tensor]:
        """Means over everything seen so far."""
        total, counts = self.sums
        frequencies = counts if self.frequencies is None else self.frequencies
        bins, _ = loss_by_frequency(total, counts, frequencies, self.edges, self.per_class)
        macro, _ = loss_by_frequency(total, counts, counts, edges=())
        names = ["few", "medium", "many"]
        if self.edges != SHOTS:
            names = [f"below_{self.edges[0]:g}", *(f"from_{edge:g}" for edge in self.edges)]
        return {"loss": total.sum() / counts.sum(), "macro": macro[0], **dict(zip(names, bins, strict=True))}
