"""A loss, an independent reference for it, and the inputs on which it is to be judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int]


def correlated(shape: Shape, views: int) -> list[Tensor]:
    """Correlated features of standard deviation about a half, and views that are independent, in ``float64``."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64) / shape[1] ** 0.5
    return [0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) @ mix for _ in range(views)]


def whitened(views: int) -> list[Tensor]:
    """Sixteen rows of a Hadamard matrix, ``(16, 15)``: zero mean, uncorrelated, standard deviation just above 1."""
    rows = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return [rows[:, 1:]] * views


@dataclass(frozen=True)
class Case:
    """A loss in the batteries, with its published defaults unless ``arguments`` says otherwise.

    Attributes:
        reference: The value of ``float64`` arrays, written from the paper and not from our code.
        arguments: Instead of defaults that ask for more features or rows than the small shapes of the battery have.
        active: From a shape and a number of views to views at which every row has a gradient.
        perfect: From a number of views to views at which the loss reads ``value_at_perfection``.
        row: The row of four features of which a constant batch is made.
        settle: Training steps on the same batch before its value at either end is read, for losses that remember.
        shapes: Shapes ``(N, D)`` of the batteries, by name; leave out what the loss cannot take.
        rows: The fewest rows, over all processes, that it takes.
        rtol: How far ``float64`` may be from the reference.
        rtol_single: How far ``float32`` may be from ``float64``, in value.
        detached: Whether it holds a part of itself constant, so that its gradient is not that of its value.
        shift: Whether adding a constant row changes nothing.
        wide: Shapes for the test with a large mean.
        split: Shapes of the test that splits a batch over two processes, a third to the first.
        exact: Arguments with which it is exact on several processes, if it is not by default.
        messages: All-reduces of a forward pass, with these arguments.
        differentiable: Whether the gradient is the derivative of the value; not where the published form stops one.
        perfect_atol: How far the perfect batch may be from ``value_at_perfection``, where it rests on differences.
        weight: Of the loss in the toy that collapses without it; ``None`` if it alone does not stop a collapse.
        toy: Arguments there, if the defaults would take long.
        doors: Arguments in the toy with both doors, 32 rows of 8 features, if the defaults do not suit it.
    """

    reference: Callable[..., float]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    active: Callable[[Shape, int], list[Tensor]] = correlated
    perfect: Callable[[int], list[Tensor]] = whitened
    row: Tensor = field(default_factory=lambda: torch.full((4,), 3.0))
    settle: int = 0
    shapes: Mapping[str, Shape] = field(default_factory=lambda: {"dual": (6, 10), "primal": (12, 5), "square": (7, 7)})
    rows: int = 2
    rtol: float = 1e-12
    rtol_single: float = 1e-5
    detached: bool = False
    shift: bool = True
    wide: tuple[Shape, ...] = ((64, 128), (256, 32))
    split: tuple[Shape, ...] = ((9, 12), (40, 6))
    exact: Mapping[str, Any] = field(default_factory=dict)
    messages: int = 2
    differentiable: bool = True
    perfect_atol: float = 1e-12
    weight: float | None = 1.0
    toy: Mapping[str, Any] = field(default_factory=dict)
    doors: Mapping[str, Any] = field(default_factory=dict)
