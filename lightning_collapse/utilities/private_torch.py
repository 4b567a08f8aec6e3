"""Private API of torch: the one file that knows it. What torch changes there is mended here."""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame, types
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves as tree_leaves

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names of the child that compilation, sharding and activation checkpointing hide a module under."""
SHAPELESS = (nn.Identity, nn.GroupNorm, nn.modules.dropout._DropoutNd)
"""Modules that return what they receive, whatever its shape."""
FUSED_IN_EVAL = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules that ask in evaluation mode whether anybody listens, and compute in another order if so."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Foreach:
    """``torch._foreach_...`` without the prefix: one kernel for many tensors, which every optimizer of torch uses."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, f"_foreach_{name}")


foreach = _Foreach()


def autograd_is_running() -> bool:
    """Whether the autograd engine runs a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def is_inside_transform() -> bool:
    """Whether ``torch.func.vmap``, ``grad`` and such are being evaluated."""
    return torch._C._functorch.maybe_current_level() is not None


def innermost_function_mode() -> Any:
    """The ``TorchFunctionMode`` that was entered last."""
    return torch.overrides._get_current_function_mode()  # type: ignore[no-untyped-call]


def never_compile(function: Any, recursive: bool = False) -> None:
    """Have a function that code between two compiled graphs calls run as it is written; traces go through as before.

    ``torch.compiler.disable`` would break the graph of whatever traces it, and costs every call a microsecond.

    Args:
        function: Of Python.
        recursive: Whether that holds of what it calls, too; not before torch 2.7.
    """
    strategies: Any = types
    if hasattr(strategies, "FrameExecStrategy") and hasattr(eval_frame, "set_code_exec_strategy"):
        skip = strategies.FrameAction.SKIP
        strategy = strategies.FrameExecStrategy(skip, skip if recursive else strategies.FrameAction.DEFAULT)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    elif hasattr(eval_frame, "skip_code"):
        eval_frame.skip_code(function.__code__)


def is_fake(value: object) -> bool:
    """Whether a tensor holds no numbers, since something traces through."""
    return isinstance(value, FakeTensor)


def is_compiled_itself(module: nn.Module) -> bool:
    """Whether a module was compiled in place, or wraps one that was compiled."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, so that its own hooks are compiled with it."""
    return module._compiled_call_impl is not None


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 of one made in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that a plain tensor is a view of in the graph, if it is one."""
    return tensor._base if type(tensor) is Tensor and not tensor.is_nested and tensor._is_view() else None


def is_hook_table(name: str) -> bool:
    """Whether a module keeps hooks under this attribute."""
    return name in _HOOKS or name.removesuffix("_with_kwargs") in _HOOKS


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module."""
    return hasattr(module, "_get_fsdp_state") and hasattr(module, "unshard")


def fsdp_groups(module: Any) -> list[Any]:
    """What ``set_reshard_after_forward`` has set of such a module: there is no public way to ask."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)])
    return [group for group in groups if group is not None]


def border_of(convolution: Any) -> Any:
    """What a convolution pads its inputs by, in the order of ``torch.nn.functional.pad``."""
    return convolution._reversed_padding_repeated_twice


def cpu_attention(query: Tensor, key: Tensor, causal: bool, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Fused attention on the CPU with keys for values, and the logarithm of the mass of every row."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    expected, log_mass = attend(query, key, key, 0.0, causal, attn_mask=bias, scale=scale)
    return expected, log_mass


def efficient_attention(query: Tensor, key: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The same on a GPU; the mass may be padded."""
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    expected, log_mass, _, _ = attend(query, key, key, None, True, 0.0, causal, scale=scale)
    return expected, log_mass


def forget_workers(loader: Any) -> dict[str, Any]:
    """Attributes of a copy of a ``DataLoader`` that shares no worker with the original."""
    return {"_iterator": None, "persistent_workers": False}


def scheduler_rates(scheduler: Any) -> tuple[str, ...]:
    """Names of the lists of learning rates that a scheduler keeps."""
    return ("base_lrs", "max_lrs", "_last_lr")


def nested_schedulers(scheduler: Any) -> tuple[Any, ...]:
    """The schedulers that one is made of."""
    return tuple(getattr(scheduler, "_schedulers", ()))


def packs_saved_tensors() -> bool:
    """Whether what autograd saves is packed by hooks at present, as inside of activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def saved_tensors(node: Any, packed: bool = False) -> dict[str, Tensor]:
    """What a node of the autograd graph keeps for its derivative, by the name that the derivative has for it.

    What hooks have packed is left out, since to unpack it may compute a part of the model again.

    Args:
        node: A ``grad_fn`` before the backward pass.
        packed: Whether hooks may have packed something; where torch cannot say of what, nothing is read.
    """
    found: dict[str, Tensor] = {}
    prefix = "_raw_saved_"
    for raw in [name for name in dir(node) if name.startswith(prefix)]:
        name = raw.removeprefix(prefix)
        kept = getattr(node, raw, None)
        several = kept if isinstance(kept, tuple | list) else (kept,)
        if any(getattr(one, "unpack_hook", True if packed else None) is not None for one in several):
            continue
        try:
            values = getattr(node, "saved_tensors" if name == "tensors" else f"_saved_{name}")
        except RuntimeError:  # changed in place since, or freed
            continue
        for i, value in enumerate(values if isinstance(values, tuple | list) else (values,)):
            if isinstance(value, Tensor):
                found[name if len(several) == 1 else f"{name}{i}"] = value
    return found


def table_rows(node: Any) -> int:
    """How many rows the table of an ``EmbeddingBackward0`` has."""
    return int(node._saved_weight_sym_argsize_0)


def dimensions_of(node: Any) -> int:
    """How many dimensions the value of a node of the autograd graph has, 2 where torch does not say."""
    variable = getattr(node, "variable", None)
    if variable is not None:
        return int(variable.ndim)
    metadata = getattr(node, "_input_metadata", ())
    return len(metadata[0].shape) if metadata else 2


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of the first value of a node of the autograd graph; none where torch does not say."""
    metadata = getattr(node, "_input_metadata", ())
    return tuple(metadata[0].shape) if metadata else ()


class TakenPart(NamedTuple):
    """What part of a tensor a slice, a selection or a split takes, of each of its outputs.

    Attributes:
        dim: Along which dimension.
        sizes: The shape of the whole, empty where torch does not say.
        places: Which of its places, in order.
        is_one: Whether the dimension is gone.
    """

    dim: int
    sizes: tuple[int, ...]
    places: range
    is_one: bool


def taken_part(node: Any, output: int = 0) -> TakenPart:
    """Of a node ``Slice``, ``Select``, ``Split``, ``SplitWithSizes`` or ``Unbind``."""
    sizes = tuple(getattr(node, "_saved_self_sym_sizes", ()))
    dimensions = len(sizes) or len(shape_of(node)) + 1
    dim = _signed(node._saved_dim) % max(dimensions, 1)
    if not sizes:  # unbound
        return TakenPart(dim, sizes, range(output, output + 1), True)
    places = range(sizes[dim])
    if hasattr(node, "_saved_index"):
        index = _signed(node._saved_index) % max(len(places), 1)
        return TakenPart(dim, sizes, range(index, index + 1), True)
    if hasattr(node, "_saved_start"):
        start, end = _signed(node._saved_start), _signed(node._saved_end)
        return TakenPart(dim, sizes, places[start : end : node._saved_step], False)
    if hasattr(node, "_saved_split_size"):
        start = output * node._saved_split_size
        return TakenPart(dim, sizes, places[start : start + node._saved_split_size], False)
    ends = list(accumulate(node._saved_split_sizes))
    return TakenPart(dim, sizes, places[ends[output] - node._saved_split_sizes[output] : ends[output]], False)


def _signed(number: int) -> int:
    """Of a number that is kept without its sign."""
    return number - 2**64 if number >= 2**63 else number
