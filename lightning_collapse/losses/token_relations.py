"""Token-relation distillation (TinyMIM): tokens look at each other as they do in a teacher's last layers."""

import math

import torch
from torch import Tensor, nn

from lightning_collapse.losses.support.products import product
from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_finite


@full_precision
def token_relation_terms(
    query: Tensor, key: Tensor, value: Tensor, teacher_query: Tensor, teacher_key: Tensor, teacher_value: Tensor
) -> dict[str, Tensor]:
    r"""The two terms of :class:`TokenRelationDistillation`, unweighted.

    In logarithms throughout, where the released code takes that of a softmax, which underflows. A student whose tokens
    are all equal reads :math:`\ln T` less the mean entropy of the teacher's rows: the null, which zeros in place of the
    student's tensors read too.

    Collective: every process must call it; one all-reduce of 4 numbers.

    Args:
        query: Of the student's layer, shape ``(B, H, T, D)``; ``B`` may differ between processes.
        key: The same shape.
        value: The same shape.
        teacher_query: Shape ``(B, H, T, E)``, constants; as many heads and tokens, of any width.
        teacher_key: The same shape.
        teacher_value: The same shape.

    Returns:
        Scalars ``query_key`` and ``value_value`` in nats, at least ``float32``, 0 or more, of the global batch.

    Raises:
        ValueError: If shapes do not fit; a student whose layer has another number of heads needs one with as many.
        TooFewRowsError: If there is no sample over all processes.

    Example:
        >>> x = torch.eye(3).view(1, 1, 3, 3)
        >>> terms = token_relation_terms(x, 0 * x, x, x, 5 * x, x)
        >>> {name: round(value.item(), 4) for name, value in terms.items()}
        {'query_key': 0.7033, 'value_value': 0.0}
    """
    student = _relations(query, key, value)
    with torch.no_grad():
        teacher = _relations(teacher_query, teacher_key, teacher_value)
    if student.shape != teacher.shape:
        raise ValueError(
            f"Student and teacher must have as many samples, heads and tokens, got {tuple(query.shape[:3])} and"
            f" {tuple(teacher_query.shape[:3])}. Give the student's layer the teacher's number of heads."
        )
    divergences = (teacher.exp() * (teacher - student)).sum(dim=-1).mean(dim=(-2, -1))
    means = mean_of_rows("token_relation_terms", divergences.mT)
    return dict(zip(("query_key", "value_value"), means.unbind(), strict=True))


def _relations(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Logarithms of both relations, ``(2, B, H, T, T)``."""
    for name, of in (("query", query), ("key", key), ("value", value)):
        if of.ndim != 4 or of.shape != query.shape or not of.is_floating_point():
            raise ValueError(
                f"Query, key and value must be floating point of one shape (B, H, T, D), got {of.dtype} of shape"
                f" {tuple(of.shape)} of the {name}. Split the heads: `x.unflatten(-1, (H, -1)).transpose(1, 2)`."
            )
    left, right = torch.stack([query, value]), torch.stack([key, value])
    scores = product(left, right.mT) / math.sqrt(query.shape[-1])
    return scores.log_softmax(dim=-1)


class TokenRelationDistillation(nn.Module):
    r"""Divergence of the relations of tokens from a teacher's, of queries to keys and of values to values.

    .. math:: \operatorname{KL}\Big(\operatorname{softmax}\tfrac{\tilde Q \tilde K^\top}{\sqrt{E}} \,\Big\|\,
        \operatorname{softmax}\tfrac{Q K^\top}{\sqrt{D}}\Big) + \text{the same of } V V^\top

    the mean over samples, heads and tokens. Plot what equal tokens would read beside it, see
    :func:`token_relation_terms`. As published the teacher is a masked autoencoder, the layer its last of 12 or the 18th
    of 24, and the student's last block, without drop path, has the teacher's number of heads. It costs two maps of all
    tokens, of that layer alone. Six tensors, ``loss(q, k, v, teacher_q, teacher_k, teacher_v)``, also by the mixin.

    Args:
        query_key: Coefficient of the relations of queries to keys; published value.
        value_value: Coefficient of those of values to values; published value.

    Raises:
        ValueError: If a coefficient is not finite.

    References:
        Ren et al., *TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models*, CVPR 2023.
        https://arxiv.org/abs/2301.01296, code at https://github.com/OliverRensu/TinyMIM.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 6, 8)
        >>> round(TokenRelationDistillation()(q, k, v, q, k, v).item(), 4)
        0.0
    """

    views = 6

    def __init__(self, query_key: float = 1.0, value_value: float = 1.0) -> None:
        super().__init__()
        require_finite(query_key=query_key, value_value=value_value)
        self.coefficients = {"query_key": query_key, "value_value": value_value}

    def forward(self, *tensors: Tensor) -> Tensor:
        """Weighted sum of :func:`token_relation_terms`, whose six tensors it takes."""
        terms = token_relation_terms(*tensors)
        return sum((self.coefficients[name] * term for name, term in terms.items()), start=tensors[0].new_zeros(()))
