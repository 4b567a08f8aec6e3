"""Fixed classifier: a last layer whose rows are made once, from a seed, and never learned."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class FixedClassifier(nn.Module):
    """A linear layer without bias whose ``weight`` is a buffer, equal on all processes, made on the CPU.

    A subclass writes :meth:`prototypes`. It has no parameter; its weight moves and is saved with the model.

    Args:
        dim: Width ``D`` of the features.
        num_classes: Number of classes ``C``.
        seed: Of all that is drawn; no other random state is touched.

    Attributes:
        weight: The prototypes, shape ``(C, D)``.

    Example:
        >>> class Axes(FixedClassifier):
        ...     def prototypes(self):
        ...         return torch.eye(self.num_classes, self.dim, dtype=torch.float64)
        >>> Axes(dim=3, num_classes=2)(torch.tensor([[5.0, 6.0, 7.0]]))
        tensor([[5., 6.]])
    """

    constants = ("weight",)  # of a loss that holds the classifier
    weight: Tensor

    def __init__(self, dim: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.dim, self.num_classes, self.seed = dim, num_classes, seed
        weight = self.prototypes()
        self.register_buffer("weight", weight.to(torch.get_default_device(), torch.get_default_dtype()))

    def prototypes(self) -> Tensor:
        """The rows, shape ``(C, D)``, ``float64``, on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill in the prototypes, where the layer was built on the ``meta`` device."""
        self.weight.copy_(self.prototypes())

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(..., C)`` of features ``(..., D)``, in the dtype of the layer."""
        return functional.linear(features.to(self.weight.dtype), self.weight)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(model)``."""
        return f"dim={self.dim}, num_classes={self.num_classes}"
