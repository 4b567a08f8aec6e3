"""Activation functions: modules that bend every number on its own."""

import warnings
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.copies import bare_copy

_OTHERS = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)  # beside them in torch
_STRAIGHT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function: by its class if torch has it or its base, else by what it does.

    What does not come from torch must have neither children, parameters nor buffers, and is tried on a dozen numbers:
    it is one if it returns as many, each of which depends on one of them alone, and not along a line. So softmax,
    normalization, dropout, gates that halve the width, shifts and scales are none. A copy is tried, in eval mode and
    without hooks; the random state stays as it is.

    Example:
        >>> is_activation(nn.GELU()), is_activation(nn.Softmax(dim=-1)), is_activation(nn.LayerNorm(3))
        (True, False, False)
    """
    if any(base.__module__ == "torch.nn.modules.activation" for base in type(module).__mro__):
        return not isinstance(module, _OTHERS)
    bare = next(chain(module.children(), module.parameters(), module.buffers()), None) is None
    if not bare or isinstance(module, (*_STRAIGHT, *_OTHERS)) or type(module).forward is nn.Module.forward:
        return False
    with suppress(Exception), warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return _bends_each(bare_copy(module).eval())
    return False


def _bends_each(module: nn.Module) -> bool:
    numbers = torch.linspace(-3, 3.5, 12).reshape(3, 4)
    found = module.forward(numbers.clone())
    if not isinstance(found, Tensor) or found.shape != numbers.shape or not found.isfinite().all():
        return False
    alone = torch.stack([module.forward(number.reshape(1, 1).clone()).reshape(()) for number in numbers.flatten()])
    slopes = found.flatten().diff() / numbers.flatten().diff()
    return torch.allclose(alone, found.flatten(), atol=1e-5) and bool(slopes.max() - slopes.min() > 1e-3)
