"""FedETF head: a projection onto a fixed simplex, with a learned temperature."""

import torch
from torch import Tensor, nn

from lightning_collapse.layers.etf_classifier import ETFClassifier


class FedETFHead(nn.Module):
    r"""Logits of a fixed simplex, after a learned projection and times a learned scale.

    .. math:: z = s\, M p / \|p\|, \qquad p = A h + b

    Clients of federated learning, and rare classes, share one geometry that no one of them can bend. The head is
    trained with :class:`~lightning_collapse.losses.BalancedSoftmax`, as published, so that the sizes of the classes
    stay out of the features. The scale must be learned: at 1 the softmax of ten classes ends at 0.252.

    Args:
        dim: Width of the features.
        num_classes: Number of classes ``C``, at least 2.
        projection: Width of the projection, at least ``num_classes - 1``; ``num_classes`` by default, as published.
        scale: What ``s`` starts from; 1 for most, 10 for the smallest of the authors' networks.
        seed: Of the simplex, see ``simplex_etf``; the same for all clients.

    Raises:
        ValueError: If there are fewer than two classes, or more than ``projection + 1``.

    References:
        Li et al., *No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning with Synthetic and Fixed
        Classifier*, ICCV 2023. https://arxiv.org/abs/2303.10058, code at https://github.com/ZexiLee/ICCV-2023-FedETF.

    Example:
        >>> head = FedETFHead(dim=64, num_classes=10)
        >>> head(torch.randn(4, 64)).shape, [name for name, _ in head.named_parameters()]
        (torch.Size([4, 10]), ['scale', 'projection.weight', 'projection.bias'])
    """

    def __init__(
        self, dim: int, num_classes: int, projection: int | None = None, scale: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        width = num_classes if projection is None else projection
        self.classifier = ETFClassifier(width, num_classes, seed)
        self.projection = nn.Linear(dim, width)
        self.initial_scale = float(scale)
        self.scale = nn.Parameter(torch.tensor(self.initial_scale))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the scale to what it starts from; the layers inside have a method of their own."""
        self.scale.fill_(self.initial_scale)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(..., C)`` of features ``(..., dim)``."""
        logits: Tensor = self.scale * self.classifier(self.projection(features))
        return logits
