"""Closed forms of the rotation trick, the losses, and the rule of dead codes."""

import math

import pytest
import torch

from lightning_collapse.functional import (
    code_expiry,
    ema_codes,
    quantization_loss,
    rotation_trick,
)


def pairs(count=200, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, width, dtype=torch.float64, generator=generator).unbind()


def gradients(function, features, codes, slopes):
    features = features.clone().requires_grad_()
    out = function(features, codes)
    (found,) = torch.autograd.grad((out * slopes).sum(), features)
    return out.detach(), found


def cosine(one, other):
    return torch.cosine_similarity(one, other, dim=-1)


def test_the_angle_of_the_gradient_is_kept_and_its_length_scaled():
    features, codes = pairs()
    slopes = pairs(seed=1)[0]
    out, found = gradients(rotation_trick, features, codes, slopes)
    assert torch.equal(out, codes)
    torch.testing.assert_close(cosine(found, features), cosine(slopes, codes), rtol=0, atol=1e-12)
    ratio = codes.norm(dim=1) / features.norm(dim=1)
    torch.testing.assert_close(found.norm(dim=1), ratio * slopes.norm(dim=1), rtol=1e-12, atol=0)


def test_the_map_is_the_scaled_rotation_of_a_dense_reference():
    features, codes = pairs(count=3)
    for row, code in zip(features, codes, strict=True):
        e, q = row / row.norm(), code / code.norm()
        w = (e + q) / (e + q).norm()
        rotation = torch.eye(5, dtype=torch.float64) - 2 * torch.outer(w, w) + 2 * torch.outer(q, e)
        torch.testing.assert_close(torch.linalg.det(rotation), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(code.norm() / row.norm() * rotation @ row, code)
        jacobian = torch.autograd.functional.jacobian(lambda z, code=code: rotation_trick(z, code), row)
        torch.testing.assert_close(jacobian, code.norm() / row.norm() * rotation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_opposite_and_zero_vectors_are_straight_through(dtype):
    row = torch.tensor([3.0, 4.0, 0.0], dtype=dtype)
    cases = [(row, -row), (row, -2 * row * (1 + 1e-9)), (0 * row, row), (row, 0 * row), (0 * row, 0 * row)]
    for features, codes in cases:
        slopes = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
        out, found = gradients(rotation_trick, features.unsqueeze(0), codes.unsqueeze(0), slopes)
        assert torch.equal(out.to(dtype), codes.unsqueeze(0))
        assert torch.equal(found, slopes)
    out, found = gradients(rotation_trick, row.unsqueeze(0), row.unsqueeze(0), slopes)  # a batch of one, and no angle
    torch.testing.assert_close(found, slopes)


def test_losses_and_their_gradients():
    features, codes = (tensor.requires_grad_() for tensor in pairs(count=4))
    distance = (features - codes).square().mean().detach()
    for commitment, codebook in ((0.25, 1.0), (1.0, 0.25), (0.25, 0.0)):
        loss = quantization_loss(features, codes, commitment, codebook)
        torch.testing.assert_close(loss.detach(), (commitment + codebook) * distance)
        moves = torch.autograd.grad(loss, [features, codes], allow_unused=True)
        step = 2 * (features - codes).detach() / features.numel()
        torch.testing.assert_close(moves[0], commitment * step)
        torch.testing.assert_close(moves[1] if codebook else 0 * step, -codebook * step)


def test_running_means_and_the_rule_of_dead_codes():
    counts, sums = torch.tensor([4.0, 0.0]), torch.tensor([[8.0], [0.0]])
    assert torch.equal(ema_codes(counts, sums, eps=0.0), torch.tensor([[2.0], [0.0]]))
    smoothed = 5 / (4 + 2) * 4  # with eps 1
    torch.testing.assert_close(ema_codes(counts, sums, eps=1.0), torch.tensor([[8 / smoothed], [0.0]]))
    for mean, decay, expected in (
        (0.0625, 0.8, (0.00625, 0.99375)),
        (16.0, 0.8, (1.6, 0.8)),
        (99.0, 0.99, (2.0, 0.99)),
    ):
        found = code_expiry(torch.tensor(mean, dtype=torch.float64), decay)
        assert [value.item() for value in found] == pytest.approx(expected)
        kept = math.ceil(math.log(found[0] / mean) / math.log(found[1]))
        assert kept >= 10  # steps without a row that a new code has
