"""Reparametrized layers: what a module reads as its weight is computed from the parameter of that name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_collapse.layers.conversion import ConvertedModule


class Reparametrized(ConvertedModule):
    """A converted module whose ``weight`` and ``bias`` are :meth:`effective` ones wherever they are read.

    The forward pass is that of the module's own class, fused kernels of ``nn.TransformerEncoderLayer`` included. What
    ``parameters()`` and ``state_dict()`` hold, and the optimizer moves, are the parameters themselves, under the names
    that they had. Initialize before converting: writing to what ``layer.weight`` returns changes nothing.

    Outside of a forward pass FSDP2 looks for its sharded parameters under these names, and finds them: only then
    ``layer.weight`` is the parameter itself.

    Example:
        >>> from lightning_collapse.layers.conversion import convert_modules
        >>> class Doubled(Reparametrized):
        ...     def effective(self, name, parameter):
        ...         return 2 * parameter
        >>> layer = nn.Linear(2, 2)
        >>> convert_modules(layer, Doubled, lambda name, module: lambda layer: None)
        ['']
        >>> bool((layer.weight == 2 * layer.state_dict()["weight"]).all())
        True
    """

    def effective(self, name: str, parameter: Tensor) -> Tensor:
        """What takes effect in place of a parameter, of the same shape and dtype, with its gradient.

        Args:
            name: Of the parameter.
            parameter: Its value.
        """
        raise NotImplementedError

    def fold(self) -> None:
        """Have every parameter hold what takes effect."""
        new = [(parameter, getattr(self, name)) for name, parameter in self.own_parameters()]
        for parameter, value in new:
            parameter.copy_(value)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's own parameters by name, without those that conversion has added."""
        return ((name, p) for name, p in self.named_parameters(recurse=False) if name not in self.adds)


def _read(name: str) -> Any:
    def read(self: Reparametrized) -> Tensor | None:
        if name not in self._parameters:
            raise AttributeError(name)
        parameter = self._parameters[name]
        return parameter if parameter is None or hasattr(parameter, "to_local") else self.effective(name, parameter)

    return property(read)


for _name in ("weight", "bias", "in_proj_weight", "in_proj_bias", "q_proj_weight"):
    setattr(Reparametrized, _name, _read(_name))
