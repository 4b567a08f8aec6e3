"""Sparse ETF classifier (SSE-C): fixed rows, most entries zero, as far apart as the zeros let them be."""

import torch
from torch import Tensor

from lightning_collapse.layers.etf_classifier import simplex_etf
from lightning_collapse.layers.fixed_classifier import FixedClassifier
from lightning_collapse.utilities.arguments import require_positive, require_whole

_LENGTH, _CLAMP = 0.1, 0.99999


class SparseETFClassifier(FixedClassifier):
    r"""Fixed rows of which most entries are zero: features that a class does not use are free for something else.

    A simplex loses a share of its entries, and Adam parts the rows again with the others, in ``float64``, by

    .. math:: \sum_c \big(\|w_c\| - 0.1\big)^2 - \tfrac1C \sum_c \arccos \max_{c' \ne c} \cos(w_c, w_{c'})

    This misses the length by a tenth or more, so rows are divided by theirs in the end, which the authors do not do. A
    row that would be all zeros draws them again. Logits are products with the features as they are.

    Building it takes 3 s with 10 classes of 64 features, 20 s with 100 of 512, on one core; a step costs a product of
    ``C x D`` with ``D x C``. With ``steps=1000, lr=1e-3`` it is a tenth of that, and the largest of 10 cosines -0.106
    in place of -0.110, where a whole simplex has -0.111.

    Args:
        dim: Width ``D`` of the features, at least ``num_classes - 1``.
        num_classes: Number of classes ``C``, at least 2.
        sparsity: Share of the entries that is zero; that of the authors' code by default, like ``steps`` and ``lr``.
        steps: Of Adam. Built on the ``meta`` device, they wait for ``reset_parameters``.
        lr: Learning rate.
        seed: Of rotation and zeros.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Xiao et al., *FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data*, ICLR 2024.
        https://arxiv.org/abs/2401.08977, code at https://github.com/ZackZikaiXiao/FedLoGe.

    Example:
        >>> classifier = SparseETFClassifier(dim=16, num_classes=4, steps=10)
        >>> int((classifier.weight == 0).sum()), classifier.weight.norm(dim=1).allclose(torch.tensor(0.1))
        (38, True)
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        sparsity: float = 0.6,
        steps: int = 10_000,
        lr: float = 1e-4,
        seed: int = 0,
    ) -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(f"`sparsity` must be from 0 to below 1, got {sparsity}.")
        require_whole(0, steps=steps)
        require_positive(lr=lr)
        self.sparsity, self.steps, self.lr = sparsity, steps, lr
        super().__init__(dim, num_classes, seed)

    @torch.no_grad()
    def prototypes(self) -> Tensor:
        """The rows, shape ``(C, D)``, ``float64``, on the CPU."""
        rows = simplex_etf(self.num_classes, self.dim, self.seed)
        steps = 0 if torch.get_default_device().type == "meta" else self.steps
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(rows.numel(), generator=generator)
            kept = (order >= round(self.sparsity * rows.numel())).view_as(rows)
            while not kept.any(dim=1).all():
                empty = ~kept.any(dim=1)
                kept[empty] = torch.rand(int(empty.sum()), self.dim, generator=generator) >= self.sparsity
        rows *= kept
        mean, square = torch.zeros_like(rows), torch.zeros_like(rows)
        for step in range(1, steps + 1):
            gradient = _gradient(rows) * kept
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.001)
            rows -= self.lr / (1 - 0.9**step) * mean / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        return rows.mul_(_LENGTH / torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def _gradient(rows: Tensor) -> Tensor:
    """Of the sum above; of an angle that is clamped, 0."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    units = rows / lengths
    cosines, places = (units @ units.T).fill_diagonal_(-2.0).max(dim=1, keepdim=True)
    nearest = places.squeeze(1)
    slopes = torch.where(cosines.abs() < _CLAMP, (1 - cosines.square()).clamp_min(1e-12).rsqrt(), 0.0) / len(rows)
    gradient: Tensor = 2 * (lengths - _LENGTH) * units + slopes * (units[nearest] - cosines * units) / lengths
    return gradient.index_add_(0, nearest, slopes * (units - cosines * units[nearest]) / lengths[nearest])
