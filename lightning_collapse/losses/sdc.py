"""SDC (similarity distribution calibration): cosines of hash codes spread like a beta law, in the order of features."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.rows import require_rows, unit_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.losses.support.whitening import SCOPES, Scope
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_positive
from lightning_collapse.utilities.distributed import all_gather_rows_with_grad, all_reduce_sum_with_grad


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def beta_cosines(pairs: int, concentration: float = 5.0) -> Tensor:
    r"""Quantiles of a symmetric beta law on the cosines from -1 to 1, at :math:`(2 i - 1) / (2 P)`.

    Shape ``(pairs,)``, ascending and symmetric, on the host in ``float64``; the last eight sizes are kept.

    Example:
        >>> beta_cosines(4, concentration=1.0)  # uniform
        tensor([-0.7500, -0.2500,  0.2500,  0.7500], dtype=torch.float64)
    """
    lower = _lower_half(pairs, concentration)
    return torch.cat([lower, lower.new_zeros(pairs % 2), -lower.flip(0)])


@lru_cache(maxsize=8)
def _lower_half(pairs: int, a: float) -> Tensor:
    wanted = (2 * torch.arange(1, pairs // 2 + 1, dtype=torch.float64, device="cpu") - 1) / max(1, 2 * pairs)
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 0.5)
    for _ in range(52):
        middle = (low + high) / 2
        below = _share_below(middle, a) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low + high - 1


def _share_below(x: Tensor, a: float) -> Tensor:
    """The symmetric incomplete beta function for ``x`` up to a half, by its continued fraction (DLMF 8.17.22)."""
    fraction = torch.ones_like(x)
    for i in range(40 + 4 * math.isqrt(math.ceil(a)), 0, -1):
        m = i // 2
        step = -(a + m) * (2 * a + m) / ((a + i - 1) * (a + i)) if i % 2 else m * (a - m) / ((a + i - 1) * (a + i))
        fraction = 1 + step * x / fraction
    return (a * (x.log() + (-x).log1p()) + math.lgamma(2 * a) - 2 * math.lgamma(a)).exp() / (a * fraction)


@full_precision
def sdc_terms(
    features: Tensor, codes: Tensor, concentration: float = 5.0, orthogonal: bool = True, scope: Scope = "rank"
) -> dict[str, Tensor]:
    """The two terms of :class:`SDC`, unweighted.

    Collective: every process must call it; one all-reduce of 3 numbers, or with ``scope="global"`` an exchange of all
    rows, and a wait for their number.

    Args:
        features: What the codes are made of, shape ``(N, D)``; constants, which get no gradient.
        codes: Before the sign is taken, shape ``(N, K)``.
        concentration: As in :class:`SDC`, like those that follow.
        orthogonal: Whether targets below 0 are raised to 0.
        scope: Whose rows make pairs.

    Returns:
        Scalars ``similarity`` and ``quantization``, at least ``float32``, between 0 and 2.

    Raises:
        ValueError: If one is no matrix, their rows differ in number, or an argument is out of range.
        TooFewRowsError: If there are not two rows.

    Example:
        >>> codes = torch.tensor([[1.0, 1.0], [3.0, -3.0], [1.0, 1.0], [2.0, 2.0]])
        >>> {name: round(value.item(), 3) for name, value in sdc_terms(codes, codes, concentration=1.0).items()}
        {'similarity': 0.25, 'quantization': 0.0}
    """
    require_one_of(SCOPES, scope=scope)
    require_positive(concentration=concentration)
    (features,), (codes,) = separate_views("sdc_terms", features=features), separate_views("sdc_terms", codes=codes)
    here, width = len(codes), codes.shape[1]
    if len(features) != here:
        raise ValueError(f"`features` and `codes` of `sdc_terms` must have as many rows, got {len(features)}, {here}.")
    if scope == "global":
        everything, _ = all_gather_rows_with_grad(torch.cat([codes, features.detach().to(codes)], dim=1))
        codes, features = everything[:, :width], everything[:, width:]
    pairs = len(codes) // 2
    order = _cosines(features.detach(), pairs).argsort(stable=True)
    targets = beta_cosines(pairs, concentration).to(codes)
    gaps = _cosines(codes, pairs)[order] - (targets.relu() if orthogonal else targets)
    rounding = 1 - (unit_rows(codes) * unit_rows(codes.detach().sign())).sum(dim=1)[: 2 * pairs]
    sums = torch.stack([gaps.abs().sum(), rounding.sum() / 2, gaps.new_full((), pairs)])
    if scope == "rank":
        sums = all_reduce_sum_with_grad(sums)
    require_rows("sdc_terms", 2, 2 * sums[2].detach(), here)
    return {"similarity": sums[0] / sums[2].detach(), "quantization": sums[1] / sums[2].detach()}


def _cosines(rows: Tensor, pairs: int) -> Tensor:
    """Of the first half of the rows with the second; the last of an odd number has no partner."""
    units = unit_rows(rows[: 2 * pairs])
    return (units[:pairs] * units[pairs:]).sum(dim=1)


@torch.no_grad()
def hash_code_readings(codes: Tensor) -> dict[str, Tensor]:
    r"""How evenly hash codes use their bits, for a look now and then: it waits for the device.

    Args:
        codes: Shape ``(N, K)``; their signs count.

    Returns:
        Scalars from 0, which is even use, to 1: ``imbalance``, the mean over bits of the size of their mean sign, which
        is about :math:`\sqrt{2 / (\pi N)}` for random codes; ``correlation``, the mean size of the correlation of two
        bits, in which one that never changes counts as 0; ``duplicates``, the share of rows whose code an earlier row
        has.

    Raises:
        ValueError: If it is no matrix.

    Example:
        >>> codes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.5], [1.0, -2.0]])
        >>> {name: value.item() for name, value in hash_code_readings(codes).items()}
        {'imbalance': 0.5, 'correlation': 0.0, 'duplicates': 0.5}
    """
    (rows,) = separate_views("hash_code_readings", codes=codes)
    require_rows("hash_code_readings", 1, len(rows), len(rows))
    signs = torch.where(rows < 0, -1.0, 1.0)
    units = unit_rows((signs - signs.mean(dim=0)).mT)
    correlation = (units @ units.mT).abs()
    others = max(1, len(units) * (len(units) - 1))
    return {
        "imbalance": signs.mean(dim=0).abs().mean(),
        "correlation": (correlation.sum() - correlation.diagonal().sum()).clamp_min(0) / others,
        "duplicates": 1 - signs.new_full((), len(torch.unique(signs, dim=0))) / len(signs),
    }


class SDC(AntiCollapseLoss):
    r"""Similarity distribution calibration of hash codes, against codes whose cosines are all alike.

    .. math:: \frac{1}{P} \sum_i \big|\cos(v_{(i)}, v'_{(i)}) - q_i\big| + \frac{1}{N} \sum_j \big(1 - \cos(v_j,
        \operatorname{sign} v_j)\big)

    Rows of the first half of a batch and of the second are the :math:`P` pairs, in the order of the cosines of their
    features; :math:`q_i` are quantiles of a beta law, at :math:`(2 i - 1) / 2 P`. Terms ``similarity`` and
    ``quantization``. It takes two matrices, features and codes, ``SDC()(features, codes)``, and gives gradients to the
    codes alone: for the mixin, since one layer does not return both. An odd last row counts nothing.

    The defaults are those of the authors' configuration; their class has others, concentration 2 and no quantization.

    Args:
        similarity: Coefficient of the similarities.
        quantization: Coefficient of the quantization.
        concentration: Both parameters ``a`` of the beta law, whose standard deviation is ``(2 a + 1) ** -0.5``. Random
            codes of K bits have ``K ** -0.5``: do not go above ``(K - 1) / 2``.
        orthogonal: Whether targets below 0 are raised to 0.
        scope: ``"rank"``, as published: every process has pairs of its own. ``"global"``: the value and gradient of one
            process on the concatenated batch, for one exchange of all rows.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Ng, Zhu, Hoe, Chan, Zhang, Song & Xiang, *Unsupervised Hashing with Similarity Distribution Calibration*, BMVC
        2023. https://arxiv.org/abs/2302.07669, code at https://github.com/kamwoh/sdc.

    Example:
        >>> equal = torch.ones(128, 32)
        >>> round(SDC(orthogonal=False)(torch.randn(128, 8), equal).item(), 4), round(SDC().at_collapse(128, 32), 4)
        (1.0, 0.8772)
    """

    source = "Ng et al., BMVC 2023, arXiv 2302.07669, the authors' configuration; of features and codes"
    views = 2

    def __init__(
        self,
        similarity: float = 1.0,
        quantization: float = 1.0,
        concentration: float = 5.0,
        orthogonal: bool = True,
        scope: Scope = "rank",
    ) -> None:
        super().__init__()
        require_positive(concentration=concentration)
        require_one_of(SCOPES, scope=scope)
        self.concentration = concentration
        self.orthogonal = orthogonal
        self.scope: Scope = scope
        self.coefficients = {"similarity": similarity, "quantization": quantization}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`sdc_terms`; features of shape ``(N, D)`` and codes of shape ``(N, K)``."""
        features, codes = views
        return sdc_terms(features, codes, self.concentration, self.orthogonal, self.scope)

    @property
    def value_at_collapse(self) -> float:
        """``nan``: with ``orthogonal`` it depends on the number of rows, see :meth:`at_collapse`."""
        return math.nan

    def at_collapse(self, rows: int, dim: int) -> float:
        """All codes equal, to numbers of one size: every cosine is 1."""
        targets = beta_cosines(rows // 2, self.concentration)
        mean: float = (targets.relu() if self.orthogonal else targets).mean().item()
        return self.coefficients["similarity"] * (1 - mean)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        coefficients = ", ".join(f"{name}={value}" for name, value in self.coefficients.items())
        return f"{coefficients}, concentration={self.concentration}, orthogonal={self.orthogonal}, scope={self.scope!r}"
