"""Representational collapse and over-squashing of causal language models: what the last token still tells apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.features import find_features, token_at
from lightning_collapse.utilities.preserved_state import preserved_state

ReadStates = Callable[[nn.Module, Tensor, Tensor], Any]


class StateDistance(NamedTuple):
    """How far apart the states of two prompts are, each of shape ``(N,)``.

    Attributes:
        l1: Sum of absolute differences, the norm of the theorem.
        l_inf: Largest absolute difference, the norm of the paper's figures.
        relative_l2: Euclidean distance over the length of the first state.
        equal_share: Share of coordinates that are the same number once rounded; at 1 nothing that follows can tell the
            prompts apart.
    """

    l1: Tensor
    l_inf: Tensor
    relative_l2: Tensor
    equal_share: Tensor


@torch.no_grad()
def state_distance(states: Tensor, others: Tensor, dtype: torch.dtype | None = None) -> StateDistance:
    """Distances of pairs of states, in ``float64`` where the device has it.

    Args:
        states: Shape ``(N, D)``.
        others: The same shape.
        dtype: What to round to for ``equal_share``; the dtype of the states by default.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> state_distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0001, 3.0]]), torch.bfloat16).equal_share
        tensor([0.5000], dtype=torch.float64)
    """
    if states.shape != others.shape or states.ndim != 2:
        raise ValueError(f"States must be two of shape (N, D), got {tuple(states.shape)} and {tuple(others.shape)}.")
    dtype, wide = dtype or states.dtype, accumulation_dtype(states.device)
    equal = (states.to(dtype) == others.to(dtype)).to(wide).mean(dim=1)
    gap, size = states.to(wide) - others.to(wide), torch.linalg.vector_norm(states.to(wide), dim=1)
    relative = torch.linalg.vector_norm(gap, dim=1) / size.clamp_min(torch.finfo(wide).tiny)
    return StateDistance(gap.abs().sum(dim=1), gap.abs().amax(dim=1), relative, equal)


def glasses(
    model: nn.Module,
    batch: Tensor | Mapping[str, Any],
    read: ReadStates | None = None,
    dtype: torch.dtype | None = None,
) -> StateDistance:
    """How far the last token's state moves when the last token is said once more.

    In a decoder it moves ever less the longer the prompt is (representational collapse), until both states are the same
    numbers in the precision of the run; the model can then count no further. Two forward passes in eval mode, without
    gradient; mode, buffers, random state and gradients are as they were afterwards.

    Args:
        model: A causal language model of Hugging Face's ``transformers``, or with ``read`` any module.
        batch: Token numbers ``(N, L)``, or a mapping with ``input_ids`` and, if there is padding, ``attention_mask``;
            what else is in it is not passed on.
        read: Called as ``read(model, ids, mask)``, returns the last layer's states ``(N, L, D)``.
        dtype: What to round to; that of the states by default. Autocast applies as it is set around the call.

    Raises:
        ValueError: If there are no token numbers of that shape, or it is not known how to read the states.

    References:
        Barbero et al., *Transformers need glasses!*, NeurIPS 2024. https://arxiv.org/abs/2406.04267

    Example:
        >>> embed = nn.Embedding(8, 4)
        >>> glasses(embed, torch.randint(8, (2, 5)), read=lambda model, ids, mask: model(ids)).l1
        tensor([0., 0.], dtype=torch.float64)
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.shape[1]:
        raise ValueError("`batch` must be token numbers (N, L), or a mapping with such `input_ids`.")
    if read is None and not hasattr(model, "base_model"):
        raise ValueError(
            f"How {type(model).__name__} makes its last states is not known; pass"
            " `read=lambda model, ids, mask: states`, of shape (N, L, D)."
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = torch.ones_like(ids) if mask is None else mask
    place = torch.arange(ids.shape[1], device=ids.device)
    last = (place * (mask != 0)).amax(dim=1, keepdim=True)
    longer = torch.arange(ids.shape[1] + 1, device=ids.device).expand(len(ids), -1)
    source = longer - (longer > last).long()  # the last real token twice, what follows it one place later
    prompts = (ids, mask), (ids.gather(1, source), mask.gather(1, source))
    with preserved_state(model, gradients=False, autocast=True):
        first, second = (_last_states((read or _hugging_face)(model, *prompt), prompt[1]) for prompt in prompts)
    return state_distance(first, second, dtype)


@torch.no_grad()
def path_sums(maps: Tensor | Sequence[Tensor], beta: float = 1.0, query: int = -1) -> Tensor:
    r"""Over-squashing: the share of all paths through the layers that lead from each token to one query.

    .. math:: e_n^\top \prod_{l = L}^{1} \Big(\tfrac{1}{\beta} A_l + I\Big)

    The bound on :math:`\|\partial y_n / \partial v_i\|` of the appendix, up to a constant, with a skip around every
    layer. One matrix-vector product a layer; no Jacobian. Attention sinks make the first token look influential without
    any collapse.

    Args:
        maps: Attention of the layers from the first to the last, ``(L, ..., T, T)``, or a list of ``(..., T, T)``; for
            instance of :func:`~lightning_collapse.monitoring.attention_maps`.
        beta: What the normalization divides attention by.
        query: Position of the token that is read.

    Returns:
        Shape ``(..., T)``, 0 to 1, sums to one: the row over its sum, :math:`(1 + 1 / \beta)^L`. In a causal model
        without positions all of it goes to the first token as layers are added.

    References:
        Barbero et al., *Transformers need glasses!*, NeurIPS 2024, appendix. https://arxiv.org/abs/2406.04267

    Example:
        >>> uniform = torch.ones(32, 32).tril() / torch.arange(1, 33).unsqueeze(1)
        >>> path_sums([uniform] * 20)[0]
        tensor(0.9467)
    """
    if not len(maps) or maps[0].ndim < 2 or maps[0].shape[-1] != maps[0].shape[-2] or beta <= 0:
        raise ValueError("`maps` must be square, (T, T) for each layer, and `beta` positive.")
    row = torch.zeros_like(maps[0][..., 0, :])
    row[..., query] = 1
    for attention in reversed(list(maps)):
        row = row + (row.unsqueeze(-2) @ attention.to(row)).squeeze(-2) / beta
        row = row / row.sum(dim=-1, keepdim=True)
    return row


def _last_states(states: Any, mask: Tensor) -> Tensor:
    found = find_features(states)
    if found is None or found.ndim != 3 or found.shape[:2] != mask.shape:
        shape = None if found is None else tuple(found.shape)
        raise ValueError(f"States must be of shape {(*mask.shape, 'D')}, got {shape}.")
    token = token_at(found, mask, -1)
    return found[:, -1] if token is None else token[0]


def _hugging_face(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    states: Tensor = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    return states
