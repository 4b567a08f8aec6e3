"""Token-relation distillation: against torch's divergence, the null of equal tokens, widths, sharp students."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse import AntiCollapseMixin
from lightning_collapse.losses import TokenRelationDistillation, TooFewRowsError, token_relation_terms
from tests.continual import Learner


def tensors(width: int = 4, seed: int = 0, batch: int = 3, heads: int = 2, tokens: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, batch, heads, tokens, width, generator=generator, dtype=torch.float64))


def maps(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.mT / math.sqrt(left.shape[-1])).softmax(dim=-1)


def test_is_the_divergence_of_torch() -> None:
    student, teacher = tensors(4), tensors(6, seed=1)
    terms = token_relation_terms(*student, *teacher)
    for name, (left, right) in {"query_key": (0, 1), "value_value": (2, 2)}.items():
        found = maps(student[left], student[right]).log()
        wanted = nn.functional.kl_div(found, maps(teacher[left], teacher[right]), reduction="none").sum(-1).mean()
        torch.testing.assert_close(terms[name], wanted)
    assert TokenRelationDistillation(2.0, 0.5)(*student, *teacher).item() == pytest.approx(
        2 * terms["query_key"].item() + 0.5 * terms["value_value"].item()
    )


def test_equal_tokens_read_the_null() -> None:
    student, teacher = tensors(4), tensors(6, seed=1)
    equal = [x[:, :, :1].expand_as(x) for x in student]
    terms, zeros = (token_relation_terms(*some, *teacher) for some in (equal, [0 * x for x in student]))
    for name, (left, right) in {"query_key": (0, 1), "value_value": (2, 2)}.items():
        rows = maps(teacher[left], teacher[right])
        entropy = -(rows * rows.log()).sum(-1).mean()
        assert terms[name].item() == pytest.approx(math.log(5) - entropy.item(), rel=1e-12)
        torch.testing.assert_close(zeros[name], terms[name])


def test_gradient_reaches_the_student_alone_and_stays_finite_where_a_softmax_underflows() -> None:
    student = [x.requires_grad_() for x in tensors(2, tokens=3, batch=2)]
    teacher = [x.requires_grad_() for x in tensors(2, seed=1, tokens=3, batch=2)]
    loss = TokenRelationDistillation()
    assert torch.autograd.gradcheck(lambda *x: loss(*x, *teacher), student)
    assert torch.autograd.grad(loss(*student, *teacher), teacher, allow_unused=True) == (None,) * 3
    sharp = [(1e3 * x.detach()).float().requires_grad_() for x in student]
    value = loss(*sharp, *(x.float() for x in teacher))
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, sharp))
    halves = [x.detach().bfloat16() for x in (*student, *teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*halves)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(*(x.float() for x in halves)))


def test_through_the_mixin() -> None:
    class Student(AntiCollapseMixin, Learner):
        def __init__(self) -> None:
            super().__init__()
            self.set_regularizers({"relations": (0.5, TokenRelationDistillation())})

    six = (*tensors(4), *tensors(6, seed=1))
    torch.testing.assert_close(Student().anti_collapse_loss(*six), 0.5 * TokenRelationDistillation()(*six))


def test_misuse_is_refused() -> None:
    good = tensors()
    with pytest.raises(ValueError, match=r"got \(3, 2, 5\) and \(3, 4, 5\). Give the student's layer the teacher's"):
        token_relation_terms(*good, *tensors(heads=4))
    with pytest.raises(ValueError, match=r"one shape \(B, H, T, D\), got .* of shape \(3, 2, 5, 3\) of the key"):
        token_relation_terms(good[0], good[1][..., :3], good[2], *good)
    with pytest.raises(ValueError, match=r"got torch.float64 of shape \(2, 5, 4\) of the query. Split the heads"):
        token_relation_terms(*(x[0] for x in good), *good)
    with pytest.raises(TooFewRowsError):
        token_relation_terms(*(x[:0] for x in good * 2))
    with pytest.raises(ValueError, match="`query_key` must be finite, got nan"):
        TokenRelationDistillation(math.nan)
