"""Class readings: what the statistics of the classes that were seen come to, of a classifier or of any labels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.fisher import fisher_discriminant_ratio
from lightning_collapse.metrics.neural_collapse import of_classes, of_imbalance, within_covariance
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.spectral.seen_classes import SeenClasses
from lightning_collapse.utilities.features import evenly

ROOM, NUMBERS = 8192, 1 << 23
MIN_COUNT = 2  # rows of a class: one has no variance


def room_for(classes: int, dim: int) -> int:
    """Classes that statistics are kept of at the same time: 8192, or as many as have means of 8 million numbers.

    Example:
        >>> room_for(10, 512), room_for(50_000, 256), room_for(50_000, 4096)
        (10, 8192, 2048)
    """
    return min(classes, ROOM, NUMBERS // dim)


def classifier_readings(found: SeenClasses, weight: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """Readings of a classifier's inputs, of whose weight only the rows of seen classes are read.

    Args:
        found: Statistics.
        weight: Of the classifier, ``(V, D)``.
        seen: Rows of each class so far, ``(V,)``: which classes are rare. Of more than a window has room for an even
            selection counts.
    """
    moments = found.moments
    values = of_classes(moments, weight[found.classes].to(moments.shift), MIN_COUNT, found.rank)
    ever = evenly(seen.nonzero().flatten(), room_for(*weight.shape))
    ever = ever if len(ever) else found.classes
    sizes, rows = seen.to(moments.count), weight[ever].to(moments.shift)
    values |= of_imbalance(moments, MIN_COUNT, sizes[found.classes], rows, sizes[ever])
    return values | _beside(found)


def label_readings(found: SeenClasses) -> dict[str, Tensor]:
    """Readings of any features and labels, without a classifier."""
    moments = found.moments
    values = of_classes(moments, None, MIN_COUNT, found.rank)
    counts = torch.where(moments.count >= MIN_COUNT, moments.count, 0.0)
    within = within_covariance(moments, counts)
    ratio = fisher_discriminant_ratio(moments.means, within, counts, resolution=moments.resolution)
    values |= {"log_fisher_ratio": ratio.log(), "between_share": _between_share(moments, within, counts)}
    return values | _beside(found)


def _between_share(moments: ClassMoments, within: Tensor, counts: Tensor) -> Tensor:
    share = counts / counts.sum()
    means = torch.where((counts > 0).unsqueeze(1), moments.means, 0.0)
    center = share @ means
    between = share @ torch.where((counts > 0).unsqueeze(1), means - center, 0.0).square().sum(dim=1)
    return between / (between + within.trace())


def _beside(found: SeenClasses) -> dict[str, Tensor]:
    moments = found.moments
    strays = (moments.invalid - found.crowded).clamp_min(0)
    return {
        "nonfinite": moments.nonfinite,
        "crowded": found.crowded,
        "labelled": moments.count.sum(),
        "strays": strays,
    }
