"""Data loaders, read in passing so that whoever else reads them does not notice."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lightning_collapse.utilities.private_torch import forget_workers

Loader = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches, or a function that returns them."""


def batches_of(loader: Loader) -> Iterable[Any]:
    """The batches of a loader; of a ``DataLoader``, alone or in a ``CombinedLoader``, through one that stands apart.

    That one has workers, samplers and generators of its own: another iterator over the same loader, in mid-epoch, goes
    on as if nobody had read. Datasets are shared, since they may be large.

    Example:
        >>> loader = DataLoader([1, 2], shuffle=True, generator=torch.Generator())
        >>> apart = batches_of(loader)
        >>> apart.dataset is loader.dataset, apart.sampler is loader.sampler
        (True, False)
    """
    batches: Iterable[Any] = _apart(loader if isinstance(loader, Iterable) else loader())
    return batches


def shuffles(loader: Any) -> bool:
    """Whether every pass over a ``DataLoader`` has another order, for want of a generator of its own.

    Example:
        >>> shuffles(DataLoader([1, 2], shuffle=True)), shuffles(DataLoader([1, 2])), shuffles([1, 2])
        (True, False, False)
    """
    sampler = getattr(loader, "sampler", None)
    return isinstance(sampler, RandomSampler) and sampler.generator is None


@contextmanager
def rewound(loader: Any) -> Iterator[None]:
    """Put the generators of a ``DataLoader`` and of its datasets back, which the training may draw from as well."""
    generators = list(_generators(loader, 0))
    states = [_state_of(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            _set_state(generator, state)


def _apart(loader: Any) -> Any:
    if hasattr(loader, "flattened"):  # of a `CombinedLoader`
        combined = copy(loader)
        combined.flattened = [_apart(one) for one in loader.flattened]
        return combined
    if not isinstance(loader, DataLoader):
        return loader
    apart = copy(loader)
    own = forget_workers(loader)
    memo = {id(loader.dataset): loader.dataset}
    with suppress(Exception):  # what cannot be copied is shared, and its generators are put back, see `rewound`
        own |= {name: deepcopy(getattr(loader, name), memo) for name in ("generator", "sampler", "batch_sampler")}
    vars(apart).update(own)  # a `DataLoader` forbids to set these
    return apart


def _generators(owner: Any, depth: int) -> Iterator[Any]:
    """Of random numbers, in a loader, its samplers and its datasets."""
    for value in list(vars(owner).values()) if hasattr(owner, "__dict__") else ():
        if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | Random):
            yield value
        elif depth < 4 and isinstance(value, Dataset | torch.utils.data.Sampler):
            yield from _generators(value, depth + 1)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return deepcopy(generator.bit_generator.state)
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
