"""Feature rows: from what a layer returns to a matrix."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.utilities.channel_axis import ChannelAxis

PREFERRED_KEYS = ("last_hidden_state", "hidden_state", "hidden_states", "embedding", "embeddings", "features")
"""Keys of a mapping that are looked up first, in this order; otherwise its first floating-point tensor counts."""

_READABLE = {torch.strided, torch.jagged}


def find_features(output: Any) -> Tensor | None:
    """The tensor of features in what a layer returns, as it is; see :func:`as_rows` for which one.

    Example:
        >>> find_features((3, {"logits": torch.zeros(4, 2)})).shape
        torch.Size([4, 2])
    """
    found = _pick(output, complex_too=False)
    return found if found is not None else _pick(output, complex_too=True)


def as_rows(output: Any, channels_first: bool | ChannelAxis = False, positions: bool = False) -> Tensor | None:
    """View what a layer returns as rows of features; keeps the autograd graph and copies nothing if it can.

    Args:
        output: One of

            - vectors ``(N, D)``: as they are; ``(N,)``: one feature each;
            - tokens ``(N, L, D)``: every token is a row, ``(N * L, D)``; of nested tensors too;
            - maps ``(N, C, *spatial)`` with two or more spatial dimensions: their spatial mean, ``(N, C)``;
            - a tuple or list: its first element that holds a floating-point tensor, scalars such as a loss apart (so an
              LSTM's sequence output, an attention module's output and not its weights);
            - a mapping, dataclass or Hugging Face ``ModelOutput``: the first of :data:`PREFERRED_KEYS` it has, else its
              first floating-point tensor. Of a sequence under such a key (``hidden_states``) the last element counts.

            Complex features, where there are no others, are twice as many real ones, and 8-bit ones are made
            ``float32``. Sparse tensors do not count.
        channels_first: Read three dimensions as maps ``(N, C, L)``, what ``nn.Conv1d`` returns; a
            :class:`~lightning_collapse.utilities.channel_axis.ChannelAxis` tells maps ``(N, *spatial, C)`` as well.
        positions: Every position of a map is a row, as it is of tokens, and not their mean.

    Returns:
        ``(rows, D)`` in the dtype of the output, pooled maps at least ``float32``; ``None`` where there is no
        floating-point tensor.

    Raises:
        ValueError: For a nested tensor that is not tokens.

    Example:
        >>> import torch
        >>> as_rows(torch.zeros(4, 8, 7, 7)).shape, as_rows({"loss": 0.0, "features": torch.zeros(4, 5, 8)}).shape
        (torch.Size([4, 8]), torch.Size([20, 8]))
    """
    features = find_features(output)
    if features is None:
        return None
    if features.is_nested:
        features = _tokens_of(features)
    if features.is_floating_point() and features.element_size() == 1:
        features = features.to(torch.float32)
    rows = _flatten(features, channels_first, positions)
    return torch.view_as_real(rows.resolve_conj()).flatten(1) if rows.is_complex() else rows


def sample_count(output: Any) -> int:
    """How many samples the rows of :func:`as_rows` are of: its first dimension, whatever is a row.

    Example:
        >>> import torch
        >>> sample_count(torch.zeros(4, 5, 8)), sample_count(None)
        (4, 0)
    """
    features = find_features(output)
    return 0 if features is None else features.size(0)


def as_row_mask(output: Any, mask: Tensor | None, channels_first: bool | ChannelAxis = False) -> Tensor | None:
    """Flatten a padding mask the way :func:`as_rows` flattens tokens.

    Args:
        output: What the layer returned.
        mask: Shape ``(N, L)``, true or non-zero for real tokens (Hugging Face's ``attention_mask``).
        channels_first: As in :func:`as_rows`: of maps there are no tokens.

    Returns:
        Boolean, shape ``(N * L,)``, or ``None`` if the output is not tokens of that shape.
    """
    features = None if mask is None else find_features(output)
    if mask is None or features is None or not is_tokens(features, channels_first):
        return None
    return mask.flatten().bool() if mask.shape == features.shape[:2] else None


def is_tokens(features: Tensor, channels_first: bool | ChannelAxis = False) -> bool:
    """Whether features are ``(N, L, D)``, all sequences of one length, and not maps ``(N, C, L)``."""
    return not features.is_nested and features.ndim == 3 and not _is_first(features, channels_first)


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
    features = find_features(output)
    if (
        features is None or features.is_nested or features.ndim not in (2, 3) or not features.shape[-2]
    ):  # no rows, or no tokens
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


def _flatten(features: Tensor, channels_first: bool | ChannelAxis, positions: bool) -> Tensor:
    if features.ndim == 1:
        return features.unsqueeze(1)
    if features.ndim == 2:
        return features
    first = _is_first(features, channels_first)
    if features.ndim == 3 and not first:
        return features.flatten(0, 1)
    maps = features.flatten(2) if first else features.flatten(1, -2)
    if positions:
        return (maps.mT if first else maps).flatten(0, 1)
    # autocast leaves a mean in half precision
    return maps.mean(dim=2 if first else 1, dtype=torch.promote_types(features.dtype, torch.float32))


def _is_first(features: Tensor, channels_first: bool | ChannelAxis) -> bool:
    if isinstance(channels_first, ChannelAxis):
        return channels_first.is_first(features)
    return channels_first or features.ndim > 3


def _tokens_of(nested: Tensor) -> Tensor:
    """Tokens ``(n, D)`` of all sequences of a nested tensor ``(N, *, D)``, whose padding is not there."""
    if nested.ndim != 3:
        raise ValueError(f"of nested tensors only (N, *, D) is read, not {nested.ndim} dimensions")
    tokens = nested.values() if nested.layout == torch.jagged else torch.cat(nested.unbind())
    if tokens.ndim != 2 or tokens.shape[1] != nested.size(2):
        raise ValueError("of nested tensors only (N, *, D) is read, with one width for all")
    return tokens


def _pick(output: Any, complex_too: bool) -> Tensor | None:
    if isinstance(output, Tensor):
        number = output.is_floating_point() or (complex_too and output.is_complex())
        return output if number and output.ndim and output.layout in _READABLE else None
    if hasattr(output, "__dataclass_fields__") and not isinstance(output, (Mapping, type)):
        output = {name: getattr(output, name) for name in output.__dataclass_fields__}
    if isinstance(output, Mapping):
        for key in PREFERRED_KEYS:
            value = output.get(key)
            found = _pick(value[-1] if isinstance(value, Sequence) and value else value, complex_too)
            if found is not None:
                return found
        output = list(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        for element in output:
            found = _pick(element, complex_too)
            if found is not None:
                return found
    return None
