"""Output gradients: what is sent back through a model, per sample."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_collapse.penalties.support.sample_gradients import wide
from lightning_collapse.spectral.deterministic import running_sum

Estimator = Literal["exact", "sample", "empirical", "batched", "logits_reversal"]
Likelihood = Literal["categorical", "gaussian"]
IGNORED = -100
"""Label of positions that do not count, as in :func:`torch.nn.functional.cross_entropy`."""


class Columns(NamedTuple):
    """Gradients with respect to the output, each of its shape; those of one sample stand in one row.

    Attributes:
        number: How many.
        make: Returns the one of an index, at least ``float32``.
    """

    number: int
    make: Callable[[int], Tensor]


def output_columns(
    outputs: Tensor,
    labels: Tensor | None,
    estimator: Estimator,
    likelihood: Likelihood = "categorical",
    generator: torch.Generator | None = None,
) -> Columns:
    r"""Columns :math:`v_k` of which :math:`\sum_k (J^\top v_k)^2` is the diagonal of a Fisher information.

    Categorical, with :math:`p = \operatorname{softmax}(z)`: ``exact`` factors
    :math:`\operatorname{diag}(p) - pp^\top = \sum_k v_k v_k^\top` by Cholesky, into :math:`C - 1` columns;
    ``sample``, ``empirical`` and ``batched`` have one, :math:`p - e_y`, with :math:`y` drawn or given;
    ``logits_reversal`` has :math:`e_y - \operatorname{softmax}(-z)`. Gaussian of unit noise: ``exact`` has the unit
    vectors, ``sample`` normal noise, the others :math:`z - y`.

    Args:
        outputs: Logits ``(B, C)``, or ``(B, T, C)`` where a sample is a sequence; for a Gaussian any ``(B, ...)``.
        labels: Classes ``(B,)`` or ``(B, T)``, -100 where none counts; for a Gaussian of the outputs' shape.
        estimator: See above.
        likelihood: What the outputs mean.
        generator: What is drawn from, on the device of the outputs.

    Raises:
        ValueError: If shapes do not fit, or labels are missing.
    """
    z = wide(outputs.detach())
    if labels is None and estimator not in ("exact", "sample"):
        raise ValueError(
            f"`estimator={estimator!r}` needs labels, and a batch has none. Say where they are with"
            " `labels=lambda batch: ...`, or use 'exact' or 'sample'."
        )
    if likelihood == "gaussian":
        return _gaussian(z, labels, estimator, generator)
    if z.ndim not in (2, 3) or z.shape[-1] < 2 or (z.ndim == 3 and estimator == "exact"):
        raise ValueError(
            f"`estimator={estimator!r}` takes logits of shape (B, C)"
            f"{'' if estimator == 'exact' else ' or (B, T, C)'} with C of at least 2, and the model returned"
            f" {tuple(z.shape)}. Choose what counts with `outputs=lambda module, batch: ...`"
            f"{', or draw labels with estimator=' + repr('sample') if z.ndim == 3 else ''}."
        )
    if estimator == "exact":
        return _exact(z.softmax(dim=-1))
    if labels is not None and (labels.shape != z.shape[:-1] or labels.is_floating_point()):
        if estimator != "sample":
            raise ValueError(
                f"`labels` must be whole numbers of shape {tuple(z.shape[:-1])} beside outputs of shape"
                f" {tuple(z.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        labels = None
    return _single(z, labels, estimator, generator)


def norm_columns(outputs: Tensor) -> Columns:
    r"""The one column :math:`2f`, gradient of :math:`\|f\|_2^2` with respect to outputs ``(B, ...)``."""
    f = wide(outputs.detach())
    return Columns(1, lambda _: 2 * f)


def check_estimator(estimator: str, likelihood: str) -> None:
    """Refuse names that are none.

    Raises:
        ValueError: Listing those there are.
    """
    for name, value, known in (("estimator", estimator, Estimator), ("likelihood", likelihood, Likelihood)):
        if value not in get_args(known):
            raise ValueError(f"`{name}` takes one of {', '.join(map(repr, get_args(known)))}, got {value!r}.")
    if likelihood == "gaussian" and estimator == "logits_reversal":
        raise ValueError("`estimator='logits_reversal'` is about logits: it needs `likelihood='categorical'`.")


def _exact(p: Tensor) -> Columns:
    """Cholesky factor of a multinomial covariance in closed form (Tanabe & Sagae, 1992)."""
    tails = running_sum(p.flip(-1)).flip(-1)  # p_k + ... + p_C, without cancellation

    def make(k: int) -> Tensor:
        head, before, after = p[:, k], tails[:, k], tails[:, k + 1]
        tiny = torch.finfo(p.dtype).tiny
        column = torch.zeros_like(p)
        column[:, k] = (head * after / before.clamp_min(tiny)).sqrt()
        scale = head.sqrt() / before.clamp_min(tiny).sqrt() / after.clamp_min(tiny).sqrt()
        column[:, k + 1 :] = -p[:, k + 1 :] * scale.unsqueeze(1)
        return column

    return Columns(p.shape[-1] - 1, make)


def _single(z: Tensor, labels: Tensor | None, estimator: Estimator, generator: torch.Generator | None) -> Columns:
    counts = torch.ones_like(z[..., 0], dtype=torch.bool) if labels is None else labels != IGNORED
    p = (-z if estimator == "logits_reversal" else z).softmax(dim=-1)
    if estimator == "sample":
        cumulative = running_sum(p)
        drawn = torch.rand(z.shape[:-1], generator=generator, device=z.device, dtype=z.dtype).unsqueeze(-1)
        classes = (cumulative < drawn * cumulative[..., -1:]).sum(dim=-1).clamp_max(z.shape[-1] - 1)
    else:
        assert labels is not None
        classes = labels.long().masked_fill(~counts, 0)
    column = p.scatter_add(-1, classes.unsqueeze(-1), torch.full_like(z[..., :1], -1.0))
    column = column * counts.unsqueeze(-1)
    return Columns(1, lambda _: column.clone())


def _gaussian(z: Tensor, labels: Tensor | None, estimator: Estimator, generator: torch.Generator | None) -> Columns:
    if estimator == "exact":

        def unit(k: int) -> Tensor:
            column = torch.zeros_like(z)
            column.view(len(z), -1)[:, k] = 1
            return column

        return Columns(z[0].numel(), unit)
    if estimator == "sample":
        noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        return Columns(1, lambda _: noise.clone())
    assert labels is not None
    if labels.numel() != z.numel():
        raise ValueError(f"`labels` must have the outputs' shape {tuple(z.shape)}, got {tuple(labels.shape)}.")
    residual = z - labels.reshape(z.shape).to(z)
    return Columns(1, lambda _: residual.clone())
