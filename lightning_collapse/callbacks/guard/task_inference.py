"""Task inference: what a module is trained for, from what its loss compares, or from its monitors."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_collapse.monitoring.loss_use import LossUse
from lightning_collapse.rules import Task
from lightning_collapse.utilities.modules import INPUT_SUFFIX, clean_name, curve_name, weighted_layers, width_of

OUTPUTS_FOLLOW = ("classification", "multi-label", "regression", "language model")
OF_FAMILY = {"neural_collapse": "classification", "regression_collapse": "regression"}


def infer_task(
    trainer: Trainer, pl_module: LightningModule, use: LossUse | None = None, requested: str | None = None
) -> Task:
    """The task of a fit, and the layers whose outputs follow targets.

    In this order: what was requested; what the loss compares; a monitor of neural collapse (classification) or of
    regression collapse (regression), if not both; else it is unknown. The layers are those that the loss compares with
    targets. Where that cannot be read, and the task has targets, it is the last layer with a weight, in the order in
    which the module defines them, and its width says where the task ends.

    Args:
        trainer: For its monitors.
        pl_module: For its last layer.
        use: What the loss uses, see :func:`~lightning_collapse.monitoring.read_loss`.
        requested: The task that was told.

    Returns:
        Without a name where nothing tells.
    """
    use = use or LossUse(why="no loss was seen")
    families = {getattr(callback, "family", "") for callback in trainer.callbacks}
    by_monitor = {OF_FAMILY[family] for family in families & OF_FAMILY.keys()}
    if requested is not None:
        name, why = requested, ""
    elif use.task:
        name, why = use.task, use.why
    elif len(by_monitor) == 1:
        [name], why = by_monitor, "its monitors"
    else:
        name, why = "", use.why
    reasons = {curve_name(layer): reason for layer, reason in use.conditioning.items()}
    embeddings = frozenset(map(_tap_name, use.embeddings))
    blank = Task(name, why, conditioning=frozenset(reasons), reasons=reasons, embeddings=embeddings)
    if not name:
        return replace(blank, outputs=frozenset(map(_tap_name, use.compared)))
    if requested == "self-supervised" != use.task:
        return blank
    if use.task and use.compared:
        directions = use.directions if name == use.task else 0
        return _with_layers(blank, directions, map(_tap_name, use.last), map(_tap_name, use.compared))
    return _by_registration(blank, pl_module, use.directions) if name in OUTPUTS_FOLLOW else blank


def _with_layers(task: Task, directions: int, last: Iterable[str], outputs: Iterable[str]) -> Task:
    return replace(task, directions=directions, last=frozenset(last), outputs=frozenset(outputs))


def _tap_name(name: str) -> str:
    suffix = ".input"
    return curve_name(name.removesuffix(suffix) + INPUT_SUFFIX if name.endswith(suffix) else name)


def _by_registration(task: Task, pl_module: LightningModule, directions: int) -> Task:
    layers = [(clean_name(layer), module) for layer, module in weighted_layers(pl_module)]
    width = width_of(layers[-1][1]) if layers else 0
    ends = {"classification": max(width - 1, 1), "regression": width, "multi-label": width} if width else {}
    names = [layer for layer, _ in layers]
    last = _ending_behind(pl_module, names[-2:]) | {f"{layer}.input" for layer in names[-1:]}
    return _with_layers(task, directions or ends.get(task.name, 0), last, _heads(names))


def _heads(layers: Sequence[str]) -> frozenset[str]:
    """The last layer and modules that hold no other."""
    if not layers:
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
