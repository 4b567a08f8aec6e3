"""HAFrame: a fixed classifier whose cosines follow a hierarchy of the classes, so that mistakes are near ones."""

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.layers.fixed_classifier import FixedClassifier
from lightning_collapse.utilities.arguments import require_positive

_GRID, _TINY = 100, 1e-6


class HAFrameClassifier(FixedClassifier):
    r"""Fixed unit rows whose cosines fall with the distance of their classes; logits are products with the features.

    .. math:: W W^\top = S, \qquad s_{ij} = (1 - s_{\min})\, e^{-\gamma D_{ij} / D_{\max}} + s_{\min}

    with the least :math:`s_{\min}`, of 100 points from -1 to :math:`-1 / (C - 1)`, for which ``S`` has no negative
    eigenvalue. Train it with :class:`~lightning_collapse.losses.HAFrameLoss`, which also pulls the cosines of features
    to those of the rows. The authors reduce features to ``C`` before it, with a batch norm.

    Args:
        distances: D, of every two classes, shape ``(C, C)``: in a tree the height of their lowest common ancestor.
        dim: Width of the features, at least the rank of ``S``; the number of classes by default, as published.
        gamma: γ, how fast cosines fall; 2 for CIFAR-100, and 1 to 5 in the authors' scripts.
        seed: Of the rotation.

    Raises:
        ValueError: If the distances are no such matrix, no point of the grid will do, or ``dim`` is too small.

    References:
        Liang & Davis, *Inducing Neural Collapse to a Fixed Hierarchy-Aware Frame for Reducing Mistake Severity*, ICCV
        2023. https://arxiv.org/abs/2303.05689

    Example:
        >>> classifier = HAFrameClassifier([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [2.0, 2.0, 0.0]])
        >>> (classifier.weight @ classifier.weight.T).round(decimals=3)[0]
        tensor([ 1.0000, -0.1940, -0.6330])
    """

    def __init__(
        self, distances: Tensor | Sequence[Sequence[float]], dim: int | None = None, gamma: float = 2.0, seed: int = 0
    ) -> None:
        require_positive(gamma=gamma)
        with torch.device("cpu"):
            self.distances = torch.as_tensor(distances, dtype=torch.float64).detach().cpu()
        _check(self.distances)
        self.gamma = gamma
        super().__init__(len(self.distances) if dim is None else dim, len(self.distances), seed)

    @torch.no_grad()
    def prototypes(self) -> Tensor:
        """The rows, shape ``(C, D)``, ``float64``, on the CPU."""
        with torch.device("cpu"):
            values, vectors = torch.linalg.eigh(self._similarities())
            kept = values > _TINY
            rank = int(kept.sum())
            if self.dim < rank:
                raise ValueError(
                    f"`dim` must be at least {rank} for these {len(kept)} classes, got {self.dim}. Put a wider linear"
                    " layer before the classifier."
                )
            generator = torch.Generator().manual_seed(self.seed)
            rotation = torch.linalg.qr(torch.randn(self.dim, rank, generator=generator, dtype=torch.float64)).Q
        rows: Tensor = vectors[:, kept] * values[kept].sqrt() @ rotation.T
        return rows

    def _similarities(self) -> Tensor:
        kernel = torch.exp(-self.gamma * self.distances / self.distances.max())
        grid = torch.linspace(-1, -1 / (len(kernel) - 1), _GRID, dtype=torch.float64).tolist()

        def feasible(least: float) -> bool:
            return bool(torch.linalg.eigvalsh((1 - least) * kernel + least)[0] > -_TINY)

        if feasible(grid[-1]):  # S is affine in the least, so that those that will do are an interval
            first = bisect_left(grid, True, key=feasible)
        else:
            first = next((i for i, least in enumerate(grid) if feasible(least)), _GRID)
        if first == _GRID:
            raise ValueError(
                f"`distances` with `gamma={self.gamma}` give no cosines that vectors can have: `S` has a negative"
                " eigenvalue for every least one. Pass the distances of a tree, or a larger `gamma`."
            )
        similarities: Tensor = (1 - grid[first]) * kernel + grid[first]
        return similarities


def _check(d: Tensor) -> None:
    square = d.ndim == 2 and d.shape[0] == d.shape[1] >= 2
    if not square or not (d >= 0).all() or d.diagonal().any() or not d.equal(d.T) or not 0 < d.max() < torch.inf:
        raise ValueError(
            "`distances` must be a symmetric matrix of two classes or more, finite, with zeros on its diagonal and"
            f" nothing below 0, got shape {tuple(d.shape)}."
        )
