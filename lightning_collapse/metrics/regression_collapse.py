"""Neural regression collapse, streaming: moments of features and targets that add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_collapse.functional.regression_collapse import RESOLUTION, nrc1, nrc2, nrc3, rank_of_basis, unit_rows
from lightning_collapse.metrics.sums import SumsMetric
from lightning_collapse.spectral.moments import STATES, Moments
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.row_space import row_space
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.distributed import all_reduce_sum


class RegressionCollapse(SumsMetric):
    r"""NRC1 to NRC3 of all features and targets seen since the last reset.

    See :func:`~lightning_collapse.functional.nrc1`, :func:`~lightning_collapse.functional.nrc2` and
    :func:`~lightning_collapse.functional.nrc3`. Keeps the moments of features and targets together, about an anchor,
    and the second moment of the features' directions: memory is ``O((dim + targets) ** 2)`` however many samples
    arrive, and any split into batches and over processes gives the same. Rows with NaN or infinity in features or
    targets are left out; features of zero have no direction.

    As input to ``update``:

    - ``features`` (:class:`~torch.Tensor`): What the head receives, shape ``(N, dim)``, any floating dtype.
    - ``targets`` (:class:`~torch.Tensor`): Shape ``(N, targets)``, or ``(N,)`` for one.
    - ``mask`` (:class:`~torch.Tensor`, optional): Boolean, shape ``(N,)``: rows to count.

    As input to ``compute``, if wanted: ``weight``, shape ``(targets, dim)``, what the head multiplies by. Without it
    (as in ``forward`` and in a collection) ``nrc2``, ``nrc3`` and ``rank`` are NaN.

    As output of ``compute``, a dictionary of scalars, ``float64``:

    - ``nrc1``, ``nrc2``, ``nrc3``: 0 is collapsed;
    - ``n``: rows behind them;
    - ``rank``: numerical rank of the weight.

    Args:
        dim: Number of features ``D``.
        targets: Number of targets ``n``.
        center: Take the principal axes of centered features, or of features as they are, which the paper leaves open.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``dim`` or ``targets`` is not positive; on shapes that do not fit.

    References:
        Andriopoulos et al., *The Prevalence of Neural Collapse in Neural Multivariate Regression*, NeurIPS 2024.
        https://arxiv.org/abs/2409.04180

    Example:
        >>> metric = RegressionCollapse(dim=2, targets=1)
        >>> metric.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.5, 1.5]))
        >>> {name: value.item() for name, value in metric.compute(weight=torch.tensor([[0.0, 1.0]])).items()}
        {'nrc1': 0.0, 'nrc2': 1.0, 'nrc3': nan, 'n': 2.0, 'rank': 1.0}
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = True  # two streams merge by more than a sum per state

    directions: Tensor
    shift: Tensor

    def __init__(
        self, dim: int, targets: int, center: bool = True, dtype: torch.dtype = torch.float64, **kwargs: Any
    ) -> None:
        # a cached value would be given for another weight too
        super().__init__(**{"compute_with_cache": False, **kwargs})
        for name, number in (("dim", dim), ("targets", targets)):
            if number < 1:
                raise ValueError(f"`{name}` must be positive, got {number}.")
        self.dim, self.targets, self.center = dim, targets, center
        for name, state in Moments(dim + targets, dtype=dtype).states().items():
            self.add_state(name, state, dist_reduce_fx=None)
        self.add_state("directions", torch.zeros(dim, dim, dtype=dtype), dist_reduce_fx=None)

    @full_precision
    def update(self, features: Tensor, targets: Tensor, mask: Tensor | None = None) -> None:
        """Add rows of shape ``(N, dim)`` and their targets ``(N, targets)``."""
        targets = targets.unsqueeze(1) if targets.ndim == 1 else targets
        if features.ndim != 2 or features.shape[1] != self.dim or targets.shape != (len(features), self.targets):
            raise ValueError(
                f"Expected `features` of shape (N, {self.dim}) and `targets` of shape (N, {self.targets}), got"
                f" {tuple(features.shape)} and {tuple(targets.shape)}."
            )
        joint = torch.cat([features.to(self.directions), targets.to(self.directions)], dim=1)
        moments = self.moments()
        moments.update(joint, mask)
        units = unit_rows(finite_rows(joint, mask)[0][:, : self.dim])
        self._set(moments, torch.addmm(self.directions, units.T, units))

    def compute(self, weight: Tensor | None = None) -> dict[str, Tensor]:
        """The three measures of everything seen so far."""
        moments = self.moments()
        n = moments.count.clamp_min(1)
        covariance = moments.scatter / n
        of_features, of_targets = covariance[: self.dim, : self.dim], covariance[self.dim :, self.dim :]
        if not self.center:
            mean = moments.mean[: self.dim]
            of_features = of_features + torch.outer(mean, mean)
        nothing = torch.full_like(n, torch.nan)
        values = {"nrc1": nrc1(of_features, self.directions, self.targets), "nrc2": nothing, "nrc3": nothing}
        values |= {"n": moments.count, "rank": nothing}
        if weight is not None:
            weight = weight.detach()
            if weight.shape != (self.targets, self.dim):
                raise ValueError(f"`weight` must have shape ({self.targets}, {self.dim}), got {tuple(weight.shape)}.")
            values |= {"nrc2": nrc2(self.directions, weight), "nrc3": nrc3(weight, of_targets)}
            values["rank"] = rank_of_basis(row_space(weight.to(self.directions), RESOLUTION))
        return values

    def moments(self) -> Moments:
        """The accumulated statistics of features and targets side by side."""
        return Moments.from_states({name: getattr(self, name) for name in STATES})

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of this class has seen, exactly."""
        names = (*STATES, "directions")
        if isinstance(incoming_state, Metric):
            incoming_state = {name: getattr(incoming_state, name, None) for name in names}
        shapes = [getattr(incoming_state.get(name), "shape", None) for name in ("shift", "directions")]
        if shapes != [self.shift.shape, self.directions.shape] or not set(names) <= set(incoming_state):
            raise ValueError(
                f"`incoming_state` must be a `RegressionCollapse` metric, or its states, of `dim={self.dim}` and"
                f" `targets={self.targets}`."
            )
        merged = self.moments().merge(Moments.from_states(incoming_state))
        self._set(merged, self.directions + incoming_state["directions"])
        self._computed = None
        self._update_count += 1

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        # the sums are about a shift that differs between processes
        group = process_group or self.process_group
        self._set(self.moments().reduce(group), all_reduce_sum(self.directions, group))

    def _set(self, moments: Moments, directions: Tensor) -> None:
        for name, state in moments.states().items():
            setattr(self, name, state)
        self.directions = directions
