"""Permutation test of two samples by their random features, and the level that a test at every point may spend."""

from math import pi

import torch
from torch import Tensor

from lightning_collapse.functional.drift.mmd import mmd2_of_sums
from lightning_collapse.spectral.precision import full_precision


@full_precision
def permutation_p_value(x: Tensor, y: Tensor, permutations: int = 200, seed: int = 0) -> Tensor:
    r"""Share of random divisions of the pooled rows whose discrepancy is that of the samples or above.

    .. math:: p = (1 + \#\{\pi : \mathrm{MMD}^2_\pi \ge \mathrm{MMD}^2\}) / (1 + P)

    The level is exact for independent rows of one law, whatever it is. One product of matrices, on the device. No p is
    below 1 / (P + 1): at the level :func:`spent_level` of the t-th test, that takes about 1.6 t^2 over the whole level
    permutations.

    Args:
        x: Features ``(n, F)`` of :func:`fourier_features`.
        y: Features ``(m, F)``.
        permutations: How many.
        seed: Of a generator of its own; give every test another one.

    Returns:
        0-dimensional, above 0 up to 1.

    References:
        Phipson & Smyth, 2010, https://arxiv.org/abs/1603.05766; Gretton et al., JMLR 13, 2012.

    Example:
        >>> permutation_p_value(torch.eye(6)[:3], torch.eye(6)[3:]).item()
        1.0
    """
    pool, n, total = torch.cat([x, y]), len(x), len(x) + len(y)
    generator = torch.Generator(pool.device).manual_seed(seed)
    order = torch.rand(permutations, total, generator=generator, device=pool.device).argsort(dim=1)
    belongs = torch.cat([torch.arange(total, device=pool.device).unsqueeze(0), order]) < n
    sums, everything = belongs.to(pool) @ pool, pool.sum(dim=0)
    first = torch.cat([sums, sums.new_full((permutations + 1, 1), n)], dim=1)
    second = torch.cat([everything - sums, sums.new_full((permutations + 1, 1), total - n)], dim=1)
    found = mmd2_of_sums(first.double(), second.double()) if pool.device.type != "mps" else mmd2_of_sums(first, second)
    # equal divisions are equal but for rounding
    extreme = found[1:] >= found[0] - 1e-6 * found.abs().amax()
    p: Tensor = (1 + extreme.sum()) / (1 + permutations)
    return p


def spent_level(level: float, test: int) -> float:
    r"""Level of the t-th of any number of tests that together have one, :math:`6 \alpha / (\pi^2 t^2)`.

    Example:
        >>> round(sum(spent_level(0.05, t) for t in range(1, 10000)), 4)
        0.05
    """
    return 6 * level / (pi * test) ** 2
