"""Feature translation (FeTrIL): features of old classes, of which only the means are left, from rows of new ones."""

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.nc4 import nearest_class_center
from lightning_collapse.functional.prototypes.scores import require_rows
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.spectral.precision import full_precision


@full_precision
def fetril_features(features: Tensor, labels: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    r"""Rows of the new class nearest to each old one, moved to where the mean of that was.

    .. math:: \hat f_i = f_i + \mu_c - \mu_{y_i}, \quad y_i = \arg\min_y \|\mu_c - \mu_y\|

    Their mean is the stored one exactly, their covariance that of the donor. After division by their length it is
    not: classifiers of unit rows want raw rows and raw means here, and all rows divided afterwards, as test rows are.
    For a backbone that stays as it is. Waits for the device.

    Args:
        features: Rows of new classes, shape ``(N, D)``; rows with NaN or infinity are left out.
        labels: Their classes, integers of shape ``(N,)``; negative ones name none.
        means: Of old classes, shape ``(K, D)``.

    Returns:
        Pseudo-features, shape ``(M, D)``, and which row of ``means`` each stands for, ``(M,)``, ascending: as many
        for each as its donor has rows.

    Raises:
        ValueError: If a shape does not fit, an old class has no mean, or there is no row of a new one.

    References:
        Petit et al., *FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning*, WACV 2023.
        https://arxiv.org/abs/2211.13131

    Example:
        >>> rows, old = fetril_features(torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([5, 5, 6]), torch.ones(1, 1))
        >>> rows.flatten().tolist(), old.tolist()
        ([0.0, 2.0], [0, 0])
    """
    require_rows(means.shape[-1], features=features, means=means)
    # waits for the device; for the data of a task at once, and no step
    if unseen := (~means.isfinite().all(dim=1)).nonzero().flatten().tolist():
        raise ValueError(
            f"`means` must hold the mean of every old class, got NaN for {unseen}: nobody has seen them. Leave them"
            " out: `means[means.isfinite().all(dim=1)]`."
        )
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"`labels` must be integers of shape ({len(features)},), one per row, got {labels.dtype} of shape"
            f" {tuple(labels.shape)}."
        )
    known = (labels >= 0) & features.isfinite().all(dim=1)
    names, places = torch.unique(labels[known], return_inverse=True)
    if not len(names):
        raise ValueError(f"`labels` must name a class of one finite row at least, got {len(labels)} that do not.")
    moments = ClassMoments(len(names), features.shape[1], features.device, scatter=False)
    features = features[known]
    moments.update(features, places)
    donors = nearest_class_center(means, moments.means)
    old, row = (donors.unsqueeze(1) == places).nonzero().unbind(dim=1)
    moved = (means.to(moments.means) - moments.means[donors]).to(features)
    return features[row] + moved[old], old
