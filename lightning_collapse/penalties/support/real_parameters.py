"""Real parameters: those that a penalty can pull; the others are left free, by name."""

from collections.abc import Mapping
from typing import TypeVar

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_collapse.utilities.parameters import why_no_number

NAMED = 8
T = TypeVar("T", bound=Tensor)


def is_real(parameter: Tensor) -> bool:
    """Whether it holds real numbers, in a layout and a precision that arithmetic is done in.

    Example:
        >>> import torch
        >>> is_real(torch.zeros(1)), is_real(torch.zeros(1, dtype=torch.cfloat)), is_real(torch.zeros(1).byte())
        (True, False, False)
    """
    return not why_no_number(parameter) and not parameter.is_complex()


def real_ones(parameters: Mapping[str, T]) -> dict[str, T]:
    """Parameters that can be pulled; the others are named, in a warning if they are trained."""
    left_out = {n: p for n, p in parameters.items() if not is_real(p)}
    if left_out:
        tell = rank_zero_warn if any(parameter.requires_grad for parameter in left_out.values()) else rank_zero_info
        names = [f"`{name}` ({why_no_number(p) or p.dtype})" for name, p in left_out.items()]
        rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        tell(f"No penalty holds parameters that are no real numbers: {', '.join(names[:NAMED])}{rest}.")
    return {name: parameter for name, parameter in parameters.items() if name not in left_out}
