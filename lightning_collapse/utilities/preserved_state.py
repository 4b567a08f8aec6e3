"""Preserved state: a model in eval mode for a while, and everything as it was afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.modules import is_compiled
from lightning_collapse.utilities.random_states import own_random_states, restore_own_random_states

AUTOCAST_DEVICES = ("cuda", "xpu", "mps", "cpu")


@contextmanager
def preserved_state(
    model: nn.Module, *, gradients: bool = True, autocast: bool = False, training: bool = False
) -> Iterator[None]:
    """Eval mode, with all state put back in the end, also when the body raises.

    Put back are of every submodule the training flag, whatever its own ``train`` method would do, and every buffer,
    whether ``forward`` has written into it, replaced it or made it; of every parameter ``requires_grad`` and ``.grad``,
    which is ``None`` meanwhile; the random states of Python, NumPy and torch on all devices; grad mode and autocast.
    Values of parameters are the body's own affair.

    Args:
        model: Whose state.
        gradients: Whether a graph is built. With one nothing is compiled, inference mode is off, and recurrent modules
            on CUDA stay in train mode without dropout, since cuDNN has no backward pass in eval mode.
        autocast: Whether autocast stays as it is, or is off.
        training: Whether every submodule stays in the mode that it is in, to repeat a step of training.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> with preserved_state(model):
        ...     print(model[0].training)
        False
        >>> model[0].training, model[1].training
        (True, False)
    """
    kept = _ModelState(model)
    random, mode, casts = own_random_states(), torch.is_grad_enabled(), _autocast_state()
    try:
        with ExitStack() as stack:
            if gradients:
                stack.enter_context(torch.inference_mode(False))
                if is_compiled(model) and hasattr(torch.compiler, "set_stance"):
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
            torch.set_grad_enabled(gradients)
            if not autocast:
                _set_autocast({device: (False, dtype) for device, (_, dtype) in casts.items()})
            kept.forget_gradients()
            if not training:
                kept.evaluate(gradients)
            yield
    finally:
        torch.set_grad_enabled(mode)
        _set_autocast(casts)
        restore_own_random_states(random)
        kept.restore()


class _ModelState:
    """All of a model that a pass over data may change, but the values of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(module, module.training, dict(module._buffers.items())) for module in model.modules()]
        self.values = [(b, b.detach().clone()) for b in model.buffers() if not nn.parameter.is_lazy(b)]
        self.parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self.recurrent = [(module, module.dropout) for module, *_ in self.modules if isinstance(module, nn.RNNBase)]

    def evaluate(self, gradients: bool) -> None:
        for module, *_ in self.modules:
            module.training = False  # not by `eval()`: a `train` that changes weights could not be taken back
        for recurrent, _ in self.recurrent if gradients else ():
            recurrent.training = any(p.is_cuda for p in recurrent.parameters())
            recurrent.dropout = 0.0

    def forget_gradients(self) -> None:
        for parameter, *_ in self.parameters:
            parameter.grad = None  # a backward pass of the body would add to what is there

    @torch.no_grad()
    def restore(self) -> None:
        for recurrent, dropout in self.recurrent:
            recurrent.dropout = dropout
        for module, training, buffers in self.modules:
            module.training = training
            now = dict(module._buffers.items())
            for name in now.keys() - buffers.keys():
                delattr(module, name)
            for name, buffer in buffers.items():
                if now.get(name) is not buffer:
                    setattr(module, name, buffer)
        for buffer, value in self.values:
            _put_back(buffer, value)
        for parameter, required, gradient in self.parameters:
            if parameter.requires_grad != required:
                parameter.requires_grad = required
            parameter.grad = gradient


def _put_back(buffer: Tensor, value: Tensor) -> None:
    if buffer.shape != value.shape:
        buffer.resize_(value.shape)
    buffer.copy_(value)


def _autocast_state() -> dict[str, tuple[bool, torch.dtype]]:
    devices = [device for device in AUTOCAST_DEVICES if torch.amp.is_autocast_available(device)]
    return {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices}


def _set_autocast(states: dict[str, Any]) -> None:
    for device, (enabled, dtype) in states.items():
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
