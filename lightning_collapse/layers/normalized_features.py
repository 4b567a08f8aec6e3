"""Feature normalization: rows on the unit sphere, and a cosine classifier whose scale can reach a probability."""

import math
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive, require_whole


@full_precision
def on_the_sphere(features: Tensor, floor: float = 0.0) -> Tensor:
    """Rows ``(..., D)`` over their length, or over ``floor`` if that is larger; zero stays zero, without gradient."""
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    empty = lengths == 0  # and not what is no number
    return torch.where(empty, 0.0, features / torch.where(empty, 1.0, lengths).clamp_min(floor))


def required_scale(num_classes: int, probability: float = 0.99) -> float:
    r"""The least scale of cosine logits at which features on their prototypes reach a probability.

    .. math:: s = \tfrac{C - 1}{C} \log \frac{(C - 1)\, p}{1 - p}

    Prototypes are a simplex, whose cosines are :math:`-1 / (C - 1)`: no other ones can do with less.

    Args:
        num_classes: Number of classes ``C``, at least 2.
        probability: ``p``, between 0 and 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(required_scale(10, 0.99), 2), round(required_scale(50_000, 0.9), 2)
        (6.11, 13.02)
    """
    require_whole(2, num_classes=num_classes)
    if not 0 < probability < 1:
        raise ValueError(f"`probability` must be between 0 and 1, got {probability}.")
    others = num_classes - 1
    return others / num_classes * math.log(others * probability / (1 - probability))


class NormalizedFeatures(nn.Module):
    """Rows divided by their length, in ``float32`` at least, to be put before a head.

    The gradient has no part along the row, so that lengths drift freely before it: watch them.

    Args:
        floor: What shorter rows are divided by.

    Example:
        >>> NormalizedFeatures()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """

    def __init__(self, floor: float = 1e-6) -> None:
        super().__init__()
        require_positive(floor=floor)
        self.floor = floor

    def forward(self, features: Tensor) -> Tensor:
        """Rows ``(..., D)`` of length 1, at least ``float32``."""
        return on_the_sphere(features, self.floor)


class CosineClassifier(nn.Linear):
    r"""Logits that are cosines of features and prototypes, times a scale that is learned as its logarithm.

    .. math:: s \cos \angle(w_c, h)

    Neither long features nor long weights of frequent classes count. With too small a scale the cross-entropy keeps a
    gradient that does not end: it starts at :func:`required_scale`, and a fixed one below that is warned of.

    Args:
        dim: Width ``D`` of the features.
        num_classes: Number of classes ``C``, at least 2.
        scale: What ``s`` starts from; ``required_scale(num_classes, probability)`` by default, and 1 at least.
        learn_scale: Whether it is trained; else it is a buffer.
        probability: What features on their prototypes are to reach.

    Attributes:
        weight: The prototypes, shape ``(C, D)``, of any length.
        log_scale: Logarithm of ``s``, shape ``(1,)``; give it no weight decay.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Wang et al., *NormFace*, ACM Multimedia 2017. https://arxiv.org/abs/1704.06369

    Example:
        >>> head = CosineClassifier(dim=4, num_classes=10)
        >>> round(head.log_scale.exp().item(), 2), head(torch.randn(2, 4)).shape
        (6.11, torch.Size([2, 10]))
    """

    log_scale: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        scale: float | None = None,
        learn_scale: bool = True,
        probability: float = 0.99,
    ) -> None:
        least = required_scale(num_classes, probability)
        self.initial_scale = max(least, 1.0) if scale is None else float(scale)
        require_positive(scale=self.initial_scale)
        if not learn_scale and self.initial_scale < least:
            warn(
                f"A fixed `scale` of {scale} cannot reach a probability of {probability} with {num_classes} classes:"
                f" that takes {least:.2f}. Learn it, or leave it out.",
                stacklevel=2,
            )
        super().__init__(dim, num_classes, bias=False)
        log_scale = torch.full((1,), math.log(self.initial_scale))  # of one dimension: FSDP2 refuses less
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the prototypes, and set the scale to what it starts from."""
        super().reset_parameters()
        tensors: dict[str, Any] = {**self._parameters, **self._buffers}
        if "log_scale" in tensors:
            tensors["log_scale"].fill_(math.log(self.initial_scale))

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(..., C)`` of features ``(..., D)``, in the dtype of the layer."""
        rows, prototypes = on_the_sphere(features, 1e-6), on_the_sphere(self.weight, 1e-6)
        cosines = functional.linear(rows.to(self.weight.dtype), prototypes.to(self.weight.dtype))
        logits: Tensor = self.log_scale.exp() * cosines
        return logits
