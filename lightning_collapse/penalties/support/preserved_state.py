"""A model in eval mode for a while, and all as it was afterwards."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from lightning_collapse.spectral.precision import AUTOCAST_DEVICES
from lightning_collapse.utilities.modules import is_compiled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients on, autocast off and nothing compiled; the model must not notice.

    Put back are the flag of every submodule, whatever its own ``train`` method would do, every buffer, and the random
    states of Python, NumPy and torch on the host and on CUDA. Recurrent modules on CUDA stay in train mode without
    dropout, since cuDNN has no backward pass in eval mode.

    Args:
        model: Its parameters and their ``.grad`` are left alone.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> with evaluating(model):
        ...     print(model[0].training)
        False
        >>> model[0].training, model[1].training
        (True, False)
    """
    flags = [(module, module.training) for module in model.modules()]
    dropouts = [(module, module.dropout) for module in model.modules() if isinstance(module, nn.RNNBase)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with ExitStack() as stack:
            stack.enter_context(_random_states())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in AUTOCAST_DEVICES:
                if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            if is_compiled(model) and hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module, _ in flags:
                module.training = False  # not by `eval()`: a `train` that changes weights could not be taken back
            for module, _ in dropouts:
                module.training = any(p.is_cuda for p in module.parameters())
                module.dropout = 0.0
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        for module, dropout in dropouts:
            module.dropout = dropout
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def _random_states() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
