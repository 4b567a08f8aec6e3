"""Fixed simplex-ETF classifier: its rows are the simplex that neural collapse would end in, and are not learned."""

import torch
from torch import Tensor

from lightning_collapse.layers.fixed_classifier import FixedClassifier
from lightning_collapse.layers.normalized_features import on_the_sphere


def simplex_etf(num_classes: int, dim: int, seed: int = 0) -> Tensor:
    r"""Rows of a simplex equiangular tight frame, turned at random.

    .. math:: M = \sqrt{\tfrac{C}{C - 1}}\; U P^\top, \qquad
        M M^\top = \tfrac{C}{C - 1} \big(I - \tfrac{1}{C} \mathbf 1 \mathbf 1^\top\big)

    where the columns of ``U``, ``(C, C - 1)``, are orthonormal and sum to zero, and those of ``P``, ``(D, C - 1)``,
    orthonormal. The published :math:`P (I - \mathbf 1 \mathbf 1^\top / C)` has the same Gram matrix and needs one
    dimension more.

    Args:
        num_classes: Number of classes ``C``, at least 2.
        dim: Number of features ``D``, at least ``C - 1``.
        seed: Of the rotation; equal seeds give equal rows on every process. No other random state is touched.

    Returns:
        Shape ``(C, D)``, ``float64``, on the CPU: rows of length 1 whose cosines are all ``-1 / (C - 1)``.

    Raises:
        ValueError: If there are fewer than two classes, or more than ``D + 1``.

    Example:
        >>> rows = simplex_etf(num_classes=3, dim=2)
        >>> (rows @ rows.T).round(decimals=6).tolist()[0]
        [1.0, -0.5, -0.5]
    """
    if num_classes < 2 or dim < num_classes - 1:
        raise ValueError(
            f"`num_classes` must be from 2 to `dim` + 1, got {num_classes} classes in {dim} dimensions. Put a wider"
            " linear layer before the classifier."
        )
    classes = num_classes - 1
    with torch.device("cpu"):  # the generator's, whatever the default
        first = torch.cat([torch.ones(num_classes, 1), torch.eye(num_classes, classes)], dim=1).double()
        centered = torch.linalg.qr(first).Q[:, 1:]  # orthogonal to the column of ones
        generator = torch.Generator().manual_seed(seed)
        rotation = torch.linalg.qr(torch.randn(dim, classes, generator=generator, dtype=torch.float64)).Q
    rows: Tensor = (num_classes / classes) ** 0.5 * centered @ rotation.T
    return rows


class ETFClassifier(FixedClassifier):
    r"""Logits of a fixed simplex: the cosine of a feature with the prototype of each class.

    .. math:: z = M h / \|h\|

    Drop-in for ``nn.Linear(dim, num_classes)`` as the last layer. Rare classes keep as much angle as frequent ones,
    since nothing moves. It has no parameter; its ``weight`` is a buffer, which moves and is saved with the model.

    The authors put ``nn.BatchNorm1d(dim)`` before it and train with :class:`~lightning_collapse.losses.DotRegression`.
    With cross-entropy logits this small keep a gradient that does not end: scale them, see
    :class:`~lightning_collapse.layers.FedETFHead`.

    Args:
        dim: Width ``D`` of the features, at least ``num_classes - 1``.
        num_classes: Number of classes ``C``, at least 2.
        seed: Of the rotation, see ``simplex_etf``.

    Attributes:
        weight: The prototypes, shape ``(C, D)``, of length 1.

    Raises:
        ValueError: If there are fewer than two classes, or more than ``dim + 1``.

    References:
        Yang et al., *Inducing Neural Collapse in Imbalanced Learning: Do We Really Need a Learnable Classifier at the
        End of Deep Neural Network?*, NeurIPS 2022. https://arxiv.org/abs/2203.09081, code at
        https://github.com/NeuralCollapseApplications/ImbalancedLearning.

    Example:
        >>> classifier = ETFClassifier(dim=8, num_classes=3)
        >>> classifier(5 * classifier.weight)[0].allclose(torch.tensor([1.0, -0.5, -0.5]))
        True
    """

    def __init__(self, dim: int, num_classes: int, seed: int = 0) -> None:
        super().__init__(dim, num_classes, seed)

    def prototypes(self) -> Tensor:
        """See ``simplex_etf``."""
        return simplex_etf(self.num_classes, self.dim, self.seed)

    def embed(self, features: Tensor) -> Tensor:
        """Features ``(..., D)`` on the unit sphere, at least ``float32``; zero stays zero, and has no gradient."""
        return on_the_sphere(features)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(..., C)`` of features ``(..., D)``, from -1 to 1, in the dtype of the layer."""
        return super().forward(self.embed(features))
