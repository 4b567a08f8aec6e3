"""Real parameters: those whose numbers norms, distances and penalties may be taken of."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_REAL = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_COMPLEX = frozenset({torch.complex32, torch.complex64, torch.complex128})


class RealParameters(NamedTuple):
    """The parameters of a module, told apart.

    Attributes:
        kept: By name, those that hold real or complex numbers; take :func:`as_real` of them before any arithmetic.
        left_out: By name, why the others are none of these.
    """

    kept: dict[str, nn.Parameter]
    left_out: dict[str, str]


def real_parameters(module: nn.Module) -> RealParameters:
    """Parameters that hold numbers, each once, and the names of those that do not.

    Codes of quantized weights (8-bit, integers, ``float8`` without its scale), layouts other than strided ones and
    lazy parameters have no norm that means anything.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> net[1].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
        >>> real = real_parameters(net)
        >>> list(real.kept), real.left_out
        (['0.weight'], {'1.weight': 'torch.uint8'})
    """
    parameters = dict(module.named_parameters())
    reasons = {name: why_no_number(parameter) for name, parameter in parameters.items()}
    return RealParameters(
        {name: parameter for name, parameter in parameters.items() if not reasons[name]},
        {name: reason for name, reason in reasons.items() if reason},
    )


def why_no_number(tensor: Tensor) -> str:
    """Its lazy state, dtype or layout if that stands in the way of arithmetic, else an empty string.

    Example:
        >>> why_no_number(torch.zeros(2)), why_no_number(torch.zeros(2, dtype=torch.int8))
        ('', 'torch.int8')
    """
    if nn.parameter.is_lazy(tensor):
        return "lazy"
    if tensor.dtype not in _REAL | _COMPLEX:
        return str(tensor.dtype)
    return "" if tensor.layout is torch.strided else str(tensor.layout)


def as_real(tensor: Any) -> Tensor:
    """Real and imaginary parts of a complex tensor in a last dimension of 2, in the same memory; others as they are.

    Example:
        >>> as_real(torch.tensor([3 + 4j])), as_real(torch.ones(1))
        (tensor([[3., 4.]]), tensor([1.]))
    """
    real: Tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real
