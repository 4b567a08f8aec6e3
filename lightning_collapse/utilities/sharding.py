"""Sharded tensors: this process's part of one, and all weights whole for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from lightning_collapse.utilities.private_torch import fsdp_groups, is_fully_sharded

P = ParamSpec("P")
T = TypeVar("T")


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def on_whole_weights(fn: Callable[P, T]) -> Callable[P, T]:
    """Run a function of a model, its first argument, while its weights are whole on every process.

    See :func:`unsharded`.
    """

    @wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        model: Any = args[0] if args else kwargs.get("model")
        with unsharded(model) if isinstance(model, nn.Module) else nullcontext():
            return fn(*args, **kwargs)

    return wrapper


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather the weights that ``fully_shard`` has distributed, and shard them again in the end.

    Meanwhile parameters are plain tensors, a forward or backward pass needs no other process, and as many of them may
    run as each likes. Where nothing is sharded nothing happens. Collective: every process must enter it.
    """
    modules: list[Any] = [m for m in model.modules() if is_fully_sharded(m)]
    groups = [group for module in modules for group in fsdp_groups(module)]
    kept = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for group, mesh, backward in kept:
            group.post_forward_mesh_info, group.reshard_after_backward = mesh, backward
        for module in modules:
            module.reshard()
