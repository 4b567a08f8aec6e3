"""Linear algebra that is safe under any precision plugin and on any numbers."""

from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.spectral.eigenvalues import eigenvalues, eigenvectors
from lightning_collapse.spectral.entry_moments import EntryMoments, reduce_entries
from lightning_collapse.spectral.matrices import matrix_spectra
from lightning_collapse.spectral.moments import Moments, reduce_moments
from lightning_collapse.spectral.power_iteration import PowerIteration, TopSingularPair, top_singular_pair
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.sketch import GaussianSketch
from lightning_collapse.spectral.spectrum import Spectrum, singular_values, spectrum_of
from lightning_collapse.spectral.view_moments import ViewMoments, reduce_view_moments

__all__ = [
    "ClassMoments",
    "EntryMoments",
    "GaussianSketch",
    "Moments",
    "PowerIteration",
    "Spectrum",
    "TopSingularPair",
    "ViewMoments",
    "eigenvalues",
    "eigenvectors",
    "full_precision",
    "matrix_spectra",
    "reduce_entries",
    "reduce_moments",
    "reduce_view_moments",
    "singular_values",
    "spectrum_of",
    "top_singular_pair",
]
