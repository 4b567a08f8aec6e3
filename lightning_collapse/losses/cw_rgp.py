"""CW-RGP: two views agree after the samples of each are whitened over random groups of features."""

import torch
from torch import Tensor

from lightning_collapse.losses.spectral_transformation import AXES, Axis
from lightning_collapse.losses.support import whitening
from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.rows import require_rows
from lightning_collapse.losses.support.shuffle import ShufflingLoss, permutation
from lightning_collapse.losses.support.statistics import stack_views, without_mean
from lightning_collapse.losses.support.symmetric_power import symmetric_power
from lightning_collapse.losses.support.whitening import SCOPES, Scope, cosine_distances, mean_over_processes, shrunk
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_whole
from lightning_collapse.utilities.distributed import all_gather_rows_with_grad
from lightning_collapse.utilities.registry import register_loss

# whitened samples have a length of at least 1, equal ones included; one that has no direction is not given any
SHORTEST: dict[Axis, float] = {"samples": 0.1, "features": whitening.SHORTEST}


@full_precision
def cw_rgp_loss(
    first: Tensor,
    second: Tensor,
    sub_batch: int = 64,
    groups: int = 4,
    iterations: int = 1,
    eps: float = 0.0,
    axis: Axis = "samples",
    scope: Scope = "rank",
    step: int | Tensor = 0,
) -> Tensor:
    """The loss of :class:`CWRGP`.

    Collective: every process must call it; one all-reduce of 3 numbers, or with ``scope="global"`` two, of ``2 N * D``
    numbers for all ``N`` rows, and a wait for their number. On CUDA the decomposition of each covariance waits for the
    device besides, see :class:`CWRGP`.

    Args:
        first: Representations of one view, shape ``(N, D)``.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.
        sub_batch: Most rows that are whitened together; with ``axis="features"`` the fewest.
        groups: Into how many groups features are divided.
        iterations: How many random divisions are averaged.
        eps: Share of the identity in the covariance.
        axis: What is made white, samples or features.
        scope: Whether sub-batches are made of the rows of each process, or of those of all together.
        step: Decides which rows and which features come together.

    Returns:
        Scalar, at least ``float32``, between 0 and 4.

    Raises:
        ValueError: If the views are not matrices of one shape, if ``groups`` does not divide ``D``, if ``sub_batch``
            is not below ``D / groups``, or not above it with ``axis="features"``, or if there are too few rows.

    Example:
        >>> first, second = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0))
        >>> round(cw_rgp_loss(first, second, sub_batch=32, groups=1).item(), 2)
        1.99
    """
    require_one_of(AXES, axis=axis)
    require_one_of(SCOPES, scope=scope)
    views = stack_views("cw_rgp_loss", first=first, second=second)
    needed = _fewest_rows(views.shape[2], sub_batch, groups, axis)
    here = views.shape[1]
    if scope == "global":
        views, _ = all_gather_rows_with_grad(views)
        require_rows("cw_rgp_loss", needed, views.shape[1], here)
    total = views.new_zeros(())
    if views.shape[1] >= needed:
        total = _over_divisions(views, sub_batch, groups, iterations, eps, axis, step)
    return total / views.shape[1] if scope == "global" else mean_over_processes("cw_rgp_loss", views, total, needed)


def _fewest_rows(dim: int, sub_batch: int, groups: int, axis: Axis) -> int:
    """How many rows a process needs; from arguments alone, so that all processes raise alike."""
    if dim % groups:
        raise ValueError(f"`groups` must divide the number of features, got {groups} groups for {dim} features.")
    width = dim // groups
    if axis == "samples" and width <= sub_batch:
        raise ValueError(
            f"`sub_batch` must be below the number of features in a group, got {sub_batch} for {width} ({dim} features"
            f" in {groups} groups): more samples than features have no inverse covariance. Lower it or `groups`, or"
            f" project to at least {groups * (sub_batch + 1)} features."
        )
    if axis == "features" and width >= sub_batch:
        raise ValueError(
            f"`sub_batch` must be above the number of features in a group, got {sub_batch} for {width} ({dim} features"
            f" in {groups} groups): fewer rows than that have no inverse covariance. Raise it or `groups`."
        )
    return 1 if axis == "samples" else width + 1


def _over_divisions(
    views: Tensor, sub_batch: int, groups: int, iterations: int, eps: float, axis: Axis, step: int | Tensor
) -> Tensor:
    """Sum over rows of the distances between both whitened views, mean over the random divisions."""
    rows, dim = views.shape[1:]
    parts = -(-rows // sub_batch) if axis == "samples" else max(1, rows // sub_batch)
    if parts == groups == 1:
        iterations = 1  # nothing is drawn
    step, device = torch.as_tensor(step), views.device
    sums = []
    for division in range(iterations):
        drawn = views if parts == 1 else views[:, permutation(rows, step, division, device)]
        for part, chunk in enumerate(drawn.tensor_split(parts, dim=1)):
            # streams of their own: behind those of the rows, two for each sub-batch
            stream = iterations + 2 * (division * parts + part)
            white = _whitened(chunk, groups, eps, axis, [permutation(dim, step, stream + i, device) for i in range(2)])
            sums.append(cosine_distances(white[0], white[1], SHORTEST[axis]).sum())
    return torch.stack(sums).sum() / iterations


def _whitened(views: Tensor, groups: int, eps: float, axis: Axis, orders: list[Tensor]) -> Tensor:
    """Views of shape ``(2, N, D)`` whitened by ZCA in each group; feature ``k`` of a view is in the place it was."""
    observations = 2 if axis == "samples" else 1
    rows = without_mean(views, observations)
    if groups > 1:
        rows = _reordered(rows, orders)
    rows = rows.reshape(*rows.shape[:2], groups, -1).transpose(1, 2)
    if axis == "samples":
        root = symmetric_power(shrunk(product(rows, rows.mT) / (rows.shape[3] - 1), eps), 0.5)
        white = product(root, rows)
    else:
        root = symmetric_power(shrunk(product(rows.mT, rows) / (rows.shape[2] - 1), eps), 0.5)
        white = product(rows, root)
    white = white.transpose(1, 2).flatten(2)
    return _reordered(white, [order.argsort() for order in orders]) if groups > 1 else white


def _reordered(views: Tensor, orders: list[Tensor]) -> Tensor:
    return torch.stack([view.index_select(1, order) for view, order in zip(views, orders, strict=True)])


@register_loss
class CWRGP(ShufflingLoss):
    r"""Channel whitening with random group partition, of two views.

    .. math:: \frac{1}{N} \sum_i \Big\|\frac{v_i}{\|v_i\|} - \frac{v'_i}{\|v'_i\|}\Big\|^2, \qquad
        V_g = \Big(\tfrac{1}{d - 1} X_g X_g^\top\Big)^{-1/2} X_g, \quad X_g = (x_{ik})_{k \in g}, \quad
        x_{ik} = z_{ik} - \bar z_i

    Each sample is centered over its features. Samples are divided at random into sub-batches, alike for both views;
    features into groups of :math:`d = D / G`, anew for each view and each sub-batch; and in each group the samples are
    made white (ZCA): orthogonal, and of length :math:`\sqrt{d - 1}`. That asks for :math:`d` above the size of a
    sub-batch. Normalization is thus a constant factor, and there is no option to go without it.

    ``axis="features"`` is Shuffled-DBN: the same partition, but features are centered over the rows of a sub-batch and
    made white, which asks for more rows than :math:`d`. For groups of 64 features, ``groups=D // 64``.

    As published, each process divides its own rows (``scope="rank"``), and the loss is the mean over all rows; a
    process with too few of them counts none. With ``scope="global"`` the rows of all processes are divided together,
    and then value and gradient are those of a single process.

    On CUDA every step waits for the device, once for each sub-batch of a division: eigenvectors are computed.
    :class:`~lightning_collapse.losses.WMSE`, which whitens by Cholesky factors, does not wait.

    Two departures from the released code, where it fails: rows need not fill the sub-batches, which are made as equal
    as can be, and eigenvalues are raised to what the precision can tell from zero. Its covariance penalty, off by
    default there, is ``covariance_loss(features.mT)`` of each view, in one process.

    Args:
        sub_batch: Most rows that are whitened together; with ``axis="features"`` the fewest. Published for CIFAR and
            STL, with 512 features.
        groups: Into how many groups features are divided; published with it.
        iterations: How many random divisions are averaged; published default.
        eps: Share of the identity in the covariance; published default.
        axis: What is made white, samples or features; published default.
        scope: Whether sub-batches are made of the rows of each process, or of those of all together.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Weng, Huang, Zhao, Anwer, Khan & Khan, *An Investigation into Whitening Loss for Self-supervised Learning*,
        NeurIPS 2022. https://arxiv.org/abs/2210.03586, code at https://github.com/winci-ai/CW-RGP.
        Hua, Wang, Xue, Ren, Wang & Zhao, *On Feature Decorrelation in Self-Supervised Learning*, ICCV 2021.
        https://arxiv.org/abs/2105.00470.

    Example:
        >>> first = torch.randn(64, 512)
        >>> CWRGP(groups=1)(first, 3 * first + 1).abs() < 1e-4
        tensor(True)
    """

    source = (
        "Weng et al., NeurIPS 2022, arXiv 2210.03586, released-code form: ZCA of at most 64 samples over their "
        'features in 4 random groups, so for 260 features or more; `axis="features"` for Shuffled-DBN, Hua et al., '
        "ICCV 2021, arXiv 2105.00470 (2 at collapse)"
    )
    views = 2

    def __init__(
        self,
        sub_batch: int = 64,
        groups: int = 4,
        iterations: int = 1,
        eps: float = 0.0,
        axis: Axis = "samples",
        scope: Scope = "rank",
    ) -> None:
        super().__init__()
        require_whole(1, sub_batch=sub_batch, groups=groups, iterations=iterations)
        require_one_of(AXES, axis=axis)
        require_one_of(SCOPES, scope=scope)
        if not 0 <= eps < 1:
            raise ValueError(f"`eps` must be at least 0 and below 1, got {eps}.")
        self.sub_batch = sub_batch
        self.groups = groups
        self.iterations = iterations
        self.eps = eps
        self.axis: Axis = axis
        self.scope: Scope = scope
        self.coefficients = {"invariance": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"invariance": cw_rgp_loss(first, second)}`` for two views of shape ``(N, D)``."""
        first, second = views
        arguments = (self.sub_batch, self.groups, self.iterations, self.eps, self.axis, self.scope)
        return {"invariance": cw_rgp_loss(first, second, *arguments, self.next_step())}

    @property
    def value_at_perfection(self) -> float:
        """0 for views that agree and are white in every group.

        With several groups, views that agree but are not white in themselves read more than 0, since the groups of
        both differ: that is what evens them.
        """
        return 0.0

    @property
    def value_at_collapse(self) -> float:
        """0 for samples: equal ones point to one direction and agree, until amplified noise parts them; 2 for features.

        With several groups it is 0 for a row whose features are equally far from its mean, and small for others; a row
        of equal features has no direction and reads 2.
        """
        return 0.0 if self.axis == "samples" else 2.0

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return (
            f"sub_batch={self.sub_batch}, groups={self.groups}, iterations={self.iterations}, eps={self.eps},"
            f" axis={self.axis!r}, scope={self.scope!r}"
        )
