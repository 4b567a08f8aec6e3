"""Module hooks that belong to one module: no copy of it carries them."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn


class OwnedHook:
    """A hook for ``register_forward_hook`` and its like that acts on one module and on no copy.

    PyTorch copies the hooks of a module with it, and what they belong to; a closure cannot be pickled at all. Of this
    one a deep copy or a pickle holds a function of the standard library that does nothing.

    Args:
        module: The module it is registered on.
        function: What to call, as the hook would be called.

    Example:
        >>> from copy import deepcopy
        >>> seen, layer = [], nn.Identity()
        >>> handle = layer.register_forward_hook(OwnedHook(layer, lambda module, args, output: seen.append(output)))
        >>> layer(1), deepcopy(layer)(2), seen
        (1, 2, [1])
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self.module, self.function = module, function

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Of another module, such as a shallow copy, nothing."""
        return self.function(module, *args) if module is self.module else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")
