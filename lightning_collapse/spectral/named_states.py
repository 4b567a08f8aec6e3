"""Named states: an accumulator as its tensors by name, which is what is saved, sent and summed."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self


class NamedStates:
    """An accumulator all of whose knowledge is in tensors of known names.

    Attributes:
        names: Of the attributes that hold them.

    Example:
        >>> class Total(NamedStates):
        ...     names = ("total",)
        >>> Total.from_states({"total": Tensor([3.0])}).states()
        {'total': tensor([3.])}
    """

    names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_states(cls, states: Mapping[str, Tensor]) -> Self:
        """The accumulator whose :meth:`states` these are (the tensors themselves, not copies)."""
        moments = cls.__new__(cls)
        for name in cls.names:
            setattr(moments, name, states[name])
        return moments

    def states(self) -> dict[str, Tensor]:
        """The tensors by name: all there is to save or to send."""
        return {name: getattr(self, name) for name in self.names}
