"""Full-precision linear algebra, whatever precision plugin the trainer runs."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from lightning_collapse.utilities.preserved_state import AUTOCAST_DEVICES

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(fn: Callable[P, T]) -> Callable[P, T]:
    """Run ``fn`` with autocast off and half-precision tensors promoted to ``float32``.

    LAPACK has no half kernels (``svdvals`` raises on ``bfloat16``), and autocast silently runs the Gram matrix
    ``X.T @ X`` and ``svd_lowrank`` in ``bfloat16``. ``float32`` and ``float64`` inputs keep their dtype, gradients
    arrive in the dtype of the input, and ``torch.compile`` traces through it without a graph break.

    Args:
        fn: A function or method. Tensors among its positional and keyword arguments are promoted, tensors inside
            containers are not. Without a tensor argument autocast is off wherever it was on.

    Returns:
        A function of the same signature.

    Example:
        >>> singular_values = full_precision(torch.linalg.svdvals)
        >>> singular_values(torch.eye(2, dtype=torch.bfloat16))
        tensor([1., 1.])
    """

    @wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        device = _device_type(*args, *kwargs.values())
        args = tuple(_promote(arg) for arg in args)  # type: ignore[assignment]
        kwargs = {name: _promote(arg) for name, arg in kwargs.items()}  # type: ignore[assignment]
        # "meta" is refused by `torch.autocast`; and a context that changes nothing takes longer than a small product
        if device == "meta" or not torch.is_autocast_enabled(device):
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return wrapper


def accumulation_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """What sums are kept in: ``float64``, or ``float32`` on devices that have no ``float64``."""
    device = torch.device(device) if device is not None else torch.get_default_device()
    return torch.float32 if device.type == "mps" else torch.float64


def _device_type(*args: object) -> str:
    devices = [arg.device.type for arg in args if isinstance(arg, Tensor)]
    if not devices:
        devices = [d for d in AUTOCAST_DEVICES if torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d)]
    for device in devices:
        if device != "cpu":  # a CPU scalar beside accelerator tensors does not decide where the work is done
            return device
    return "cpu"


def _promote(arg: object) -> object:
    if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype.itemsize < 4:
        return arg.float()
    return arg
