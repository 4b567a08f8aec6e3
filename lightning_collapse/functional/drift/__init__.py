"""Drift of features: distances between two samples of rows, what each reads of one law, and the equilibrium of a curve.

All names are here and not beside the other functions, for several are common words:
``from lightning_collapse.functional import drift``, then ``drift.psi(...)``.
"""

from lightning_collapse.functional.drift.cka import cka, cka_null, debiased_cka
from lightning_collapse.functional.drift.energy import energy_distance
from lightning_collapse.functional.drift.equilibrium import Equilibrium, dickey_fuller_limit, equilibrium
from lightning_collapse.functional.drift.frechet import frechet_distance, frechet_null
from lightning_collapse.functional.drift.marginals import (
    kolmogorov_smirnov,
    ks_null,
    ks_p_value,
    wasserstein1,
    wasserstein1_null,
)
from lightning_collapse.functional.drift.mmd import (
    fourier_features,
    fourier_sums,
    median_distance,
    mmd2,
    mmd2_null_deviation,
    mmd2_of_sums,
)
from lightning_collapse.functional.drift.output_kl import output_kl
from lightning_collapse.functional.drift.overlap import overlap_null, subspace_overlap, top_directions
from lightning_collapse.functional.drift.permutation import permutation_p_value, spent_level
from lightning_collapse.functional.drift.psi import psi, psi_null, psi_p_value

__all__ = [
    "Equilibrium",
    "cka",
    "cka_null",
    "debiased_cka",
    "dickey_fuller_limit",
    "energy_distance",
    "equilibrium",
    "fourier_features",
    "fourier_sums",
    "frechet_distance",
    "frechet_null",
    "kolmogorov_smirnov",
    "ks_null",
    "ks_p_value",
    "median_distance",
    "mmd2",
    "mmd2_null_deviation",
    "mmd2_of_sums",
    "output_kl",
    "overlap_null",
    "permutation_p_value",
    "psi",
    "psi_null",
    "psi_p_value",
    "spent_level",
    "subspace_overlap",
    "top_directions",
    "wasserstein1",
    "wasserstein1_null",
]
