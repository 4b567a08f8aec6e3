"""What is written is exported: a measure or a metric in any file is one by name, or is listed here as a helper."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_collapse
from lightning_collapse import functional, metrics
from lightning_collapse.utilities.registry import MEASURES

ROOT = Path(lightning_collapse.__file__).parent
HELPERS: dict[str, set[str]] = {
    "functional/assignment.py": {"assignment_counts", "perplexity"},
    "functional/attention_entropy.py": {"check_attention", "entropy_sums", "normalize"},
    "functional/attention_logits.py": {"extremes_of_call"},
    "functional/attention_rows.py": {
        "EntropyRows",
        "entropies_of_call",
        "logits_of_call",
        "rows_of_call",
        "rows_of_logits",
        "rows_of_masked_logits",
        "scale_of",
        "visibility",
    },
    "functional/codebooks/drift.py": {"moved_idle_codes"},
    "functional/factors/linear_probe.py": {"probe_errors"},
    "functional/gradient_noise.py": {"noise_ratio"},
    "functional/intrinsic_dimension.py": {"local_dimension_of_distances", "two_nn_of_distances"},
    "functional/isotropic_null.py": {"marchenko_pastur_quantiles"},
    "functional/lidar.py": {"lidar_of_moments", "stack_views"},
    "functional/marchenko_pastur.py": {"marchenko_pastur_cdf"},
    "functional/mean_mode_gradient.py": {"mean_mode_parts", "mean_mode_product", "mean_mode_square"},
    "functional/non_finite.py": {"bits_of_headroom"},
    "functional/neural_collapse/cdnv.py": {"over_pairs"},
    "functional/neural_collapse/class_means.py": {
        "CenteredMeans",
        "centered_means",
        "in_input_precision",
        "PairBlock",
        "pair_blocks",
        "present_rows",
        "rounding_variance",
        "unit",
    },
    "functional/neural_collapse/gnc2.py": {"log_kernel"},
    "functional/neural_collapse/nc1.py": {"within_over_between"},
    "functional/neural_collapse/nc2.py": {"angle_error", "frame_distance", "norm_variation"},
    "functional/neural_collapse/nc3.py": {"cosine_variance", "duality_distance"},
    "functional/neural_collapse/nc4.py": {"agreement_counts", "agreement_of_classifier"},
    "functional/neural_collapse/vci.py": {"whitened"},
    "functional/output_entropy.py": {"output_readings", "output_sums"},
    "functional/prototypes/scores.py": {"require_rows", "unit_rows"},
    "functional/regression_collapse.py": {"rank_of_basis", "unit_rows"},
    "functional/regularization/orthogonality.py": {"floor", "gap", "tall_matrix", "unit_vector"},
    "functional/routing.py": {"routing_readings", "routing_sums"},
    "functional/spectral_alignment.py": {"cosines", "diversity_of_counts", "sign_counts"},
    "functional/tail_learning/contributing.py": {"contribution_readings", "contribution_sums"},
    "functional/token_similarity.py": {"TokenGroups", "capped_ratio", "mode_norms"},
    "functional/views.py": {"view_statistics"},
    "metrics/linear_probe.py": {"SplitMoments"},
    "metrics/neural_collapse.py": {"measures", "of_classes", "of_imbalance", "of_means", "within_covariance"},
    "metrics/spectral_alignment.py": {"alignment_histogram"},
    "metrics/sums.py": {"Statistics", "StatisticsMetric", "SumsMetric"},
}
"""Names without an underscore that other files of ours share and users do not need, by file."""


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a file, from its text: a file that nobody imports is read too."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node


def public(path: Path) -> set[str]:
    return {node.name for node in definitions(path) if not node.name.startswith("_")}


def is_measure(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any("register_measure" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("package", [functional, metrics], ids=lambda package: package.__name__.rpartition(".")[2])
def test_every_public_name_is_exported_or_a_helper(package) -> None:
    folder = package.__name__.rpartition(".")[2]
    files = {str(path.relative_to(ROOT)): public(path) for path in (ROOT / folder).rglob("*.py")}
    assert len(files) > 5
    folders = [value for value in vars(package).values() if inspect.ismodule(value) and hasattr(value, "__path__")]
    exported = {*package.__all__}.union(*(value.__all__ for value in folders))
    missing = {name: left for name, found in files.items() if (left := found - exported - HELPERS.get(name, set()))}
    assert not missing, "export them in `__init__`, or list them above as helpers"
    listed = {name: helpers for name, helpers in HELPERS.items() if name.startswith(folder)}
    assert all(helpers <= files.get(name, set()) for name, helpers in listed.items()), "no longer there"
    assert not {*package.__all__} & set().union(*listed.values())


def test_every_registered_measure_is_exported() -> None:
    written = {node.name for path in ROOT.rglob("*.py") for node in definitions(path) if is_measure(node)}
    assert written == set(MEASURES)
    assert written <= {*functional.__all__, *functional.weights.__all__}


def test_neural_collapse_exports_what_the_package_does() -> None:
    assert set(functional.neural_collapse.__all__) <= set(functional.__all__)


def test_a_measure_that_is_forgotten_is_found(tmp_path: Path) -> None:
    path = tmp_path / "forgotten.py"
    path.write_text("@register_measure(range='0 to 1')\ndef sparsity(values): ...\n\n\ndef _inner(values): ...\n")
    assert public(path) == {"sparsity"}
    assert [node.name for node in definitions(path) if is_measure(node)] == ["sparsity"]
