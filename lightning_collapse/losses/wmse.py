"""W-MSE (whitening mean squared error): two views agree after each is whitened over small batches."""

import torch
from torch import Tensor

from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.shuffle import ShufflingLoss, permutation
from lightning_collapse.losses.support.statistics import (
    CenteredBatch,
    center,
    covariances,
    separate_views,
    without_mean,
)
from lightning_collapse.losses.support.whitening import (
    SCOPES,
    Scope,
    cosine_distances,
    inverse_cholesky,
    mean_over_processes,
    shrunk,
)
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_whole
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad
from lightning_collapse.utilities.registry import register_loss


@full_precision
def wmse_loss(
    first: Tensor,
    second: Tensor,
    sub_batch: int = 128,
    iterations: int = 1,
    eps: float = 0.0,
    normalize: bool = True,
    scope: Scope = "rank",
    step: int | Tensor = 0,
) -> Tensor:
    """The loss of :class:`WMSE`.

    Collective: every process must call it; one all-reduce of 3 numbers, or with ``scope="global"`` three, of about
    ``2 D * D`` numbers.

    Args:
        first: Representations of one view, shape ``(N, D)``.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        sub_batch: Fewest rows that are whitened together.
        iterations: How many divisions into sub-batches are averaged.
        eps: Share of the identity in the covariance.
        normalize: Whether whitened rows are normalized before they are compared.
        scope: Whether each process whitens its own rows, or all together.
        step: Decides which rows come together.

    Returns:
        Scalar, at least ``float32``.

    Raises:
        ValueError: If the views are not matrices of one shape, if ``sub_batch`` is not above ``D``, or if there are
            too few rows.

    Example:
        >>> first, second = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
        >>> round(wmse_loss(first, second, sub_batch=32).item(), 2)
        2.07
    """
    require_one_of(SCOPES, scope=scope)
    pair = separate_views("wmse_loss", first=first, second=second)
    if scope == "global":
        batch = center("wmse_loss", pair, rows=first.shape[1] + 1, grad_of_mean=True)
        return all_reduce_sum_with_grad(_distance(batch, eps, normalize)) / batch.samples
    rows, dim = first.shape
    if sub_batch <= dim:
        raise ValueError(
            f"`sub_batch` must be above the number of features, got {sub_batch} for {dim} features: fewer rows than"
            " that have no inverse covariance. Raise it, or project to fewer features."
        )
    views = torch.stack(pair)
    total = views.new_zeros(())
    if rows > dim:
        total = torch.stack(list(_over_sub_batches(views, sub_batch, iterations, eps, normalize, step))).sum()
    return mean_over_processes("wmse_loss", views, total / iterations, dim + 1)


def _over_sub_batches(
    views: Tensor, sub_batch: int, iterations: int, eps: float, normalize: bool, step: int | Tensor
) -> list[Tensor]:
    rows = views.shape[1]
    parts = max(1, rows // sub_batch)
    if parts == 1:
        return [iterations * _distance(_centered(views), eps, normalize)]
    step = torch.as_tensor(step)
    orders = [permutation(rows, step, stream, views.device) for stream in range(iterations)]
    chunks = [chunk for order in orders for chunk in views[:, order].tensor_split(parts, dim=1)]
    return [_distance(_centered(chunk), eps, normalize) for chunk in chunks]


def _centered(views: Tensor) -> CenteredBatch:
    return CenteredBatch(without_mean(views, dim=1), views.shape[1], views.new_zeros(()))


def _covariance(batch: CenteredBatch) -> Tensor:
    return product(batch.rows.mT, batch.rows) / (batch.samples - 1)


def _distance(batch: CenteredBatch, eps: float, normalize: bool) -> Tensor:
    """Sum over rows of the distances between both whitened views."""
    covariance = covariances(batch) if isinstance(batch.samples, Tensor) else _covariance(batch)
    white = product(batch.rows, inverse_cholesky(shrunk(covariance, eps)).mT)
    distances = cosine_distances(white[0], white[1]) if normalize else (white[0] - white[1]).square().mean(dim=-1)
    return distances.sum()


@register_loss
class WMSE(ShufflingLoss):
    r"""Whitening mean squared error of two views.

    .. math:: \frac{1}{N} \sum_i \Big\|\frac{v_i}{\|v_i\|} - \frac{v'_i}{\|v'_i\|}\Big\|^2, \qquad
        v_i = L^{-1} (z_i - \bar z), \quad L L^\top = (1 - \epsilon)\, C + \epsilon I

    Rows are divided at random into sub-batches, alike for both views, and each is whitened by the Cholesky factor of
    its unbiased covariance :math:`C`. What is whitened cannot collapse, so nothing else is needed; the scale of the
    features is free.

    As published, each process divides its own rows (``scope="rank"``), and the loss is the mean over all rows; a
    process with too few of them counts none. ``scope="global"`` whitens the rows of all processes together, without
    sub-batches, and then value and gradient are those of a single process.

    Two departures from the released code, where it fails: rows that do not fill a sub-batch enlarge the others, and
    to a covariance that is singular to working precision a little of the identity is added.

    Args:
        sub_batch: Fewest rows that are whitened together; twice the number of features is recommended. Published
            default; 256 for 128 features.
        iterations: How many random divisions are averaged; published default.
        eps: Share of the identity in the covariance; published default.
        normalize: Whether whitened rows are normalized; without, the mean squared difference. Published default.
        scope: Whether each process whitens its own rows, or all together.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Ermolov, Siarohin, Sangineto & Sebe, *Whitening for Self-Supervised Representation Learning*, ICML 2021.
        https://arxiv.org/abs/2007.06346, code at https://github.com/htdt/self-supervised.

    Example:
        >>> first = torch.randn(64, 8)
        >>> stretched = first @ torch.diag(torch.arange(1.0, 9.0))
        >>> WMSE()(first, stretched).abs() < 1e-4
        tensor(True)
    """

    source = (
        "Ermolov et al., ICML 2021, arXiv 2007.06346, released-code form: Cholesky, sub-batches of 128 per "
        'process; `scope="global"` whitens the global batch'
    )
    views = 2

    def __init__(
        self,
        sub_batch: int = 128,
        iterations: int = 1,
        eps: float = 0.0,
        normalize: bool = True,
        scope: Scope = "rank",
    ) -> None:
        super().__init__()
        require_whole(1, sub_batch=sub_batch, iterations=iterations)
        require_one_of(SCOPES, scope=scope)
        if not 0 <= eps < 1:
            raise ValueError(f"`eps` must be at least 0 and below 1, got {eps}.")
        self.sub_batch = sub_batch
        self.iterations = iterations
        self.eps = eps
        self.normalize = normalize
        self.scope: Scope = scope
        self.coefficients = {"invariance": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"invariance": wmse_loss(first, second)}`` for two views of shape ``(N, D)``."""
        first, second = views
        arguments = (self.sub_batch, self.iterations, self.eps, self.normalize, self.scope)
        return {"invariance": wmse_loss(first, second, *arguments, self.next_step())}

    @property
    def value_at_collapse(self) -> float:
        """2, as of views that have nothing in common; 0 without normalization, which is blind to it."""
        return 2.0 if self.normalize else 0.0

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return (
            f"sub_batch={self.sub_batch}, iterations={self.iterations}, eps={self.eps},"
            f" normalize={self.normalize}, scope={self.scope!r}"
        )
