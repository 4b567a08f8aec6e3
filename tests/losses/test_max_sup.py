"""MaxSup and the two parts of label smoothing."""

import pytest
import torch
from torch.nn import functional

from lightning_collapse.losses import LinearRamp, MaxSup, label_smoothing_terms, max_suppression

LABELS = torch.tensor([0, 3, 1, 1, 2, 4, 0, 2])


def logits() -> torch.Tensor:
    return 2 * torch.randn(8, 5, dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_label_smoothing_is_the_sum_of_its_parts(smoothing: float) -> None:
    z = logits().requires_grad_()
    terms = label_smoothing_terms(z, LABELS)
    total = terms["cross_entropy"] + smoothing * (terms["regularization"] + terms["error_amplification"])
    reference = functional.cross_entropy(z, LABELS, label_smoothing=smoothing)
    torch.testing.assert_close(total, reference, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (total, reference)))


def test_parts_are_the_sums_of_the_paper() -> None:
    z = logits()
    above = below = 0.0
    for row, label in zip(z.tolist(), LABELS.tolist(), strict=True):
        above += sum(row[label] - other for other in row if other < row[label]) / 5
        below += sum(row[label] - other for other in row if other > row[label]) / 5
    terms = label_smoothing_terms(z, LABELS)
    assert terms["regularization"].item() == pytest.approx(above / 8, rel=1e-12)
    assert terms["error_amplification"].item() == pytest.approx(below / 8, rel=1e-12)
    assert terms["error_amplification"] < 0


def test_where_all_is_right_max_sup_is_label_smoothing() -> None:
    z = logits()
    terms = label_smoothing_terms(z, z.argmax(dim=1))
    assert terms["error_amplification"] == 0
    torch.testing.assert_close(MaxSup()(z), 0.1 * terms["regularization"], rtol=1e-12, atol=0)
    # and where all is wrong label smoothing falls as the wrong logits grow, while max suppression rises
    wrong = torch.tensor([[0.0, 5.0, 0.0]])
    louder = torch.tensor([[0.0, 9.0, 0.0]])
    at = [sum(list(label_smoothing_terms(z, torch.tensor([0])).values())[1:]) for z in (wrong, louder)]
    assert at[1] < at[0] < 0
    assert max_suppression(louder) > max_suppression(wrong)


def test_gradient_table() -> None:
    z = torch.tensor([[1.0, 4.0, 2.0, 0.0], [3.0, 3.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (2 * max_suppression(z)).backward()  # of two rows
    expected = [[-0.25, 0.75, -0.25, -0.25], [0.25, 0.25, -0.25, -0.25]]
    torch.testing.assert_close(z.grad, torch.tensor(expected, dtype=torch.float64))


def test_published_schedule() -> None:
    epochs = 90
    ramp = LinearRamp(first=1.0, last=2.0, steps=epochs - 1)
    alpha = MaxSup().coefficients["max_suppression"]
    for epoch in (0, 1, 45, 89):
        assert alpha * ramp(epoch) == pytest.approx(0.1 + 0.1 * epoch / (epochs - 1))


def test_rows_without_a_class_are_left_out() -> None:
    z = logits()
    labels = LABELS.clone()
    labels[:3] = torch.tensor([-100, -5, -1])
    for name, value in label_smoothing_terms(z, labels).items():
        torch.testing.assert_close(value, label_smoothing_terms(z[3:], labels[3:])[name])
    assert all(value == 0 for value in label_smoothing_terms(z, torch.full((8,), -100)).values())


def test_bad_labels() -> None:
    with pytest.raises(ValueError, match=r"`labels` of `label_smoothing_terms` must be integers, got torch.float32"):
        label_smoothing_terms(logits(), LABELS.float())
    with pytest.raises(ValueError, match=r"must have shape \(8,\), one per row, got \(3,\)"):
        label_smoothing_terms(logits(), LABELS[:3])


def test_ramp_needs_steps() -> None:
    with pytest.raises(ValueError, match="`steps` must be positive, got 0"):
        LinearRamp(0.0, 1.0, steps=0)
