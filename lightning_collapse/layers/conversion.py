"""Module conversion: modules of a model become layers that resist collapse, in place, and plain ones again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.module_tree import Named
from lightning_collapse.utilities.modules import clean_name, find_modules
from lightning_collapse.utilities.parameters import why_no_number
from lightning_collapse.utilities.private_torch import is_compiled_itself, is_fully_sharded
from lightning_collapse.utilities.trainer import is_compiled_whole, is_in_buckets

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")
Start = Callable[[Any], None]
Look = Callable[[str, nn.Module], "Start | str | None"]
_CLASSES: dict[tuple[type, type], type[ConvertedModule]] = {}


class ConversionError(ValueError):
    """Modules cannot be converted, or reverted; it names all of them with the reason, and none was changed.

    Example:
        >>> embedding, head = nn.Embedding(4, 2), nn.Linear(2, 4)
        >>> head.weight = embedding.weight
        >>> model = nn.ModuleDict({"embedding": embedding, "head": head})
        >>> try:
        ...     convert_modules(model, ConvertedModule, lambda _, module: print if module is head else None)
        ... except ConversionError as error:
        ...     print(error)
        `ConvertedModule` has changed nothing, because of 1 module.
        - `head`: its `weight` is that of `embedding` too, which would stay as it is. Give it a weight of its own.
        Or leave it out: `exclude=['head']`.
    """


class ConvertedModule(nn.Module):
    """What a module becomes in place: an object of a subclass of its own class.

    It keeps hooks, names, ``Parameter`` objects and the keys of its state. Copies and pickles stay converted.

    To write one, derive from this class, register it, and add ``convert_`` with the options of the layer, and
    :meth:`fold`. Methods of the layer stand before those of the module's own class: ``super().forward`` is the module's
    own. A forward pass changes no state, since activation checkpointing would run it twice.

    Attributes:
        adds: Names of parameters, buffers and other attributes that the conversion adds, each under the same name in
            the module; parameters have shape ``(1,)`` or more, since ``fully_shard`` refuses scalars.
        converts: Which modules, in a few words.
        resists: Which failure it is made against.
        cost: Of a forward pass and of a step.
        source: Authors, year, arXiv id.
        layer: The class of the layer, without that of the module.
        plain: The class that the module had, and gets back.

    Example:
        >>> class Louder(ConvertedModule):
        ...     adds, converts = ("gain",), "`nn.Linear`"
        ...
        ...     @classmethod
        ...     def convert_(cls, model, include=None, exclude=None):
        ...         look = lambda name, module: cls.start if isinstance(module, nn.Linear) else None
        ...         return convert_modules(model, cls, look, include, exclude)
        ...
        ...     def start(self):
        ...         self.gain = nn.Parameter(torch.ones(1))
        ...
        ...     def forward(self, rows):
        ...         return self.gain * super().forward(rows)
        ...
        ...     def fold(self):
        ...         self.weight.mul_(self.gain)
        ...         self.bias.mul_(self.gain)
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> Louder.convert_(net, exclude=["2"]), list(Louder.added_parameters(net)), isinstance(net[0], nn.Linear)
        (['0'], ['0.gain'], True)
        >>> Louder.revert_(net), net[0]
        (['0'], Linear(in_features=4, out_features=3, bias=True))
    """

    adds: ClassVar[tuple[str, ...]] = ()
    converts: ClassVar[str] = ""
    resists: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    source: ClassVar[str] = ""
    layer: ClassVar[type[ConvertedModule]]
    plain: ClassVar[type[nn.Module]]

    def fold(self) -> None:
        """Change the module's own parameters so that it does the same without what was added."""

    def why_not_fold(self) -> str:
        """Why there are no such parameters; empty if there are."""
        return ""

    @classmethod
    def revert_(
        cls, model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
    ) -> list[str]:
        """Make plain modules again, with the same output; see :func:`revert_modules`."""
        return revert_modules(model, cls, include, exclude)

    @classmethod
    def added_parameters(cls, model: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters that conversion has added, by name: for a group of the optimizer without weight decay."""
        converted = {clean_name(name): m.adds for name, m in model.named_modules() if isinstance(m, cls)}
        named = ((clean_name(name), p) for name, p in model.named_parameters())  # a shared one once
        return {name: p for name, p in named if name.rpartition(".")[2] in converted.get(name.rpartition(".")[0], ())}

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)  # its class is made here, and no file has its name
        return (_blank, (self.layer, self.plain), *reduced[2:])


def convert_modules(
    root: nn.Module,
    layer: type[ConvertedModule],
    look: Look,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[str]:
    """Convert modules in place: first all are looked at, then all are changed, or none.

    Args:
        root: The model; itself counts too.
        layer: What they become.
        look: Asked with the clean name of every chosen module and the module: ``None`` if the layer does not mean such
            a module, a reason with a remedy if it cannot be converted, else what adds the layer's parameters and
            buffers; it is called with the module once that is of the new class.
        include: Names of modules, or glob patterns of them, each with all inside it; all by default.
        exclude: The same, of those that stay as they are.

    Returns:
        Clean names of the modules that were converted, a shared one once, in the order of the model.

    Raises:
        ValueError: If a pattern matches nothing, or there is nothing to convert.
        ConversionError: If modules are of the right kind and cannot be converted: converted already, compiled, wrapped
            for data-parallel training, sharded, on the meta device, with a weight that is lazy, quantized, shared with
            another module or computed from others, or for a reason of the layer.

    Example:
        >>> def look(name, module):
        ...     wide = "it has more than 8 inputs" if module.in_features > 8 else ""
        ...     return wide or (lambda layer: setattr(layer, "told", True))
        >>> convert_modules(nn.Linear(4, 2), ConvertedModule, look)
        ['']
    """
    asked = [(name, module, look(name, module)) for name, module in chosen_modules(root, include, exclude)]
    starts = [(name, module, start) for name, module, start in asked if start is not None]
    if not starts:
        raise ValueError(f"`{layer.__name__}` finds nothing to convert in {type(root).__name__}: {layer.converts}.")
    hidden, users = _hidden(root), _users(root)
    reasons = {n: _why_not(layer, n, m, hidden, users) or (s if isinstance(s, str) else "") for n, m, s in starts}
    _refuse(layer, reasons)
    changed: list[Any] = []
    try:
        for _, module, start in starts:
            module.__class__ = converted_class(layer, type(module))
            changed.append(module)
            if not isinstance(start, str):
                start(module)
    except BaseException:
        for module in changed:
            _strip(module)
        raise
    return [name for name, _, _ in starts]


def revert_modules(
    root: nn.Module,
    layer: type[ConvertedModule],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[str]:
    """Make converted modules plain ones again, whose parameters do the same: all, or none.

    Args:
        root: The model.
        layer: What they were converted into.
        include: As in :func:`convert_modules`.
        exclude: As there.

    Returns:
        Clean names of the modules; none if nothing was converted.

    Raises:
        ValueError: If a pattern matches nothing.
        ConversionError: If a module cannot be reverted: compiled, wrapped, sharded, with a weight that another module
            shares, or of a layer that no plain module can stand for.

    Example:
        >>> revert_modules(nn.Linear(4, 2), ConvertedModule)
        []
    """
    chosen = [(name, module) for name, module in chosen_modules(root, include, exclude) if isinstance(module, layer)]
    hidden, users = _hidden(root), _users(root)
    _refuse(layer, {name: _obstacle(name, m, hidden, users) or m.why_not_fold() for name, m in chosen})
    for _, module in chosen:
        with torch.no_grad():
            module.fold()
        _strip(module)
    return [name for name, _ in chosen]


def converted_class(layer: type[ConvertedModule], plain: type[nn.Module]) -> type[ConvertedModule]:
    """The subclass of a module's class that makes it a layer; the same object for the same two.

    Example:
        >>> converted_class(ConvertedModule, nn.Linear).__name__
        'ConvertedModuleLinear'
    """
    if (layer, plain) not in _CLASSES:
        names = {"layer": layer, "plain": plain, "__module__": layer.__module__, "__doc__": layer.__doc__}
        _CLASSES[layer, plain] = type(f"{layer.__name__}{plain.__name__}", (layer, plain), names)
    return _CLASSES[layer, plain]


def _blank(layer: type[ConvertedModule], plain: type[nn.Module]) -> ConvertedModule:
    """What pickles and copies begin with."""
    kind = converted_class(layer, plain)
    return kind.__new__(kind)


def _strip(module: ConvertedModule) -> None:
    for added in module.adds:
        with suppress(AttributeError):  # `start` may have failed half-way
            delattr(module, added)
    module.__class__ = module.plain  # type: ignore[assignment]


def chosen_modules(root: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[Named]:
    """Modules by clean name, as patterns choose them, a shared one once.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [name for name, _ in chosen_modules(net, None, ["1"])]
        ['', '0', '2']
    """
    check_layers(include, "all that fit", "include")
    if exclude:
        check_layers(exclude, "none", "exclude")
    inside = {id(m) for m in root.modules()} if include is None else _inside(root, include)
    outside = _inside(root, exclude) if exclude else set()
    named = [(clean_name(name), module) for name, module in root.named_modules()]
    return [(name, module) for name, module in named if id(module) in inside - outside]


def _inside(root: nn.Module, patterns: Sequence[str]) -> set[int]:
    return {id(module) for found in find_modules(root, patterns).values() for module in found.modules()}


def _hidden(root: nn.Module) -> dict[int, str]:
    """By identity, the modules inside of what was compiled or wrapped, and why they must stay."""
    found: dict[int, str] = {}
    for module in root.modules():
        if is_compiled_itself(module) or is_compiled_whole(module):
            reason = "it is compiled. Convert before `torch.compile`"
        elif is_in_buckets(module) or type(module).__name__ in _WRAPPERS:
            reason = "it is wrapped for training on several processes. Convert before that, in `configure_model`"
        elif is_fully_sharded(module):
            reason = "it is sharded (FSDP2). Convert before `fully_shard`"
        else:
            continue
        found |= dict.fromkeys(map(id, module.modules()), reason)
    return found


def _users(root: nn.Module) -> dict[int, list[str]]:
    """By identity, the names of the modules that hold a parameter."""
    found: dict[int, list[str]] = {}
    for name, module in root.named_modules():
        for parameter in {id(p) for p in module._parameters.values() if p is not None}:
            found.setdefault(parameter, []).append(clean_name(name))
    return found


def _why_not(
    layer: type[ConvertedModule], name: str, module: nn.Module, hidden: dict[int, str], users: dict[int, list[str]]
) -> str:
    if isinstance(module, ConvertedModule):
        kind = module.layer.__name__
        return f"it is converted into `{kind}`. Revert that first: `{kind}.revert_(model)`"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted. Convert before that"
    if "parametrizations" in module._modules:
        return "its weight is computed from others. Remove the parametrization"
    if taken := [added for added in layer.adds if hasattr(module, added)]:
        return f"it has a `{taken[0]}` of its own, which is what the layer calls what it adds"
    return _obstacle(name, module, hidden, users)


def _obstacle(name: str, module: nn.Module, hidden: dict[int, str], users: dict[int, list[str]]) -> str:
    """What stands in the way of both directions."""
    if id(module) in hidden:
        return hidden[id(module)]
    for key, parameter in module.named_parameters():
        if reason := unreadable(parameter):
            return f"its `{key}` is {reason}"
        others = [user for user in users.get(id(parameter), []) if user != name]
        if others and key in module._parameters and key not in getattr(module, "adds", ()):
            return f"its `{key}` is that of `{others[0]}` too, which would stay as it is. Give it a weight of its own"
    return ""


def unreadable(tensor: Tensor) -> str:
    """Why a parameter has no values that a conversion could begin with; empty if it has.

    Example:
        >>> unreadable(torch.zeros(2)), unreadable(torch.zeros(2, device="meta"))
        ('', 'on the meta device. Convert once it has values')
    """
    if no_number := why_no_number(tensor):
        return f"{no_number}. Convert before quantization, and after the first batch"
    if hasattr(tensor, "to_local"):
        return "sharded (DTensor). Convert before `fully_shard`"
    return "on the meta device. Convert once it has values" if tensor.is_meta else ""


def _refuse(layer: type[ConvertedModule], reasons: dict[str, str]) -> None:
    wrong = {name: reason for name, reason in reasons.items() if reason}
    if not wrong:
        return
    lines = [f"- `{name}`: {reason}." for name, reason in wrong.items()]
    many, them = ("1 module", "it") if len(wrong) == 1 else (f"{len(wrong)} modules", "them")
    raise ConversionError(
        "\n".join([f"`{layer.__name__}` has changed nothing, because of {many}.", *lines])
        + f"\nOr leave {them} out: `exclude={list(wrong)}`."
    )
