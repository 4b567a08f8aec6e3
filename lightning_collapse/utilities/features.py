"""From what a layer returns to rows of features."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

PREFERRED_KEYS = ("last_hidden_state", "hidden_state", "hidden_states", "embedding", "embeddings", "features")
"""Keys of a mapping that are looked up first, in this order; otherwise its first floating-point tensor counts."""


def as_rows(output: Any, channels_first: bool = False) -> Tensor | None:
    """View what a layer returns as rows of features; keeps the autograd graph and copies nothing if it can.

    Args:
        output: One of

            - vectors ``(N, D)``: as they are; ``(N,)``: one feature each;
            - tokens ``(N, L, D)``: every token is a row, ``(N * L, D)``;
            - maps ``(N, C, *spatial)`` with two or more spatial dimensions: their spatial mean, ``(N, C)``;
            - a tuple or list: its first element that holds a floating-point tensor, scalars such as a loss apart (so an
              LSTM's sequence output, an attention module's output and not its weights);
            - a mapping or Hugging Face ``ModelOutput``: the first of :data:`PREFERRED_KEYS` it has, else its first
              floating-point tensor. Of a sequence under such a key (``hidden_states``) the last element counts.
        channels_first: Read three dimensions as maps ``(N, C, L)``, what ``nn.Conv1d`` returns.

    Returns:
        ``(rows, D)`` in the dtype of the output, pooled maps at least ``float32``; ``None`` where there is no
        floating-point tensor.

    Example:
        >>> import torch
        >>> as_rows(torch.zeros(4, 8, 7, 7)).shape, as_rows({"loss": 0.0, "features": torch.zeros(4, 5, 8)}).shape
        (torch.Size([4, 8]), torch.Size([20, 8]))
    """
    features = _pick(output)
    if features is None:
        return None
    if features.ndim == 1:
        return features.unsqueeze(1)
    if features.ndim == 3 and not channels_first:
        return features.flatten(0, 1)
    if features.ndim == 2:
        return features
    # autocast leaves a mean in half precision
    return features.flatten(2).mean(dim=2, dtype=torch.promote_types(features.dtype, torch.float32))


def sample_count(output: Any) -> int:
    """How many samples the rows of :func:`as_rows` are of: its first dimension, whatever is a row.

    Example:
        >>> import torch
        >>> sample_count(torch.zeros(4, 5, 8)), sample_count(None)
        (4, 0)
    """
    features = _pick(output)
    return 0 if features is None else len(features)


def as_row_mask(output: Any, mask: Tensor | None, channels_first: bool = False) -> Tensor | None:
    """Flatten a padding mask the way :func:`as_rows` flattens tokens.

    Args:
        output: What the layer returned.
        mask: Shape ``(N, L)``, true or non-zero for real tokens (Hugging Face's ``attention_mask``).
        channels_first: As in :func:`as_rows`: then there are no tokens.

    Returns:
        Boolean, shape ``(N * L,)``, or ``None`` if the output is not tokens of that shape.
    """
    features = None if channels_first else _pick(output)
    if mask is None or features is None or features.ndim != 3 or mask.shape != features.shape[:2]:
        return None
    return mask.flatten().bool()


def token_at(output: Any, mask: Tensor | None, position: int) -> tuple[Tensor, Tensor] | None:
    """One token of every sequence, for instance the last one.

    Args:
        output: What a layer returned: tokens ``(N, L, D)``, or what :func:`as_rows` finds them in.
        mask: Shape ``(N, L)``, true or non-zero for real tokens, on whichever side the padding is; all if ``None`` or
            of another shape.
        position: Among the real tokens of a sequence: 0 the first, -1 the last.

    Returns:
        The tokens ``(N, D)`` and a boolean ``(N,)``, false for sequences too short to have one; vectors ``(N, D)`` as
        they are; ``None`` for anything else.

    Example:
        >>> import torch
        >>> token_at(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1, 1, 0]]), -1)[0]
        tensor([[2.]])
    """
    features = _pick(output)
    if features is None or features.ndim not in (2, 3) or not features.shape[-2]:  # no rows, or no tokens
        return None
    if features.ndim == 2:
        return features, torch.ones_like(features[:, 0], dtype=torch.bool)
    if mask is None or mask.shape != features.shape[:2]:
        mask = torch.ones_like(features[..., 0], dtype=torch.bool)
    order = mask.bool().cumsum(dim=1)
    count = order[:, -1]
    wanted = count + position if position < 0 else torch.full_like(count, position)
    # the first place with that many real tokens up to it
    index = (order > wanted.unsqueeze(1)).to(torch.uint8).argmax(dim=1)
    return features[torch.arange(len(features), device=features.device), index], (wanted >= 0) & (wanted < count)


def padding_mask(batch: Any) -> Tensor | None:
    """``batch["attention_mask"]`` if it is one: a tensor ``(N, L)``, non-zero for real tokens."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def evenly(rows: Tensor, limit: int) -> Tensor:
    """A copy of at most ``limit`` rows, spread over all of them: the same ones of as many rows.

    One of every ``count / limit`` in a row, but not always the same: every 128th token of sequences of 128 would be
    the first one of each.
    """
    count = rows.shape[0]
    if count <= limit:
        return rows.clone()
    # dynamo would warn of the cache and look behind it
    spread = _spread.__wrapped__ if torch.compiler.is_compiling() else _spread
    return rows.index_select(0, spread(count, limit, rows.device))


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _spread(count: int, limit: int, device: torch.device) -> Tensor:
    i = torch.arange(limit + 1, device=device)
    starts = i * count // limit
    golden = (i * 0.6180339887498949).frac()[:-1]  # equidistributed, as are its multiples
    return starts[:-1] + (golden * starts.diff()).long()


def _pick(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.ndim else None
    if isinstance(output, Mapping):
        for key in PREFERRED_KEYS:
            value = output.get(key)
            found = _pick(value[-1] if isinstance(value, Sequence) and value else value)
            if found is not None:
                return found
        output = list(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        return next((found for element in output if (found := _pick(element)) is not None), None)
    return None
