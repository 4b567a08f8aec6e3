"""State of a loss from one step to the next, for a resumed run to go on as if it had not been interrupted."""

from collections.abc import Hashable, Iterator, Mapping

import torch
from torch import Tensor, nn


def remembered(loss: nn.Module) -> dict[str, Tensor | None]:
    """Copies of all buffers of a loss by name, persistent or not, but for its ``constants``.

    Args:
        loss: Any module; each module in it may have an attribute ``constants``, see
            :class:`~lightning_collapse.losses.AntiCollapseLoss`.

    Returns:
        Tensors, and ``None`` for a buffer that is still empty.

    Example:
        >>> from lightning_collapse.losses import SIGReg, VICReg
        >>> remembered(SIGReg()), remembered(VICReg())
        ({'step': tensor(0)}, {})
    """
    return {
        key: None if buffer is None else buffer.detach().clone()
        for key, (module, name) in _places(loss)
        for buffer in [getattr(module, name)]
    }


def recall(loss: nn.Module, state: Mapping[str, Tensor | None]) -> None:
    """Set the buffers of a loss to what :func:`remembered` returned; they keep their device and type.

    Args:
        loss: The loss, changed in place. What ``state`` does not name stays as it is.
        state: Buffers by name; names that the loss does not know are ignored.
    """
    for key, (module, name) in _places(loss):
        if key in state:
            value, buffer = state[key], getattr(module, name)
            if value is not None:
                value = value.clone() if buffer is None else value.to(buffer, copy=True)
            setattr(module, name, value)


def keep(loss: nn.Module, memory: Mapping[str, Tensor | None], counts: Tensor) -> None:
    """Set the buffers of a loss back to what :func:`remembered` returned unless ``counts``; the device decides.

    What was empty before stays as it is.
    """
    for key, (module, name) in _places(loss):
        now, before = getattr(module, name), memory.get(key)
        if now is not None and before is not None:
            setattr(module, name, torch.where(counts, now, before.to(now)))


class OneStep:
    """Keeps a loss one and the same function for all evaluations of a step.

    Optimizers that search along a line compare several of them; a loss that draws anew each time, or moves its running
    statistics, would be another function each time. What the last evaluation remembers is kept.
    """

    def __init__(self) -> None:
        self._step: Hashable = None
        self._memory: dict[str, Tensor | None] = {}

    def evaluate(self, loss: nn.Module, step: Hashable) -> None:
        """Call before every evaluation, with something that tells steps apart."""
        if step == self._step:
            recall(loss, self._memory)
        else:
            self._step, self._memory = step, remembered(loss)


def finite_or(moved: Tensor, earlier: Tensor) -> Tensor:
    """What a step has made of a state, or ``earlier`` if there is a NaN or infinity in it; the device decides.

    One bad batch would stay in a running mean forever.

    Example:
        >>> finite_or(torch.tensor([1.0, torch.nan]), torch.zeros(2))
        tensor([0., 0.])
    """
    return torch.where(moved.isfinite().all(), moved, earlier.to(moved))


def _places(loss: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Name within the loss, and module and attribute, of each buffer that is no constant."""
    for prefix, module in loss.named_modules():
        # `named_buffers` leaves out those that are still empty
        for name in module._buffers:
            if name not in getattr(module, "constants", ()):
                yield f"{prefix}.{name}" if prefix else name, (module, name)
