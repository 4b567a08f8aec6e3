"""T-REGS (minimum spanning tree regularization): the tree that joins all rows is long, and rows stay near a sphere."""

import math

import torch
from torch import Tensor

from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.losses.support.pairs import gather_rows, squared_distances
from lightning_collapse.losses.support.rows import lengths
from lightning_collapse.losses.support.spanning_tree import minimum_spanning_tree
from lightning_collapse.losses.support.statistics import stack_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad
from lightning_collapse.utilities.registry import register_loss


@full_precision
def tregs_terms(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """The three terms of :class:`TREGS`, unweighted.

    Collective: every process must call it; gathers the rows of both views, and one all-reduce of two numbers. Every
    process finds the trees of the global batch. Only with several processes it waits for the device, to learn how many
    rows there are.

    Args:
        first: Representations of one view, shape ``(N, D)``.
        second: Representations of the other view of the same samples in the same order, shape ``(N, D)``.

    Returns:
        Scalars ``invariance``, ``length`` and ``sphere``, at least ``float32``, of the global batch.

    Raises:
        ValueError: If the views are not matrices of one shape, or have fewer than two rows over all processes.

    Example:
        >>> first = torch.arange(12.0).reshape(4, 3).sin()
        >>> second = first.flip(1)
        >>> {name: round(value.item(), 3) for name, value in tregs_terms(first, second).items()}
        {'invariance': 2.82, 'length': -1.543, 'sphere': 0.101}
    """
    views = stack_views("tregs_terms", first=first, second=second)
    everything, _ = gather_rows("tregs_terms", torch.cat(views.unbind(), dim=1))
    length = sum((_tree_length(view) for view in everything.chunk(2, dim=1)), start=views.new_zeros(()))
    sphere = (lengths(views) - 1).square().sum()
    sums = all_reduce_sum_with_grad(torch.stack([(views[0] - views[1]).square().sum(), sphere]))
    n = len(everything)
    return {"invariance": sums[0] / n, "length": -length / n, "sphere": sums[1] / n}


def _tree_length(rows: Tensor) -> Tensor:
    left, right = minimum_spanning_tree(squared_distances(rows.detach(), rows.detach(), 0))
    return lengths(rows[left] - rows[right]).sum()


@register_loss
class TREGS(AntiCollapseLoss):
    r"""Minimum spanning tree regularization of two views.

    .. math:: \frac{\beta}{N} \sum_i \|z_i - z'_i\|^2 + \sum_{V \in \{Z, Z'\}} \Big(-\frac{\gamma}{N} E(V) +
        \frac{\lambda}{N} \sum_i (\|v_i\| - 1)^2\Big)

    with the length :math:`E` of the minimum spanning tree of a view's rows, over the rows of the global batch. The
    length of the tree is that of an entropy's estimator; on a sphere it is longest for a regular simplex. Its gradient
    is a unit vector along every edge, and does not fade as rows approach; rows that coincide have none.

    **The rows do not stay on the unit sphere.** The constraint is soft and its published weight is small: with views
    that agree, the radius grows to :math:`r^* = 1 + \tfrac{\gamma}{2 \lambda} \sqrt{2 (N - 1) / N}`, which is 178 for
    large ``N`` (:meth:`radius`). What agrees only in part is held back by the first term. The paper finds this better
    than normalized rows. A larger ``sphere`` brings the radius down; the loss is least there, at
    ``-2 * gamma * s * (1 + gamma * s / (4 * lambda))`` with the root :math:`s`, -51, which is below
    :attr:`value_at_perfection` on the unit sphere.

    The tree is found in ``log2(N)`` rounds of vector operations, without a wait for the device, and its edges measured
    anew, with gradient. The authors' code was not at hand; that the tree is that of the global batch is our choice.

    Args:
        invariance: Coefficient β; published default.
        length: Coefficient γ; published default.
        sphere: Coefficient λ; published default.

    References:
        Mordacq et al., *T-REGS: Minimum spanning tree regularization for self-supervised learning*, NeurIPS 2025.
        https://arxiv.org/abs/2510.23484

    Example:
        >>> import torch
        >>> TREGS().terms(torch.eye(4), torch.eye(4))
        {'invariance': tensor(0.), 'length': tensor(-2.1213), 'sphere': tensor(0.)}
    """

    source = "Mordacq et al., NeurIPS 2025, arXiv 2510.23484; values for rows of norm 1, where it does not keep them"
    views = 2

    def __init__(self, invariance: float = 10.0, length: float = 0.2, sphere: float = 8e-4) -> None:
        super().__init__()
        self.coefficients = {"invariance": invariance, "length": length, "sphere": sphere}

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """See :func:`tregs_terms`; two views of shape ``(N, D)``."""
        first, second = views
        return tregs_terms(first, second)

    def radius(self, rows: int) -> float:
        """Norm of the rows where the loss is least: that many rows on a regular simplex, in views that agree.

        Example:
            >>> round(TREGS().radius(32), 2)
            174.99
        """
        return 1 + self.coefficients["length"] * _simplex(rows) / (2 * self.coefficients["sphere"])

    @property
    def value_at_perfection(self) -> float:
        """A simplex of many rows on the unit sphere: ``-2 * length * sqrt(2)``, -0.57."""
        return -2 * self.coefficients["length"] * math.sqrt(2)

    def at_perfection(self, rows: int, dim: int) -> float:
        """The same for that many rows: ``-2 * length * sqrt(2 (N - 1) / N)``, which needs ``N <= D + 1``."""
        return -2 * self.coefficients["length"] * _simplex(rows)

    @property
    def value_at_collapse(self) -> float:
        """0 on the unit sphere; elsewhere the sphere's term alone."""
        return 0.0

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return ", ".join(f"{name}={value}" for name, value in self.coefficients.items())


def _simplex(rows: int) -> float:
    """Length of the tree, over the number of rows, of a regular simplex on the unit sphere."""
    return math.sqrt(2 * (rows - 1) / rows)
