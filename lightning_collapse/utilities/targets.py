"""Inputs and targets of a batch."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

IGNORED = -100
TARGET_KEYS = ("targets", "target", "labels", "label", "y")
"""Keys of a mapping that are looked up, in this order."""
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_SHIFTED_BY_THEMSELVES = re.compile(r"MaskedLM|XLNet")  # their outputs are about the same position


def targets_of(batch: Any) -> Tensor | None:
    """Targets where they usually are: the second element of ``(x, y)``, or under one of :data:`TARGET_KEYS`.

    Returns:
        The tensor as it is, or ``None`` where there is none.

    Example:
        >>> import torch
        >>> targets_of((torch.zeros(4, 3), torch.ones(4))), targets_of({"y": torch.ones(2)})
        (tensor([1., 1., 1., 1.]), tensor([1., 1.]))
    """
    if isinstance(batch, Mapping):
        found: Any = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 1:
        found = batch[1]
    else:
        found = None
    return found if isinstance(found, Tensor) else None


def shifted_labels(batch: Any, labels: Tensor, module: nn.Module) -> Tensor:
    """Labels at the places of the outputs that predict them.

    Causal language models of Hugging Face take their inputs as labels and move them inside their loss: what position
    ``t`` returns is compared with label ``t + 1``. Labels that are the inputs wherever they count are moved so here,
    and all labels of such a causal model unless they are the next inputs already; those of an encoder with decoder, of
    masked language models and of other tasks stay. Waits for nothing.

    Args:
        batch: The batch they are of.
        labels: Shape ``(N, L)`` for tokens; others stay. ``-100`` marks places that do not count.
        module: The model.

    Returns:
        Labels of the same shape, the last column ``-100`` where they were moved.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> shifted_labels({"input_ids": ids, "labels": ids}, ids, nn.Linear(1, 1))
        tensor([[   6,    7, -100]])
    """
    models = (part for part in module.modules() if hasattr(getattr(part, "config", None), "model_type"))
    model: Any = next(models, None)
    name, config = type(model).__name__, getattr(model, "config", None)
    if labels.ndim != 2 or labels.shape[1] < 2 or labels.is_floating_point() or labels.is_complex():
        return labels
    if getattr(config, "is_encoder_decoder", False) or _SHIFTED_BY_THEMSELVES.search(name):
        return labels
    inputs = (
        batch.get("input_ids") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, Sequence) else batch
    )
    causal = bool(_CAUSAL.search(name)) or bool(getattr(config, "is_decoder", False))
    moved = pad(labels[:, 1:], (0, 1), value=IGNORED)
    if not isinstance(inputs, Tensor) or inputs.shape != labels.shape or inputs.is_floating_point():
        return moved if causal else labels
    counts, inputs = labels != IGNORED, inputs.to(labels.device)
    if causal:
        next_already = (labels == inputs.roll(-1, dims=1))[:, :-1] | ~counts[:, :-1]
        return torch.where(next_already.all() & counts[:, :-1].any(), labels, moved)
    return torch.where(((labels == inputs) | ~counts).all() & counts.any(), moved, labels)


def last_token_of(root: nn.Module, head: nn.Module) -> int | None:
    """-1 for a head that scores every token of a sequence, of which the model compares the last; else ``None``.

    That is the ``score`` of decoders of Hugging Face that classify sequences: reward models and their like.

    Example:
        >>> from types import SimpleNamespace
        >>> class TinyForSequenceClassification(nn.Module):
        ...     config = SimpleNamespace(pad_token_id=0)
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.score = nn.Linear(4, 2)
        >>> model = TinyForSequenceClassification()
        >>> last_token_of(nn.Sequential(model), model.score), last_token_of(model, nn.Linear(4, 2))
        (-1, None)
    """
    named = (part for part in root.modules() if type(part).__name__.endswith("ForSequenceClassification"))
    return -1 if any(getattr(part, "score", None) is head for part in named) else None


def call_on(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: on the first of a pair, or on what a mapping holds beside the targets.

    Example:
        >>> import torch
        >>> call_on(nn.Identity(), (torch.ones(2), torch.zeros(2)))
        tensor([1., 1.])
    """
    if isinstance(batch, Mapping):
        target = next((key for key in TARGET_KEYS if key in batch), None)
        return model(**{key: value for key, value in batch.items() if key != target})
    return model(batch[0] if isinstance(batch, Sequence) else batch)


def target_rows(targets: Tensor) -> Tensor:
    """Targets as rows ``(N, n)`` of floating-point numbers: vectors ``(N,)`` are one target each.

    Example:
        >>> import torch
        >>> target_rows(torch.tensor([1, 2])), target_rows(torch.zeros(4, 5, 3)).shape
        (tensor([[1.],
                [2.]]), torch.Size([20, 3]))
    """
    rows = targets.detach()
    rows = rows if rows.is_floating_point() else rows.float()
    return rows.reshape(-1, 1) if rows.ndim < 2 else rows.flatten(0, -2)
