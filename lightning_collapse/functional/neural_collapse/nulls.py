"""Nulls of neural collapse: what its measures read of features that know nothing of their classes."""

from __future__ import annotations

from math import log, nan, pi, sqrt

from lightning_collapse.functional.neural_collapse.fisher import fisher_discriminant_null
from lightning_collapse.functional.neural_collapse.nc1 import nc1_null


def collapse_nulls(n: float, num_classes: int, dim: int) -> dict[str, float]:
    r"""What features without class structure read, nearly, by the name of the measure.

    With :math:`n_c = n / C` rows in each of balanced classes of isotropic features in ``D`` dimensions:

    - ``nc1``: :func:`nc1_null`; ``fisher_ratio``: :func:`fisher_discriminant_null`, and ``log_fisher_ratio`` its
      logarithm;
    - ``cdnv``: :math:`(n_c - 1) / 2`, and ``log_cdnv`` its logarithm;
    - ``vci``: :math:`1 - D / (n - 1)`, NaN for ``n <= D + 1`` rows, of which the index reads 0 whatever they are;
    - ``between_share`` (of the variance): :math:`(C - 1) / (n - 1)`;
    - ``gnc2``, the variance: :math:`1 / (4 D)`, NaN for two classes, which have a single pair;
    - ``unc3``: :math:`1 / D`, as that of ``gnc2`` for directions in many dimensions;
    - ``gof_error``: :math:`\sqrt{2 / (\pi D)}`.

    Ours, by expected values of Wishart and beta distributions.

    Args:
        n: Rows over all classes.
        num_classes: Number of classes ``C``.
        dim: Number of features ``D``, at least 1.

    Returns:
        Numbers; NaN where there is no null.

    Example:
        >>> nulls = collapse_nulls(2000, 10, 64)
        >>> nulls["cdnv"], nulls["gnc2"], round(nulls["vci"], 3)
        (99.5, 0.00390625, 0.968)
    """
    per_class = n / num_classes if num_classes else 0.0
    cdnv = (per_class - 1) / 2 if num_classes > 1 and per_class > 1 else nan
    several = num_classes > 1
    known = several and n > num_classes + dim + 1
    fisher = fisher_discriminant_null(n, num_classes, dim) if known else nan
    return {
        "nc1": nc1_null(n, num_classes, dim),
        "cdnv": cdnv,
        "log_cdnv": log(cdnv) if cdnv > 0 else nan,
        "vci": 1 - dim / (n - 1) if n > dim + 1 and several else nan,
        "fisher_ratio": fisher,
        "log_fisher_ratio": log(fisher) if fisher > 0 else nan,
        "between_share": (num_classes - 1) / (n - 1) if n > 1 and several else nan,
        "gnc2": 1 / (4 * dim) if num_classes > 2 else nan,
        "unc3": 1 / dim if several else nan,
        "gof_error": sqrt(2 / (pi * dim)) if several else nan,
    }
