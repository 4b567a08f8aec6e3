"""Task inference: what a module is trained for, from its monitors, its first batch and its last layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_collapse.rules import Task
from lightning_collapse.utilities.modules import clean_name, weighted_layers
from lightning_collapse.utilities.targets import TARGET_KEYS, targets_of

WITH_TARGETS = ("classification", "regression", "language model")
OF_FAMILY = {"neural_collapse": "classification", "regression_collapse": "regression"}


def infer_task(trainer: Trainer, pl_module: LightningModule, batch: Any, requested: str | None = None) -> Task:
    """The task of a fit; looks at kinds and shapes of tensors only, so nothing waits for the device.

    In this order: what was requested; a monitor of neural collapse (classification) or of regression collapse
    (regression), if not both; then the batch. Whole numbers as inputs, with none or as many as targets: a language
    model. Whole numbers as targets: classification. Targets of the shape of the inputs, or none: self-supervised, since
    two views look like that. Other targets: regression. Where it ends is read from the width of the last layer with a
    weight, in the order in which the module defines them.

    Returns:
        Without a name where the batch says nothing.
    """
    families = {getattr(callback, "family", "") for callback in trainer.callbacks}
    by_monitor = {OF_FAMILY[family] for family in families & OF_FAMILY.keys()}
    if requested is not None:
        name, why = requested, ""
    elif len(by_monitor) == 1:
        [name], why = by_monitor, "its monitors"
    else:
        name, why = _of_batch(batch)
    layers = [(clean_name(layer), module) for layer, module in weighted_layers(pl_module)]
    width = _width(layers[-1][1]) if layers else 0
    ends = {"classification": max(width - 1, 1), "regression": width} if width else {}
    names = [layer for layer, _ in layers]
    last = _ending_behind(pl_module, names[-2:]) | {f"{layer}.input" for layer in names[-1:]}
    return Task(name, why, ends.get(name, 0), last, _heads(names, name, width, batch))


def _of_batch(batch: Any) -> tuple[str, str]:
    inputs, targets = _inputs_of(batch), targets_of(batch)
    if inputs is None:
        return "", ""
    words = not inputs.is_floating_point() and inputs.ndim == 2
    if words and (targets is None or targets.shape == inputs.shape):
        return "language model", "whole numbers as inputs, and none or as many as targets"
    if targets is None:
        return "self-supervised", "a batch without targets"
    if not targets.is_floating_point():
        return "classification", "whole numbers as targets"
    if targets.shape == inputs.shape:
        return "self-supervised", "two views of one shape in a batch"
    return "regression", "real numbers as targets"


def _inputs_of(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        inputs = (value for key, value in batch.items() if key not in TARGET_KEYS)
        found: Any = next((value for value in inputs if isinstance(value, Tensor)), None)
    else:
        found = batch[0] if isinstance(batch, Sequence) and not isinstance(batch, str) and batch else batch
    return found if isinstance(found, Tensor) else None


def _width(layer: nn.Module) -> int:
    """How many numbers a layer returns per row or position, 0 if that is not known."""
    width = getattr(layer, "out_features", getattr(layer, "out_channels", 0))
    return width if isinstance(width, int) else 0


def _heads(layers: Sequence[str], task: str, width: int, batch: Any) -> frozenset[str]:
    """The last layer and modules that hold no other, if its outputs can be those of a task with targets."""
    if not layers or task not in WITH_TARGETS:
        return frozenset()
    targets = targets_of(batch)
    if task == "regression" and targets is not None and width != (targets.shape[-1] if targets.ndim > 1 else 1):
        return frozenset()
    parts = layers[-1].split(".")
    around = (".".join(parts[:i]) for i in range(1, len(parts)))
    return frozenset({layers[-1], *(name for name in around if not any(o.startswith(f"{name}.") for o in layers[:-1]))})


def _ending_behind(root: nn.Module, layers: Sequence[str]) -> frozenset[str]:
    """Curve names of all modules that end with the first of the last layers or behind it."""
    names = [clean_name(name) for name, _ in root.named_modules()]
    if not layers or not set(layers) <= set(names):
        return frozenset()
    after = {
        ".".join(parts[: i + 1])
        for name in names[names.index(layers[0]) :]
        for parts in [name.split(".")]
        for i in range(len(parts))
    }
    return frozenset(after)
