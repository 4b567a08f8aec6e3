"""Routing of a mixture of experts: how evenly tokens are spread over experts, and whether these can be told apart."""

from __future__ import annotations

from math import exp, log, nan, sqrt
from typing import Literal

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision

Scores = Literal["softmax", "sigmoid"]
"""What makes the gates of a router's logits."""
SUMS = ("tokens", "choices", "z", "squares", "entropy", "margin", "nonfinite")
"""Of tokens, before the counts and the mass of every expert."""


def load_cv2_null(tokens: float, experts: int, k: float) -> float:
    r"""Squared coefficient of variation of the load that a fair router has over so many independent tokens.

    .. math:: \mathbb E\,\mathrm{CV}^2 = \frac{E - k}{k\,T}

    Tokens of a sequence are not independent: where half of them share an expert of their sequence of 64, it is 16
    times as much.

    Args:
        tokens: Number of tokens ``T``.
        experts: Number of experts ``E``.
        k: Experts per token.

    Returns:
        0 or above; NaN without a token.

    Example:
        >>> round(load_cv2_null(1024, 64, 8), 5), round(load_cv2_null(1024, 64, 1), 4)
        (0.00684, 0.0615)
    """
    return max(experts - k, 0.0) / (k * tokens) if tokens > 0 and k > 0 else nan


def effective_experts_null(tokens: float, experts: int, k: float) -> float:
    r"""What :math:`\exp H` of the load is for a fair router, :math:`E \exp(-(E - k) / (2 k T))`; NaN without a token.

    Example:
        >>> round(effective_experts_null(1024, 64, 1), 1)
        62.1
    """
    return experts * exp(-load_cv2_null(tokens, experts, k) / 2)


def max_load_null(tokens: float, experts: int, k: float) -> float:
    r"""Largest over mean load of a fair router, about :math:`1 + \sqrt{2 \ln E\,(E - k) / (k T)}`, slightly high.

    Example:
        >>> round(max_load_null(1024, 64, 8), 2), round(max_load_null(1024, 64, 1), 2)
        (1.24, 1.72)
    """
    return 1 + sqrt(2 * log(experts) * load_cv2_null(tokens, experts, k))


def dead_experts_null(tokens: float, experts: int, k: float) -> float:
    r"""How many experts a fair router leaves without a token, :math:`E (1 - k / E)^T`; NaN without a token.

    Example:
        >>> f"{dead_experts_null(1024, 64, 1):.0e}"
        '6e-06'
    """
    return experts * (1 - min(k / experts, 1.0)) ** tokens if tokens > 0 else nan


@full_precision
def load_cv2(counts: Tensor) -> Tensor:
    r"""Squared coefficient of variation of the experts' loads, :math:`\overline{(c - \bar c)^2} / \bar c^2` [1].

    Args:
        counts: Tokens of every expert, shape ``(..., E)``.

    Returns:
        Shape ``(...)``, between 0 (all alike) and ``E - 1`` (one has them all), beside :func:`load_cv2_null`; NaN
        without a token.

    References:
        [1] Shazeer et al., *Outrageously Large Neural Networks*, 2017, https://arxiv.org/abs/1701.06538.

    Example:
        >>> load_cv2(torch.tensor([[5.0, 5.0, 5.0, 5.0], [20.0, 0.0, 0.0, 0.0]]))
        tensor([0., 3.])
    """
    mean = counts.mean(dim=-1)
    return (counts - mean.unsqueeze(-1)).square().mean(dim=-1) / mean.square()


@full_precision
def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the load in nats, shape ``(...)`` from ``(..., E)``, between 0 and ``log E``; NaN without a token.

    Example:
        >>> load_entropy(torch.tensor([[5.0, 5.0], [10.0, 0.0]])).exp()
        tensor([2., 1.])
    """
    share = counts / counts.sum(dim=-1, keepdim=True)
    entropy: Tensor = -torch.xlogy(share, share).sum(dim=-1)
    return entropy


@full_precision
def balance_loss(counts: Tensor, mass: Tensor) -> Tensor:
    r"""Loss of balance between experts, :math:`E \sum_e f_e \bar P_e` [1], without a coefficient.

    Args:
        counts: Tokens of every expert, shape ``(..., E)``.
        mass: Sum over tokens of every expert's gate before the choice, shape ``(..., E)``.

    Returns:
        Shape ``(...)``: 1 where all are alike, ``E / k`` where every token goes to the same ``k`` for sure; below 1
        where choices and gates disagree.

    References:
        [1] Fedus, Zoph & Shazeer, *Switch Transformers*, 2021, https://arxiv.org/abs/2101.03961, eq. 4 to 6.

    Example:
        >>> balance_loss(torch.tensor([64.0, 0.0, 0.0, 0.0]), torch.tensor([64.0, 0.0, 0.0, 0.0]))
        tensor(4.)
    """
    f, p = (values / values.sum(dim=-1, keepdim=True) for values in (counts, mass))
    loss: Tensor = counts.shape[-1] * (f * p).sum(dim=-1)
    return loss


@full_precision
def router_similarity(weight: Tensor) -> Tensor:
    r"""Mean cosine between the rows of a router's weight [1]: how alike experts look to it.

    .. math:: \frac{E \lVert \overline{\hat w} \rVert^2 - 1}{E - 1}, \quad \hat w_e = w_e / \lVert w_e \rVert

    Args:
        weight: Shape ``(E, d)``, a row per expert, ``E`` at least 2.

    Returns:
        0-dimensional, ``-1 / (E - 1)`` to 1 (all rows along one line); of Gaussian rows 0, with a standard deviation
        of :math:`\sqrt{2 / (E (E - 1) d)}`. NaN for fewer than two rows.

    References:
        [1] arXiv 2606.28116, eq. 7, as others have written it down in code.

    Example:
        >>> router_similarity(torch.ones(8, 4)), router_similarity(torch.eye(4))
        (tensor(1.), tensor(0.))
    """
    experts = len(weight)
    units = weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    total = units.sum(dim=0).square().sum()
    pairs: Tensor = total - units.square().sum()
    return pairs / (experts * (experts - 1)) if experts > 1 else pairs * nan


@full_precision
def router_conditioning(weight: Tensor) -> Tensor:
    r"""Largest distance of a row of a router's weight from their mean, over the length of that mean [1].

    .. math:: \max_e \lVert w_e - \bar w \rVert / \lVert \bar w \rVert

    Args:
        weight: Shape ``(E, d)``.

    Returns:
        0-dimensional, 0 (all rows equal) or above; of Gaussian rows about :math:`1.06 \sqrt{E - 1}`, 8.4 of 64
        experts. Infinite where the mean is zero, NaN where all of it is.

    References:
        [1] arXiv 2606.28116, eq. 8, as others have written it down in code.

    Example:
        >>> router_conditioning(torch.ones(8, 4))
        tensor(0.)
    """
    mean = weight.mean(dim=0)
    conditioning: Tensor = torch.linalg.vector_norm(weight - mean, dim=1).amax() / torch.linalg.vector_norm(mean)
    return conditioning


@full_precision
def routing_sums(
    logits: Tensor, chosen: Tensor | None = None, scores: Scores = "softmax", counted: Tensor | None = None
) -> Tensor:
    r"""What adds up over the tokens of a router, for :func:`routing_readings`.

    Args:
        logits: Of the router, shape ``(T, E)``. Tokens with NaN or infinity among them are left out.
        chosen: Indices of every token's experts, shape ``(T, k)``; ``None`` if all experts get every token with the
            weight of their gates, which count for the load then.
        scores: Gates are a softmax, or sigmoids over their sum.
        counted: Boolean, shape ``(T,)``: tokens to count; all by default.

    Returns:
        Shape ``(7 + 2 E,)``, double precision where there is any: tokens, choices, sums of log-partitions and of their
        squares, of the entropy of gates, of the margin between the last gate chosen and the next, tokens left out; then
        counts and mass of every expert.
    """
    tokens, experts = logits.shape
    dtype = accumulation_dtype(logits.device)
    asked = torch.ones(tokens, dtype=torch.bool, device=logits.device) if counted is None else counted
    kept = asked & logits.isfinite().all(dim=1)
    weight, clean = kept.to(dtype), logits.where(kept.unsqueeze(1), torch.zeros_like(logits)).to(dtype)
    gates = clean.softmax(dim=1) if scores == "softmax" else clean.sigmoid()
    gates = gates / gates.sum(dim=1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    mass = weight @ gates
    if chosen is None:
        counts, k = mass, experts
    else:
        k = chosen.shape[1]
        each = weight.unsqueeze(1).expand(-1, k).flatten()
        counts = torch.zeros(experts, dtype=dtype, device=logits.device).index_add_(0, chosen.flatten().long(), each)
    log_z = clean.logsumexp(dim=1)
    entropy = -torch.xlogy(gates, gates).sum(dim=1)
    margin = _margin(gates, k) if k < experts else torch.full_like(log_z, nan)
    columns = torch.stack([torch.ones_like(log_z), log_z, log_z.square(), entropy, margin.nan_to_num()])
    total, z, squares, spread, gap = (columns @ weight).unbind()
    gap = gap if k < experts else gap * nan
    return torch.cat([torch.stack([total, counts.sum(), z, squares, spread, gap, (asked & ~kept).sum().to(dtype)]),
                      counts, mass])  # fmt: skip


def routing_readings(sums: Tensor) -> dict[str, Tensor]:
    r"""Curves of a router from what :func:`routing_sums` added up.

    Args:
        sums: Over all tokens of a window, shape ``(7 + 2 E,)``. Compare windows of as many tokens only.

    Returns:
        ``load_cv2``, ``load_entropy`` over ``log E``, ``effective_experts`` :math:`\exp H` of the load, ``max_load``
        over the mean, ``dead`` experts without a token, ``balance_loss``, ``z`` (mean squared log-partition),
        ``token_entropy`` of gates over ``log E``, ``margin``, ``n`` tokens, ``k`` choices of each, and ``nonfinite``;
        0-dimensional, NaN without a token.

    References:
        Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Fedus et al. 2021, https://arxiv.org/abs/2101.03961; the
        z-loss: Zoph et al., *ST-MoE*, 2022, https://arxiv.org/abs/2202.08906.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [0.0, 9.0]])
        >>> found = routing_readings(routing_sums(logits, logits.argmax(dim=1, keepdim=True)))
        >>> found["effective_experts"].item(), found["load_cv2"].item(), found["dead"].item()
        (2.0, 0.0, 0.0)
    """
    experts = (len(sums) - len(SUMS)) // 2
    tokens, choices, _, squares, entropy, margin, lost = sums[: len(SUMS)].unbind()
    counts, mass = sums[len(SUMS) :].chunk(2)
    of_load = load_entropy(counts)
    return {
        "load_cv2": load_cv2(counts),
        "load_entropy": of_load / log(experts),
        "effective_experts": of_load.exp(),
        "max_load": counts.amax() / counts.mean(),
        "dead": torch.where(tokens > 0, (counts <= 0).sum().to(sums.dtype), nan),
        "balance_loss": balance_loss(counts, mass),
        "z": squares / tokens,
        "token_entropy": entropy / tokens / log(experts),
        "margin": margin / tokens,
        "n": tokens,
        "k": choices / tokens,
        "nonfinite": lost,
    }


def _margin(gates: Tensor, k: int) -> Tensor:
    best = gates.topk(k + 1, dim=1).values
    return best[:, k - 1] - best[:, k]
