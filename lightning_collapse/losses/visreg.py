"""VISReg: features are centered, of unit scale, and along random directions sorted like a normal sample."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_collapse.losses.support.directions import random_directions
from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.rows import require_rows
from lightning_collapse.losses.support.shuffle import ShufflingLoss
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.losses.support.whitening import SCOPES, Scope
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_positive, require_whole
from lightning_collapse.utilities.differentiable_once import once
from lightning_collapse.utilities.distributed import all_gather_rows_with_grad, world_size
from lightning_collapse.utilities.registry import register_loss


@full_precision
def visreg_terms(features: Tensor, directions: Tensor, eps: float = 1e-4, scope: Scope = "rank") -> dict[str, Tensor]:
    r"""The three terms of :class:`VISReg`, unweighted.

    With ``scope="rank"`` nothing travels and every process reads its own rows. With ``scope="global"`` it is
    collective: every process must call it with the same directions, rows of all processes travel, every process sorts
    all of them, and several processes wait once for the device, to learn how many rows there are. Can be
    differentiated once.

    Args:
        features: Representations, shape ``(N, D)``, with at least two rows.
        directions: Unit columns, shape ``(D, M)``.
        eps: Added to the standard deviation that features are divided by.
        scope: Whether a batch is that of one process or that of all.

    Returns:
        Scalars ``scale``, ``shape`` and ``center``, at least ``float32``.

    Raises:
        ValueError: If ``features`` is not a matrix, ``directions`` do not fit, or if there are fewer than two rows.

    Example:
        >>> features = torch.arange(12.0).reshape(4, 3).sin()
        >>> {name: round(value.item(), 3) for name, value in visreg_terms(features, torch.eye(3)).items()}
        {'scale': 0.217, 'shape': 0.214, 'center': 0.002}
    """
    require_one_of(SCOPES, scope=scope)
    (rows,) = separate_views("visreg_terms", features=features)
    n, dim = rows.shape
    if directions.ndim != 2 or len(directions) != dim:
        raise ValueError(f"`directions` must have shape ({dim}, M), got {tuple(directions.shape)}: one per column.")
    if scope == "global":
        rows, _ = all_gather_rows_with_grad(rows)
    count = len(rows)
    require_rows("visreg_terms", 2, count, min(n, count))
    mean = rows.mean(dim=0)
    centered = rows - mean
    std = centered.norm(dim=0) / math.sqrt(count)
    normalized = centered / (std.detach() + eps)
    projections = product(normalized, directions.to(rows))
    order = torch.arange(1, count + 1, dtype=rows.dtype, device=rows.device)
    quantiles = math.sqrt(2) * torch.erfinv(2 * order / (count + 1) - 1)
    gaps = projections.sort(dim=0).values - quantiles.unsqueeze(1)
    return {
        "scale": (1 - std).square().mean(),
        "shape": once(gaps.square().mean()),
        "center": mean.square().mean(),
    }


@register_loss
class VISReg(ShufflingLoss):
    r"""Variance-invariance-sketching regularization, without its invariance: terms ``scale``, ``shape``, ``center``.

    .. math:: \tfrac{1}{D} \sum_j (1 - \sigma_j)^2
        + \tfrac{1}{N M} \sum_m \sum_i \Big( u_{(i) m} - \Phi^{-1}\big(\tfrac{i}{N + 1}\big) \Big)^2
        + \tfrac{1}{D} \sum_j \bar z_j^2

    with the biased standard deviation :math:`\sigma`, and sorted projections :math:`u_{(i) m}` of
    :math:`(z - \bar z) / (\sigma + \epsilon)` on the direction :math:`m`, in which :math:`\sigma` has no gradient. The
    authors add :math:`\lambda` times it to :math:`1 - \lambda` times the distance of views, with :math:`\lambda` 0.9
    for large data and 0.6 for small.

    Directions are drawn anew at every call in training mode, and stay what they were in evaluation mode. They depend
    on the number of such calls, on ``seed`` and on the process alone; the training's own random numbers are untouched.
    The number is a buffer that no ``state_dict`` holds.

    Args:
        slices: Number of directions; published default.
        scale: Coefficient of the scale; published default.
        shape: Coefficient of the shape; published default.
        center: Coefficient of the center; published default.
        eps: Added to the standard deviation that features are divided by. (The released code has instead a floor of
            1e-6 for it.)
        scope: ``"rank"``, as published: every process has its own rows and directions, and nothing travels, so that
            the value depends on how a batch is split. ``"global"``: the value and gradient of one process on the
            concatenated batch, for one exchange of all rows.
        seed: Another number gives other directions.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Wu, Balestriero & Levine, *VISReg*, 2026. https://arxiv.org/abs/2606.02572

    Example:
        >>> import torch
        >>> {name: round(term.item(), 3) for name, term in VISReg().terms(torch.full((1000, 8), 2.0)).items()}
        {'scale': 1.0, 'shape': 0.988, 'center': 4.0}
    """

    source = "Wu et al., 2026, arXiv 2606.02572, without its invariance"

    def __init__(
        self,
        slices: int = 4096,
        scale: float = 1.0,
        shape: float = 1.0,
        center: float = 1.0,
        eps: float = 1e-4,
        scope: Scope = "rank",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive(eps=eps)
        require_whole(1, slices=slices)
        require_one_of(SCOPES, scope=scope)
        self.slices = slices
        self.eps = eps
        self.scope: Scope = scope
        self.seed = seed
        self.coefficients = {"scale": scale, "shape": shape, "center": center}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`visreg_terms`, along new directions; features of shape ``(N, D)``."""
        (features,) = views
        own = dist.get_rank() << 32 if self.scope == "rank" and world_size() > 1 else 0
        step = self.next_step().to(features.device)
        directions = random_directions(features.shape[-1], self.slices, step, self.seed + own)
        return visreg_terms(features, directions, self.eps, self.scope)

    @property
    def value_at_perfection(self) -> float:
        """0, which many normal rows come near."""
        return 0.0

    @property
    def value_at_collapse(self) -> float:
        """``nan``: it depends on the number of rows, see :meth:`at_collapse`."""
        return math.nan

    def at_collapse(self, rows: int, dim: int) -> float:
        """With all rows at the origin; elsewhere it is larger. ``scale``, and ``shape`` times nearly 1."""
        grid = torch.arange(1, rows + 1, dtype=torch.float64, device="cpu") / (rows + 1)
        spread: float = 2 * torch.erfinv(2 * grid - 1).square().mean().item()
        return self.coefficients["scale"] + self.coefficients["shape"] * spread

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        coefficients = ", ".join(f"{name}={value}" for name, value in self.coefficients.items())
        return f"slices={self.slices}, {coefficients}, eps={self.eps}, scope={self.scope!r}, seed={self.seed}"
