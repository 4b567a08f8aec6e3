"""Weights of layers: the parameters that linear and convolutional layers multiply by, and where their outputs lie."""

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_collapse.utilities.module_tree import clean_name, is_transposed
from lightning_collapse.utilities.modules import find_modules
from lightning_collapse.utilities.parameters import why_no_number


def layer_weights(model: nn.Module, layers: Sequence[str] | None, who: str) -> dict[str, tuple[Tensor, bool]]:
    """The weight of every chosen layer by its name, each once, and whether its outputs are its second dimension.

    Raises:
        MisconfigurationException: If a pattern matches nothing, or there is no weight; it names the asker, ``who``.
    """
    roots = {"": model}
    if layers is not None:
        try:
            roots = find_modules(model, list(layers))
        except ValueError as error:
            raise MisconfigurationException(f"`{who}(layers={list(layers)!r})`: {error}") from error
    inside = {id(module) for root in roots.values() for module in root.modules()}
    found: dict[str, tuple[Tensor, bool]] = {}
    for name, module in model.named_modules():
        weight = _weight(module) if id(module) in inside else None
        if weight is not None and all(weight is not other for other, _ in found.values()):
            found[clean_name(name)] = weight, is_transposed(module) or getattr(module, "transposed", False)
    if not found:
        raise MisconfigurationException(
            f"`{who}` finds no weight of a linear or convolutional layer in {', '.join(roots) or 'the model'}."
        )
    return found


def _weight(module: nn.Module) -> Tensor | None:
    """The parameter that a linear or convolutional layer multiplies by."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or hasattr(module, "normalized_shape"):
        return None
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    weight = module._parameters.get(name)
    return None if weight is None or why_no_number(weight) or weight.is_complex() or weight.ndim < 2 else weight
