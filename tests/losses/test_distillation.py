"""Distillation losses: references, limits, grown heads, precision."""

import pytest
import torch
from torch.nn import functional

from lightning_collapse.losses import TooFewRowsError, distillation_loss, feature_distillation_loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_is_the_divergence_of_torch(temperature):
    student, teacher = torch.randn(2, 9, 5, dtype=torch.float64)
    p, q = (x.div(temperature).log_softmax(dim=1) for x in (teacher, student))
    wanted = functional.kl_div(q, p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(distillation_loss(student, teacher, temperature), wanted)


def test_is_the_cross_entropy_of_the_paper_up_to_a_constant():
    """Roots of recorded probabilities, normalized anew, as equation 2 and 3 of the paper have them."""
    student, teacher = torch.randn(2, 9, 5, dtype=torch.float64)
    student.requires_grad_()
    recorded, current = (x.softmax(dim=1).sqrt() for x in (teacher, student))
    y, y_hat = recorded / recorded.sum(dim=1, keepdim=True), current / current.sum(dim=1, keepdim=True)
    paper = -(y * y_hat.log()).sum(dim=1).mean()
    entropy = -(y * y.log()).sum(dim=1).mean()
    loss = distillation_loss(student, teacher)
    torch.testing.assert_close(loss, paper - entropy)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, paper)))


@pytest.mark.parametrize("loss", [distillation_loss, feature_distillation_loss])
def test_second_derivative(loss):
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, teacher), student.requires_grad_())


def test_agreement_reads_zero_with_zero_gradient():
    for loss in (distillation_loss, feature_distillation_loss):
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        value = loss(x, x.detach())
        assert value.item() == pytest.approx(0, abs=1e-15)
        (gradient,) = torch.autograd.grad(value, x)
        assert gradient.abs().max() < 1e-15


def test_hot_softmax_compares_centered_logits():
    """T^2 KL -> |z - t|^2 / (2 K), both centered."""
    student, teacher = torch.randn(2, 50, 6, dtype=torch.float64)
    student, teacher = (x - x.mean(dim=1, keepdim=True) for x in (student, teacher))
    limit = (student - teacher).square().sum(dim=1).mean() / (2 * 6)
    torch.testing.assert_close(1e6 * distillation_loss(student, teacher, 1e3), limit, rtol=1e-2, atol=0)


def test_new_classes_do_not_count():
    student, teacher = torch.randn(9, 7, requires_grad=True), torch.randn(9, 5)
    value = distillation_loss(student, teacher)
    assert torch.equal(value, distillation_loss(student[:, :5], teacher))
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient[:, :5].abs().min() > 0
    assert not gradient[:, 5:].any()


def test_a_class_that_is_masked_in_both_does_not_count():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    masked = [torch.cat([x, torch.full((4, 1), -torch.inf)], dim=1) for x in (student, teacher)]
    masked[0].requires_grad_()
    value = distillation_loss(*masked)
    torch.testing.assert_close(value, distillation_loss(student, teacher))
    assert torch.autograd.grad(value, masked[0])[0].isfinite().all()


def test_cosine_distance():
    x, y = torch.randn(2, 8, 3)
    wanted = (1 - functional.cosine_similarity(x, y)).mean()
    torch.testing.assert_close(feature_distillation_loss(x, y), wanted)
    torch.testing.assert_close(feature_distillation_loss(3 * x, 0.1 * y), wanted)
    assert feature_distillation_loss(x, -x).item() == pytest.approx(2)
    zero = torch.zeros(1, 3, requires_grad=True)
    value = feature_distillation_loss(zero, y[:1])
    assert value.item() == 1
    assert not torch.autograd.grad(value, zero)[0].any()


@pytest.mark.parametrize("loss", [distillation_loss, feature_distillation_loss])
def test_half_in_float_out(loss):
    student, teacher = torch.randn(2, 16, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student.requires_grad_(), teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float()))
    value.backward()
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("loss", [distillation_loss, feature_distillation_loss])
def test_gradient(loss):
    teacher = torch.randn(4, 3, dtype=torch.float64)
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)
    teacher.requires_grad_()
    assert torch.autograd.grad(loss(student, teacher), teacher, allow_unused=True) == (None,)


def test_misuse_is_refused():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        distillation_loss(x, x, temperature=0)
    with pytest.raises(ValueError, match=r"`logits` \(4, 3\) and `teacher_logits` \(4, 5\)"):
        distillation_loss(x, torch.randn(4, 5))
    with pytest.raises(ValueError, match="one shape"):
        distillation_loss(x, x[:2])
    with pytest.raises(ValueError, match="one shape"):
        feature_distillation_loss(torch.randn(4, 5), x)
    with pytest.raises(ValueError, match="shape"):
        feature_distillation_loss(x[0], x[0])
    for loss in (distillation_loss, feature_distillation_loss):
        with pytest.raises(TooFewRowsError):
            loss(x[:0], x[:0])
