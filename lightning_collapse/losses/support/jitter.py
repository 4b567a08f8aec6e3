"""Jittered covariance: rows with a fixed pattern that tells equal ones apart, of a batch or of a stream of them."""

import math

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.state import finite_or
from lightning_collapse.losses.support.statistics import CenteredBatch, center, covariances, require_matrices
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.arguments import require_positive
from lightning_collapse.utilities.distributed import all_reduce_sum, world_size

GOLDEN = (math.sqrt(5) - 1) / 2


def pattern(first: int | Tensor, rows: int, dim: int, device: torch.device) -> Tensor:
    r"""Rows ``first`` to ``first + rows`` of an endless matrix of full rank and variance 1, the same on every process.

    .. math:: G_{ij} = \sqrt 2 \cos\big(\pi\, i\, \{j \varphi\} + j\big), \quad i \ge 0, \; j \ge 1

    with the golden ratio :math:`\varphi` and :math:`\{\cdot\}` the fractional part: the frequencies of the columns are
    spread evenly, so no two columns are alike. It draws no random number.

    Args:
        first: Index of the first row.
        rows: How many rows.
        dim: How many columns.
        device: Where to compute it.

    Returns:
        Shape ``(rows, dim)``.
    """
    dtype = accumulation_dtype(device)
    index = (first + torch.arange(rows, device=device)).to(dtype).unsqueeze(1)
    column = torch.arange(1, dim + 1, device=device).to(dtype)
    return math.sqrt(2) * torch.cos(math.pi * index * (column * GOLDEN).frac() + column)


def center_with_jitter(function: str, features: Tensor, jitter: float) -> CenteredBatch:
    """Rows about the mean of the global batch, plus ``jitter`` times the centered :func:`pattern`.

    A smooth function of the covariance has no gradient where all rows are equal, and none that leads off a line where
    they lie on one: both are saddles. The pattern makes them slopes, a different one for each row.

    Collective: every process must call it; two all-reduces of at most ``2 D + 2`` numbers, one without ``jitter``.

    Args:
        function: What to call the caller in messages.
        features: Shape ``(N, D)``; ``N`` may differ between processes.
        jitter: Standard deviation of what is added, in units of the features.

    Returns:
        ``rows`` of shape ``(N, D)`` and the number of samples.

    Raises:
        ValueError: If ``features`` is not a matrix.
        TooFewRowsError: If there are fewer than two rows over all processes.
    """
    views = list(require_matrices(function, features=features))
    if jitter:
        # after centering: what is added must not be rounded away beside a large mean
        noise = pattern(_first(features), len(features), features.shape[1], features.device).to(features)
        views.append(noise)
    batch = center(function, views)
    rows = batch.rows[0] + jitter * batch.rows[1] if jitter else batch.rows[0]
    return batch._replace(rows=rows)


class JitteredCovarianceLoss(AntiCollapseLoss):
    """What losses on the covariance of one view share: jitter, and a covariance of this batch or of a stream of them.

    With ``momentum`` the covariance is ``(1 - momentum)`` of this batch's and ``momentum`` of the earlier one, without
    its gradient: for batches with fewer rows than features. It lives in a buffer that is not part of the
    ``state_dict``; callback and mixin bring it back on a resume.

    Args:
        target_std: The standard deviation that is asked for, in units of the features.
        jitter: Standard deviation of what is added to tell equal rows apart, in units of the features; 0 for none.
        momentum: Share of the earlier covariance, at least 0 and below 1.

    Raises:
        ValueError: If an argument is out of range.
    """

    covariance: Tensor | None

    def __init__(self, target_std: float, jitter: float, momentum: float) -> None:
        super().__init__()
        require_positive(target_std=target_std)
        if not jitter >= 0:
            raise ValueError(f"`jitter` must not be negative, got {jitter}. With 0 equal rows have no gradient.")
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be at least 0 and below 1, got {momentum}. 0 takes this batch alone.")
        self.target_std = target_std
        self.jitter = jitter
        self.momentum = momentum
        self.register_buffer("covariance", None, persistent=False)

    def blend(self, batch: CenteredBatch) -> Tensor:
        """The matrix of :func:`smaller_side`, or, with ``momentum``, the covariance ``(D, D)`` of the stream.

        Evaluated in training mode with gradient, it moves the stream on, unless the batch is not finite.

        Raises:
            ValueError: If the stream has another width: one loss belongs to one layer.
        """
        if not self.momentum:
            return smaller_side(batch)
        matrix = covariances(batch)
        earlier = self.covariance
        if earlier is not None and earlier.shape != matrix.shape:
            raise ValueError(
                f"`features` must keep its width with `momentum`, got {len(matrix)} after {len(earlier)}."
                " Use a loss of its own for every layer."
            )
        if earlier is not None:
            # a first batch with what is not finite is forgotten
            earlier = finite_or(earlier.to(matrix), matrix.detach())
            matrix = self.momentum * earlier + (1 - self.momentum) * matrix
        if self.training and torch.is_grad_enabled():
            moved = matrix.detach()
            self.covariance = moved if earlier is None else finite_or(moved, earlier)
        return matrix

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        coefficients = ", ".join(f"{name}={value}" for name, value in self.coefficients.items())
        return f"{coefficients}, target_std={self.target_std}, jitter={self.jitter}, momentum={self.momentum}"


def smaller_side(batch: CenteredBatch) -> Tensor:
    """A matrix with the eigenvalues of the covariance, up to zeros: in one process the smaller of two Gram matrices.

    Collective: every process must call it; one all-reduce of ``D * D`` numbers.
    """
    rows = batch.rows
    if world_size() == 1 and rows.shape[0] < rows.shape[1]:
        return product(rows, rows.mT) / (batch.samples - 1)
    return covariances(batch)


def _first(features: Tensor) -> int | Tensor:
    """Index of this process's first row in the global batch, without a wait for the device."""
    ranks = world_size()
    if ranks == 1:
        return 0
    rank = torch.distributed.get_rank()
    counts = all_reduce_sum((torch.arange(ranks, device=features.device) == rank).float() * len(features))
    return counts[:rank].sum()
