"""Where spectral decoupling lets logits settle, and both doors to a layer of logits."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from lightning_collapse import AntiCollapseMixin, Regularizer
from lightning_collapse.losses import LinearRamp, MaxSup, SpectralDecoupling, spectral_decoupling
from tests.integration.siamese import fit, weights


@pytest.mark.parametrize(
    ("coefficient", "optimum"), [(1e-4, 6.625), (1e-3, 4.665), (3e-3, 3.767), (1e-2, 2.818), (0.1, 1.178), (1.0, 0.222)]
)
def test_a_free_logit_settles_where_the_closed_form_says(coefficient: float, optimum: float) -> None:
    margin = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    loss = SpectralDecoupling(coefficient)
    for _ in range(50):  # Newton's method
        value = functional.softplus(-margin).sum() + loss(margin)
        (slope,) = torch.autograd.grad(value, margin, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), margin)
        margin = (margin - slope / curvature).detach().requires_grad_()
    u = margin.item()
    assert u == pytest.approx(optimum, abs=5e-4)
    assert 2 * coefficient * u * (1 + torch.tensor(u).exp().item()) == pytest.approx(1, rel=1e-5)


def test_target() -> None:
    z = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(spectral_decoupling(z, target=2.5), spectral_decoupling(z - 2.5))
    assert SpectralDecoupling(target=2.5)(torch.full((4, 3), 2.5)) == 0


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-30])
def test_finite_on_constant_logits(value: float) -> None:
    z = torch.full((4, 3), value, requires_grad=True)
    loss = SpectralDecoupling()(z)
    loss.backward()
    assert loss.item() == pytest.approx(0.003 * 3 * value**2)
    assert z.grad.isfinite().all()


class Classifier(LightningModule):
    """Three classes of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.classifier = nn.Linear(16, 8), nn.Linear(8, 3)

    def logits_and_labels(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.classifier(self.encoder(batch)), batch[:, :3].argmax(dim=1)

    def training_step(self, batch: Tensor) -> Any:
        return functional.cross_entropy(*self.logits_and_labels(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MixedClassifier(AntiCollapseMixin, Classifier):
    def __init__(self, loss: Any, labels: bool) -> None:
        super().__init__()
        self.set_regularizers({"loss": loss})
        self.labels = labels

    def training_step(self, batch: Tensor) -> Any:
        logits, labels = self.logits_and_labels(batch)
        added = self.anti_collapse_loss(logits, labels) if self.labels else self.anti_collapse_loss(logits)
        return functional.cross_entropy(logits, labels) + added


@pytest.mark.parametrize("make", [SpectralDecoupling, MaxSup])
def test_both_doors_to_a_layer_of_logits(make: type[nn.Module]) -> None:
    ramp = LinearRamp(1.0, 20.0, steps=4)
    plain, _, _ = fit(Classifier)
    callback, log, _ = fit(Classifier, Regularizer(make(), layer="classifier", weight=ramp, name="loss"))
    assert not torch.equal(weights(callback), weights(plain))
    for labels in (False, True):  # which a loss that takes none does not see
        mixed, mixed_log, _ = fit(lambda labels=labels: MixedClassifier((ramp, make()), labels))
        assert torch.equal(weights(mixed), weights(callback))
        assert mixed_log.rows == log.rows
    (term,) = make().coefficients
    assert set(log.rows[0][1]) == {"regularizer/loss/value", f"regularizer/loss/{term}"}


def test_smaller_logits_with_it() -> None:
    sizes = []
    for loss in (SpectralDecoupling(0.0), SpectralDecoupling(1.0)):
        model, _, _ = fit(lambda loss=loss: MixedClassifier(loss, labels=False), batches=100)
        rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        sizes.append(model.logits_and_labels(rows)[0].square().mean().item())
    assert sizes[1] < 0.1 * sizes[0]
