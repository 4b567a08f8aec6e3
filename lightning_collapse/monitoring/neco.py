"""NECO on demand: out-of-distribution scores of two loaders by the principal subspace of a layer's features."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from lightning_collapse.functional.neural_collapse.nc4 import neco_score
from lightning_collapse.monitoring.feature_hooks import FeatureHooks
from lightning_collapse.spectral.eigenvalues import eigenvectors
from lightning_collapse.spectral.moments import Moments
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.loaders import Loader, batches_of, rewound
from lightning_collapse.utilities.modules import find_taps
from lightning_collapse.utilities.preserved_state import preserved_state
from lightning_collapse.utilities.targets import call_on


class PrincipalSubspace(NamedTuple):
    """Leading principal directions of standardized features.

    Attributes:
        mean: Shape ``(D,)``.
        scale: One over the standard deviation, shape ``(D,)``; 0 for a feature that does not vary.
        components: Orthonormal columns, shape ``(D, d)``.
        explained: Share of the variance in them, 0-dimensional.
    """

    mean: Tensor
    scale: Tensor
    components: Tensor
    explained: Tensor


class NecoReading(NamedTuple):
    """NECO of two sets of inputs.

    Attributes:
        id_scores: Of those of the training distribution, ``(N,)``, 0 to 1.
        ood_scores: Of the others, ``(M,)``: lower where features have collapsed.
        auroc: How often a score of the first is above one of the others, 0-dimensional; 0.5 is chance.
        dims: Directions kept, ``d``.
        explained: Share of the variance in them, 0-dimensional: near 1 no score can tell anything.
    """

    id_scores: Tensor
    ood_scores: Tensor
    auroc: Tensor
    dims: int
    explained: Tensor


def principal_subspace(moments: Moments, dims: int = 100) -> PrincipalSubspace:
    """Leading principal directions of features, each divided by its standard deviation, from their moments.

    Args:
        moments: Of the features, width ``D``.
        dims: How many directions, cut at ``D``; 100 as in the authors' code.

    Example:
        >>> moments = Moments(2)
        >>> moments.update(torch.tensor([[1.0, 10.0], [-1.0, -10.0]]))
        >>> principal_subspace(moments, dims=1).explained.round(decimals=6)
        tensor(1., dtype=torch.float64)
    """
    gram, _ = moments.gram()
    varies = gram.diagonal() > 0
    scale = torch.where(varies, torch.where(varies, gram.diagonal() / moments.count, 1.0).rsqrt(), 0.0)
    values, vectors = eigenvectors(gram * torch.outer(scale, scale))
    return PrincipalSubspace(moments.mean, scale, vectors[:, :dims], values[:dims].sum() / values.sum())


def neco(
    model: nn.Module,
    layer: str,
    id_loader: Loader,
    ood_loader: Loader,
    train_loader: Loader | None = None,
    dims: int = 100,
    inputs: Callable[[nn.Module, Any], Any] = call_on,
) -> NecoReading:
    """NECO scores of a layer's features, without logits: see :func:`~lightning_collapse.functional.neco_score`.

    In eval mode and without gradient; the model and random states are put back. Memory: moments of the training
    features, and one number per input. Every process reads its own loaders.

    Args:
        model: Any module.
        layer: Name of a submodule, ``"head:input"`` for what goes into ``head``, as published.
        id_loader: Inputs of the training distribution, best held-out ones.
        ood_loader: Others.
        train_loader: What the subspace is of; by default ``id_loader``, which flatters its scores where inputs are few.
        dims: Directions kept: 100 in the authors' code, 128 in ports; of as many directions as features all score 1.
        inputs: How the model is called on a batch; moves it to the device, if need be.

    Returns:
        Scores, their area under the ROC curve, ``d`` and the explained share, which belong beside the score.

    Raises:
        ValueError: If the layer is not there, returns nothing, or ``dims`` is not positive.

    References:
        Ben Ammar et al., *NECO*, ICLR 2024. https://arxiv.org/abs/2310.06823

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1))
        >>> known, strange = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([[1.0, -1.0]])
        >>> reading = neco(model, "1:input", [known], [strange], dims=1)
        >>> reading.auroc, reading.dims
        (tensor(1.), 1)
    """
    require_whole(1, dims=dims)
    taps = find_taps(model, [layer])
    hooks = FeatureHooks(taps, limit=sys.maxsize)

    def rows(loader: Loader) -> Iterator[Tensor]:
        loader = batches_of(loader)
        with rewound(loader):
            for batch in loader:
                hooks.armed, hooks.mask = True, padding_mask(batch)
                inputs(model, batch)
                hooks.armed = False
                if (captured := hooks.pop().get(taps[0].name)) is None:
                    raise ValueError(f"`layer` {layer!r} returned no features on a batch. Choose one that runs.")
                yield captured.rows[captured.mask]

    def scores(name: str, loader: Loader) -> Tensor:
        found = [neco_score((x - space.mean) * space.scale, space.components) for x in rows(loader)]
        if not found:
            raise ValueError(f"`{name}` must hold a batch.")
        return torch.cat(found)

    try:
        with preserved_state(model, gradients=False):
            moments: Moments | None = None
            for x in rows(id_loader if train_loader is None else train_loader):
                moments = moments or Moments(x.shape[1], x.device)
                moments.update(x)
            if moments is None:
                raise ValueError("`train_loader`, or `id_loader` without it, must hold a batch.")
            space = principal_subspace(moments, dims)
            inside, outside = scores("id_loader", id_loader), scores("ood_loader", ood_loader)
    finally:
        hooks.remove()
    both, labels = torch.cat([inside, outside]), torch.cat([torch.ones_like(inside), torch.zeros_like(outside)])
    finite = both.isfinite()
    return NecoReading(
        inside, outside, binary_auroc(both[finite], labels[finite].long()), space.components.shape[1], space.explained
    )
