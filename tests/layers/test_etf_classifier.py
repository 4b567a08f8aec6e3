"""The simplex, and the two heads made of it."""

import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_collapse.functional import etf_error
from lightning_collapse.layers import ETFClassifier, FedETFHead, simplex_etf


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 5), (4, 3), (10, 64), (1000, 999), (1000, 2048)])
def test_gram_matrix(classes: int, dim: int) -> None:
    rows = simplex_etf(classes, dim)
    expected = classes / (classes - 1) * (torch.eye(classes, dtype=torch.float64) - 1 / classes)
    torch.testing.assert_close(rows @ rows.T, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.sum(dim=0), torch.zeros(dim, dtype=torch.float64), rtol=0, atol=1e-10)
    weight = ETFClassifier(dim, classes).weight
    torch.testing.assert_close(weight @ weight.T, expected.float(), rtol=0, atol=1e-6)
    assert etf_error(weight, center=False) < 1e-6


def test_the_seed_decides_and_nothing_else_is_drawn_from() -> None:
    before = torch.random.get_rng_state()
    assert torch.equal(simplex_etf(5, 8), simplex_etf(5, 8))
    assert not torch.equal(simplex_etf(5, 8), simplex_etf(5, 8, seed=1))
    ETFClassifier(8, 5)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("classes", "dim"), [(1, 8), (5, 3)])
def test_too_many_classes(classes: int, dim: int) -> None:
    for make in (lambda: simplex_etf(classes, dim), lambda: ETFClassifier(dim, classes)):
        with pytest.raises(ValueError, match=rf"from 2 to `dim` \+ 1, got {classes} classes in {dim} dimensions. Put"):
            make()
    with pytest.raises(ValueError, match="got 5 classes in 3 dimensions"):
        FedETFHead(16, 5, projection=3)


@pytest.mark.parametrize("make", [lambda: ETFClassifier(6, 4, seed=3), lambda: FedETFHead(6, 4, scale=5.0, seed=3)])
def test_is_filled_after_the_meta_device(make: Callable[[], nn.Module]) -> None:
    """As sharded training does: every module fills in what it holds."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    for state in model.state_dict().values():
        state.fill_(7)  # what was in memory
    torch.manual_seed(0)
    for module in model.modules():
        module.reset_parameters()
    torch.manual_seed(0)
    torch.testing.assert_close(model.state_dict(), make().state_dict(), rtol=0, atol=0)


def test_logits_are_cosines() -> None:
    classifier = ETFClassifier(6, 4)
    features = torch.randn(3, 5, 6)
    expected = torch.cosine_similarity(features.unsqueeze(-2), classifier.weight, dim=-1)
    torch.testing.assert_close(classifier(features), expected)
    torch.testing.assert_close(classifier(1e-12 * features), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_finite_at_any_length(dtype: torch.dtype, scale: float) -> None:
    classifier = ETFClassifier(6, 4)
    features = (scale * torch.randn(5, 6)).to(dtype).requires_grad_()
    embedded = classifier.embed(features)
    assert embedded.dtype == torch.float32
    lengths = torch.full((5,), float(scale > 0))
    torch.testing.assert_close(embedded.norm(dim=1), lengths, rtol=1e-5, atol=0)
    logits = classifier(features)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("make", [lambda: ETFClassifier(6, 4), lambda: FedETFHead(6, 4)])
def test_precisions_and_compilation(make: type[nn.Module]) -> None:
    layer, features = make(), torch.randn(5, 6)
    exact = layer(features)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(features).float(), exact, rtol=0.02, atol=0.02)
    half = layer.bfloat16()
    assert half(features.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(features.bfloat16()).float(), exact, rtol=0.03, atol=0.03)


def test_classifier_is_not_for_the_optimizer_but_saved() -> None:
    classifier = ETFClassifier(6, 4, seed=3)
    assert not list(classifier.parameters())
    file = io.BytesIO()
    torch.save(classifier.state_dict(), file)
    file.seek(0)
    other = ETFClassifier(6, 4)
    assert not torch.equal(other.weight, classifier.weight)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.weight, classifier.weight)
    assert repr(classifier) == "ETFClassifier(dim=6, num_classes=4)"


def test_what_an_unscaled_head_can_be_sure_of() -> None:
    classifier = ETFClassifier(9, 10)
    best = classifier(classifier.weight).softmax(dim=1).diagonal()
    closed_form = 1 / (1 + 9 * math.exp(-10 / 9))
    torch.testing.assert_close(best, torch.full((10,), closed_form))
    assert closed_form == pytest.approx(0.252, abs=5e-4)


def test_federated_head() -> None:
    head = FedETFHead(12, 4, projection=8, scale=10.0)
    assert {name for name, _ in head.named_parameters()} == {"scale", "projection.weight", "projection.bias"}
    features = torch.randn(5, 12)
    torch.testing.assert_close(head(features), 10 * head.classifier(head.projection(features)))
    assert FedETFHead(12, 4).projection.out_features == 4
    head(features).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


def test_features_that_are_no_numbers_do_not_look_like_zeros() -> None:
    features = torch.ones(2, 8)
    features[1, 0] = torch.nan
    logits = ETFClassifier(8, 3)(features)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_the_default_device_draws_no_rotation() -> None:
    # the generator is the CPU's: under `torch.device("cuda")`, as in `configure_model`, drawing elsewhere raises
    with torch.device("meta"):
        rows, classifier = simplex_etf(3, 4), ETFClassifier(4, 3)
    assert torch.equal(rows, simplex_etf(3, 4))
    assert classifier.weight.is_meta


def test_a_whole_number_is_a_scale() -> None:
    assert FedETFHead(8, 3, scale=10).scale == 10.0
