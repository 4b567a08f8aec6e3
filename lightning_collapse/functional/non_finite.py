"""First NaN or infinity: extremes of a tensor that carry it, and what made it (data, update, overflow, undefined)."""

from enum import IntEnum
from math import inf, isnan, log, nan

import torch
from torch import Tensor

from lightning_collapse.functional.activation_outliers import headroom_bits


class Cause(IntEnum):
    """What made the first NaN or infinity of a step; the number is the curve ``nonfinite/{layer}/cause``.

    Example:
        >>> Cause.OVERFLOW == 3, Cause.UNDEFINED.words
        (True, 'undefined operation')
    """

    NONE = 0
    DATA = 1
    """The batch holds it already."""
    UPDATE = 2
    """Its inputs are finite and its weights are not: an earlier update made it."""
    OVERFLOW = 3
    """Inputs and weights are finite, but large enough for the format's maximum to be passed."""
    UNDEFINED = 4
    """Inputs and weights are finite and small: 0/0, log 0, inf - inf, a row of a softmax that is masked as a whole."""
    BACKWARD = 5
    """The forward pass is finite: sqrt or a norm at 0, or the overflow of a scaled loss."""
    UNSEEN = 6
    """It was made in a step that was not looked at, or does not come again when the step is repeated."""

    @property
    def words(self) -> str:
        """The name as a reader sees it."""
        return {Cause.DATA: "data", Cause.UPDATE: "an earlier update", Cause.UNDEFINED: "undefined operation"}.get(
            self, self.name.lower()
        )


def extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of a tensor: NaN in both if it holds one, infinite if it holds an infinity.

    One pass over the memory, in whatever order the numbers lie there, and nothing is allocated. It never misses and
    never cries wolf, as a sum does that overflows.

    Args:
        tensor: Strided, floating-point, of any shape but not empty.

    Returns:
        Two 0-dimensional tensors, of the type of ``tensor``; ``float32`` for 8-bit floats.

    Example:
        >>> extremes(torch.tensor([[1.0, -3.0], [2.0, 0.0]]))
        (tensor(-3.), tensor(2.))
        >>> extremes(torch.tensor([1.0, float("nan")]))[0]
        tensor(nan)
    """
    values = tensor.detach()
    if not values.is_contiguous():  # five times as slow where numbers that are neighbors in memory are none in shape
        order = sorted(range(values.ndim), key=lambda axis: values.stride(axis), reverse=True)
        values = values.permute(order)
    if values.element_size() == 1:
        values = values.to(torch.float32)
    return tuple(torch.aminmax(values))  # type: ignore[return-value]


def absolute_maximum(least: float, largest: float) -> float:
    """The largest magnitude of what has these extremes; NaN if they are.

    Example:
        >>> absolute_maximum(-3.0, 2.0), absolute_maximum(float("nan"), float("nan"))
        (3.0, nan)
    """
    return least if isnan(least) else largest if isnan(largest) else max(-least, largest)


def producer_cause(made: float, operand: float, weight: float, terms: int, limit: float, before: float = 0.0) -> Cause:
    r"""What made a NaN or an infinity out of finite inputs and finite weights.

    An infinity is an overflow if one of the operands has passed half of the format's maximum, if a sum of ``terms``
    products, or an exponential, of operands of this size can pass it, or if the same tensor had come within four bits
    of it before:

    .. math:: |x| \ge \tfrac12 M, \quad n \, |x| \, \max(|w|, |x|) \ge M, \quad |x| \ge \ln M
        \quad\text{or}\quad |y_{before}| \ge \tfrac1{16} M.

    A NaN is one if an operand, of a wider format, is too large for this one. Otherwise the operation is not defined
    there.

    Args:
        made: Largest magnitude of what came out; NaN or infinite.
        operand: Largest magnitude that went in.
        weight: Largest magnitude of the weights; 0 without any.
        terms: How many products a number of the output may sum up: the width of the input.
        limit: Largest number of the format, 65,504 of ``float16``.
        before: Largest magnitude of the same tensor in earlier steps.

    Returns:
        :attr:`Cause.OVERFLOW` or :attr:`Cause.UNDEFINED`.

    References:
        The table of producers follows Micikevicius et al., *Mixed precision training*, ICLR 2018,
        https://arxiv.org/abs/1710.03740 for the format's range; its bounds are ours.

    Example:
        >>> producer_cause(float("inf"), operand=300.0, weight=4.0, terms=64, limit=65504.0).name
        'OVERFLOW'
        >>> producer_cause(float("inf"), operand=2.0, weight=0.0, terms=8, limit=3.4e38).name
        'UNDEFINED'
    """
    if isnan(made):
        return Cause.OVERFLOW if max(operand, weight) > limit else Cause.UNDEFINED
    product = terms * operand * max(weight, operand) if operand < inf else inf
    reaches = operand >= limit / 2 or product >= limit or operand >= log(limit) or before >= limit / 16
    return Cause.OVERFLOW if reaches else Cause.UNDEFINED


def bits_of_headroom(largest: float, limit: float) -> float:
    """:func:`~lightning_collapse.functional.headroom_bits` of a number on the host; NaN of what is not finite.

    Example:
        >>> bits_of_headroom(32752.0, 65504.0), bits_of_headroom(0.0, 65504.0)
        (1.0, inf)
    """
    known = torch.tensor(largest if largest < inf else nan, dtype=torch.float64)
    return headroom_bits(known, limit).item()
