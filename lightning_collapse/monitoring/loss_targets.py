"""Loss targets: whether the labels that the loss of a step compares logits with are those of the batch, or mixed.

Mixup and CutMix inside of ``training_step`` leave no trace in the batch. They leave one in the loss: its targets are
soft, or it is computed a second time with the labels of other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.monitoring.function_calls import FUNCTION_CALLS

_LOSSES = {
    "cross_entropy",
    "nll_loss",
    "multi_margin_loss",
    "kl_div",
    "mse_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
_NORMALIZED = {"log_softmax", "softmax", "sigmoid", "log", "logsigmoid", "clamp"}
_FLAT = 1e-4


class _Compared(NamedTuple):
    storage: int
    numel: int
    target: Tensor


class LossTargets:
    """Listens to the functions of torch while ``armed``, and says on the device what the loss was compared with.

    Losses of compiled code and with a derivative of their own show nothing, which counts as agreement.

    Args:
        weight: Returns the weight of the classifier, whose outputs count where there are several heads.
        on_failure: Called with what :meth:`note` has raised.

    Example:
        >>> head, y = torch.nn.Linear(4, 3), torch.tensor([0, 1, 2, 1])
        >>> targets = LossTargets(lambda: head.weight, print)
        >>> for other in (y, y.roll(1)):
        ...     targets.armed = True
        ...     logits = head(torch.zeros(4, 4))
        ...     loss = sum(torch.nn.functional.cross_entropy(logits, labels) for labels in (y, other))
        ...     targets.armed = False
        ...     print(targets.agree(y, 3))
        tensor(True)
        tensor(False)
    """

    def __init__(self, weight: Callable[[], Any], on_failure: Callable[[Exception], None]) -> None:
        self.fail = on_failure
        self._weight = weight
        self._armed = False
        self._forget()

    def _forget(self) -> None:
        self._logits: set[int] = set()
        self._logs: dict[int, tuple[int, Tensor]] = {}  # kept, since addresses are used again
        self._compared: list[_Compared] = []

    @property
    def armed(self) -> bool:
        """Whether it listens."""
        return self._armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._armed = armed
        FUNCTION_CALLS.remove(self)
        if armed:
            self._forget()
            FUNCTION_CALLS.add(self)
        self._logs = {}

    def remove(self) -> None:
        """Stop listening and forget; may be called twice."""
        self.armed = False
        self._forget()

    def note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Take note of a function that was called."""
        name, scores = getattr(func, "__name__", ""), args[0] if args else kwargs.get("input")
        if not isinstance(scores, Tensor):
            return
        if name == "linear":
            if (args[1] if len(args) > 1 else kwargs.get("weight")) is self._weight():
                self._logits.add(storage_of(output))
        elif name in _NORMALIZED:
            self._logs[storage_of(output)] = self._source(scores), output.detach()
        elif name in _LOSSES:
            self._add(scores, args[1] if len(args) > 1 else kwargs.get("target"))
        elif self._logs:
            self._by_hand(name, scores, args, kwargs)

    def agree(self, labels: Tensor, classes: int) -> Tensor | None:
        """Whether the last step compared each row with its label and no other, boolean and 0-dimensional.

        ``None`` where nothing tells.

        Args:
            labels: Of all rows that the classifier received, ``(N,)``.
            classes: How many it tells apart.
        """
        n = labels.numel()
        compared = [one for one in self._compared if one.numel == n * classes]
        own = [one for one in compared if one.storage in self._logits] or compared
        self._forget()
        hard = [one.target.flatten() for one in own if not one.target.is_floating_point() and one.target.numel() == n]
        soft = [one.target for one in own if one.target.is_floating_point() and one.target.numel() == n * classes]
        if hard:
            found = [_same(target, labels.flatten().to(target.device)) for target in hard]
        else:  # soft targets beside hard ones are those of a teacher
            found = [_clean(target, labels.flatten().to(target.device), classes) for target in soft]
        return torch.stack(found).all() if found else None

    def _source(self, scores: Tensor) -> int:
        """Storage of the logits that probabilities were made of."""
        storage = storage_of(scores)
        return self._logs[storage][0] if storage in self._logs else storage

    def _add(self, scores: Tensor, target: Any) -> None:
        if isinstance(target, Tensor) and not target.requires_grad:
            self._compared.append(_Compared(self._source(scores), scores.numel(), target.detach()))

    def _by_hand(self, name: str, scores: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if name in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor) and args[1].shape == scores.shape:
            for one, other in ((scores, args[1]), (args[1], scores)):
                if storage_of(one) in self._logs and storage_of(other) not in self._logs:
                    self._add(one, other)
        elif storage_of(scores) in self._logs and name in ("gather", "__getitem__"):
            index = args[-1] if name == "gather" and len(args) > 2 else kwargs.get("index")
            if name == "__getitem__" and isinstance(args[1], tuple):
                index = args[1][-1]
            if isinstance(index, Tensor) and index.dtype == torch.long:
                self._add(scores, index)


def _same(target: Tensor, labels: Tensor) -> Tensor:
    return ((target == labels) | (target < 0) | (labels < 0)).all()


def _clean(target: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Whether soft targets are one-hot, smoothed or not, or no mixture of two classes at all, as those of a teacher."""
    rows = target if target.shape[-1] == classes else target.movedim(1, -1)
    rows = rows.reshape(-1, classes).abs().float()
    counts = (labels >= 0) & (labels < classes)
    own = rows.gather(1, torch.where(counts, labels, 0).unsqueeze(1)).squeeze(1)
    top, least = rows.topk(min(3, classes), dim=1).values, rows.amin(dim=1)
    mixture = (top[:, 2] - least <= _FLAT) if classes > 2 else torch.ones_like(counts)
    level = torch.where(counts, top[:, 0], torch.inf).amin()  # smoothing leaves all rows the same
    one_hot = (own >= top[:, 0]) & (top[:, 0] - level <= _FLAT)
    one_hot &= top[:, 1] - least <= _FLAT
    return (one_hot | ~counts).all() | (~mixture & counts).any()
