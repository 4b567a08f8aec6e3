"""LDReg (local dimensionality regularization): every row's neighbourhood is to have many dimensions."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.pairs import gather_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.neighbors import nearest_squares
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_positive, require_whole
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad
from lightning_collapse.utilities.registry import register_loss

Form = Literal["paper", "released"]
FORMS = get_args(Form)


@full_precision
def ldreg_loss(features: Tensor, k: int = 64, form: Form = "paper", eps: float = 1e-4) -> Tensor:
    """The value of :class:`LDReg`.

    Collective: every process must call it; gathers all rows, and one all-reduce of a number. Distances cost
    ``N_here * N * D``. Only with several processes it waits for the device, to learn how many rows there are.

    Args:
        features: Representations, shape ``(N, D)``, with at least four rows over all processes.
        k: How many neighbours, at least 2; ``N - 2`` if that is less, as the authors' code has it.
        form: See :class:`LDReg`.
        eps: Share of the distance to the last neighbour below which differences do not count.

    Returns:
        Scalar, at least ``float32``, the value on the global batch; its exponential is the inverse of the geometric
        mean of the local intrinsic dimensions.

    Raises:
        ValueError: If ``features`` is not a matrix, an argument is out of range, or if there are fewer than four rows
            over all processes.

    Example:
        >>> plane = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 50)
        >>> (-ldreg_loss(plane)).exp().round()
        tensor(2.)
    """
    require_whole(2, k=k)
    require_one_of(FORMS, form=form)
    (rows,) = separate_views("ldreg_loss", features=features)
    everything, first = gather_rows("ldreg_loss", rows.detach(), least=4)
    near = nearest_squares(rows, everything, min(k, len(everything) - 2), first)
    repeated = near == 0
    distances = torch.where(repeated, 0.0, torch.where(repeated, 1.0, near).sqrt())
    radius = distances[:, -1]
    share = distances[:, :-1].mean(dim=1) / torch.where(radius > 0, radius, 1.0)
    log_dimension = (share + eps).log() - (1 - share + eps).log()
    if form == "released":
        log_dimension = log_dimension.abs()
    return all_reduce_sum_with_grad(-log_dimension.sum().to(rows.dtype)) / len(everything)


@register_loss
class LDReg(AntiCollapseLoss):
    r"""Local dimensionality regularization: raises the geometric mean of the rows' local intrinsic dimensions.

    .. math:: \ell(Z) = -\frac{1}{N} \sum_i \log d_i, \qquad d_i = \frac{m_i}{r_{ik} - m_i}, \quad
        m_i = \frac{1}{k - 1} \sum_{j < k} r_{ij}

    with the distances :math:`r_{i1} \le \dots \le r_{ik}` of a row to its neighbours in the global batch: the method of
    moments, consistent since :math:`\mathbb{E}\, r = \tfrac{d}{d + 1} r_k` in a ball of dimension :math:`d`. The
    gradient moves a row among its neighbours and does not move the neighbours (``reference.detach()`` in the code).

    - ``form="paper"``, equation 1 as the authors' README has it: :math:`-\log d_i`.
    - ``form="released"``, as the training code has it (its options ``l1`` and ``l2`` alike): :math:`-|\log d_i|`, which
      pushes a dimension below 1 further down, and so rewards collapse.

    Both are evaluated as :math:`\log (q + \epsilon) - \log (1 - q + \epsilon)` with :math:`q = m / r_k`, finite where
    neighbours repeat the row or are all equally far; dimensions of 5 and 50 read 4.998 and 49.75. Rows that all
    neighbours repeat read the least dimension. At exact collapse the gradient is zero. Reads too little above a
    dimension of about 10, the more so the larger ``k`` is beside ``N``: to be compared at one ``N`` and ``k``.

    The authors apply it to the encoder's features, both views as one batch of 2048, after 10 epochs
    (:class:`~lightning_collapse.losses.LinearWarmup`), with weights 0.01 (SimCLR), 0.005 (BYOL, MoCo) and 5e-6 (MAE).

    Args:
        k: How many neighbours, at least 2 (one distance is the unit, another one is measured), and ``N - 2`` at most;
            the authors' main setting by default.
        form: Which published form.
        eps: Share of the distance to the last neighbour below which differences do not count; the published forms have
            0.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Huang et al., *LDReg: Local dimensionality regularized self-supervised learning*, ICLR 2024.
        https://arxiv.org/abs/2401.10474, code at https://github.com/HanxunH/LDReg.

    Example:
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> round(LDReg(k=2)(features).item(), 3)
        1.789
    """

    source = (
        'Huang et al., ICLR 2024, arXiv 2401.10474, equation 1; `form="released"` for the training code\'s, which '
        "rewards collapse"
    )

    def __init__(self, k: int = 64, form: Form = "paper", eps: float = 1e-4) -> None:
        super().__init__()
        require_whole(2, k=k)
        require_one_of(FORMS, form=form)
        require_positive(eps=eps)
        self.k = k
        self.form: Form = form
        self.eps = eps
        self.coefficients = {"dimension": 1.0}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """``{"dimension": ldreg_loss(features)}`` for features of shape ``(N, D)``."""
        (features,) = views
        return {"dimension": ldreg_loss(features, self.k, self.form, self.eps)}

    @property
    def value_at_perfection(self) -> float:
        """All rows equally far from each other: the largest dimension that is told apart, -9.21."""
        return -math.log((1 + self.eps) / self.eps)

    @property
    def value_at_collapse(self) -> float:
        """9.21; in the released form as good as perfection."""
        return self.value_at_perfection if self.form == "released" else -self.value_at_perfection

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"k={self.k}, form={self.form!r}, eps={self.eps}"
