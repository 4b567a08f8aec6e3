"""Loss use: what a loss uses of a batch, and what was read to tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_collapse.monitoring.autograd_graph import AutogradGraph
from lightning_collapse.monitoring.loss_comparisons import Comparison
from lightning_collapse.monitoring.value_comparison import Sample

ROLES = ("target", "own target", "index", "weight", "input", "unused")


@dataclass(frozen=True)
class LossUse:
    """What a loss uses.

    Attributes:
        task: One of :data:`~lightning_collapse.rules.TASKS`; empty if it cannot be told.
        why: What tells it, in words; or why nothing does.
        roles: The role of each tensor of the batch, of :data:`ROLES`: ``"target"`` (the loss compares outputs with it),
            ``"own target"`` (with what the model receives), ``"index"`` (it chooses outputs, as actions do),
            ``"weight"`` (it weighs terms of the loss), ``"input"`` and ``"unused"`` (nothing that the loss keeps was
            made of it).
        nodes: The operations that say so.
        directions: How many directions the last features keep when training succeeds, 0 if that is not known.
        compared: Names of the modules whose output is compared with a target, with no weight in between.
        last: Those, and the modules whose output the last weights of these multiply.
        conditioning: Layers whose input holds little by design, with the reason.
        embeddings: Names of the modules whose outputs are compared with each other, or with those of another pass.
        heads: Layers of whose outputs the loss takes a softmax that no target is compared with.
        numbers: Tensors of the batch that outputs are compared with as numbers, whole, and the modules these are of.
    """

    task: str = ""
    why: str = ""
    roles: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    directions: int = 0
    compared: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    conditioning: Mapping[str, str] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    numbers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class Evidence:
    """What was read of a loss, for :func:`~lightning_collapse.monitoring.loss_task.decide`."""

    graph: AutogradGraph
    found: list[Comparison]
    batch: dict[str, Tensor]
    fed: dict[str, str]
    """Tensors that the model receives: as they are, or noised, or passed on to no layer, as targets may be."""
    tokens: dict[str, int]
    """Those that are looked up in a table, and how many rows it has."""
    samples: dict[str, Sample | None]
    raw: list[Sample]
    """What the modules receive from outside, on the host."""
