"""Reading a loader in passing, so that whoever reads it next does not notice."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Loader = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches, or a function that returns them."""


def batches_of(loader: Loader) -> Iterable[Any]:
    """The batches of a loader."""
    return loader if isinstance(loader, Iterable) else loader()


@contextmanager
def rewound(loader: Any) -> Iterator[None]:
    """Put the generators of a ``DataLoader`` back: the training loader may draw from the same."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    drawn = [getattr(owner, "generator", None) for owner in owners]
    states = [(generator, generator.get_state()) for generator in drawn if isinstance(generator, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
