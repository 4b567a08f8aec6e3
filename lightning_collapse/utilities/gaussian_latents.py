"""Gaussian latents (VAE posteriors): where a model makes a mean and a variance, found by how they are called."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from inspect import getsource
from textwrap import dedent
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_collapse.utilities.module_tree import clean_name
from lightning_collapse.utilities.modules import curve_name

_MEAN = re.compile(r"(?<![a-z])(means?|mus?|loc)(?![a-z])")
_SPREADS = {
    1.0: re.compile(r"(?<![a-z])(log_?v(ar(iance)?s?)?|ln_?var|log_?(sigma|std)_?(2|sq(uared?)?))(?![a-z0-9])"),
    2.0: re.compile(r"(?<![a-z])(log_?(std(dev)?|sigma|scale|sd)s?)(?![a-z])"),
    0.0: re.compile(r"(?<![a-z])(var(iance)?s?|std(dev)?s?|sigmas?|scale)(?![a-z])"),
}
"""By what a name says must be multiplied with for a log-variance; 0 where it cannot be told."""
_OTHERS = re.compile(r"(?<![a-z])(dec(oder)?|likelihood|generator|actor|policy|prior)(?![a-z])")
"""Parts of names of Gaussians that are no posterior: outputs, actions, priors."""

_POLICIES = re.compile(r"(?<![a-z])(actor|policy|agent)(?![a-z])")


class Gaussian(NamedTuple):
    """Mean and logarithm of the variance of every unit, of one shape."""

    mean: Tensor
    log_variance: Tensor


class Latent(NamedTuple):
    """A posterior, and its prior if that is not the standard normal one."""

    posterior: Gaussian
    prior: Gaussian | None = None


class LatentPair(NamedTuple):
    """Two layers side by side, of which one makes a mean and one what is ``factor`` times a log-variance less."""

    name: str
    mean: nn.Module
    spread: nn.Module
    factor: float


def latent_pairs(root: nn.Module) -> tuple[list[LatentPair], list[str]]:
    """Pairs of layers with weights of one shape whose names differ in ``mu`` and ``logvar``, or the like.

    Decoders, policies and priors, by their names, are left out.

    Returns:
        The pairs, named by the layer of the mean, and the names of layers that are called a variance or a standard
        deviation beside a mean: what they return may be a logarithm or not.

    Example:
        >>> net = nn.ModuleDict({"fc_mu": nn.Linear(8, 2), "fc_logvar": nn.Linear(8, 2), "decoder": nn.Linear(2, 8)})
        >>> pairs, unclear = latent_pairs(net)
        >>> [pair.name for pair in pairs], unclear
        (['fc_mu'], [])
    """
    pairs, unclear = [], []
    for path, parent in root.named_modules():
        if _OTHERS.search(_words(path)):
            continue
        kids = {name: kid for name, kid in parent.named_children() if not _OTHERS.search(_words(name))}
        for mean, spread, factor in _pairs(kids):
            shapes = [[tuple(p.shape) for p in kids[name].parameters()] for name in (mean, spread)]
            if shapes[0] and shapes[0] == shapes[1]:
                names = [".".join(part for part in (clean_name(path), kid) if part) for kid in (mean, spread)]
                if factor:
                    pairs.append(LatentPair(curve_name(names[0]), kids[mean], kids[spread], factor))
                else:
                    unclear.append(names[1])
    return pairs, unclear


def is_of_policy(name: str) -> bool:
    """Whether a layer is of a policy, whose samples are actions, by its name."""
    return _POLICIES.search(_words(name)) is not None


def find_posterior(value: Any, module: nn.Module | None = None, told: bool = False) -> Gaussian | None:
    """The posterior in what a module returns, by the names of fields; those of a tuple are read in its ``return``.

    Args:
        value: What it returned.
        module: The module, for names.
        told: Whether it is known that there is one: two tensors of one shape need no name then.

    Returns:
        ``None`` if there is none.

    Example:
        >>> import torch
        >>> find_posterior({"x": torch.zeros(2, 9), "mu": torch.zeros(2, 3), "log_std": torch.ones(2, 3)}).log_variance
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    found = _of_object(value)
    if found is not None:
        return found
    if told and isinstance(value, tuple | list) and len(value) == 2:
        value = {"mean": value[0], "log_variance": value[1]}
    fields = _fields(value, module)
    for field in fields.values():
        if (found := _of_object(field)) is not None:
            return found
    tensors = {name: x for name, x in fields.items() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1}
    for mean, spread, factor in _pairs(tensors):
        if factor and tensors[mean].shape == tensors[spread].shape and tensors[mean].shape[-1]:
            return Gaussian(tensors[mean], factor * tensors[spread])
    return None


def as_latents(value: Any) -> dict[str, Latent]:
    """What a user's function has read, by group: see ``LatentMonitor(read=...)``.

    Raises:
        TypeError: If it is none of the forms.

    Example:
        >>> import torch
        >>> normal = torch.distributions.Normal(torch.zeros(4, 2), torch.ones(4, 2))
        >>> list(as_latents({"top": normal, "bottom": ((torch.zeros(4, 3), torch.zeros(4, 3)), normal)}))
        ['top', 'bottom']
    """
    if isinstance(value, Mapping):
        return {str(name): _latent(item) for name, item in value.items()}
    return {"": _latent(value)}


def _latent(value: Any) -> Latent:
    two = isinstance(value, tuple | list) and len(value) == 2
    if two and not all(isinstance(item, Tensor) for item in value):
        return Latent(_gaussian(value[0]), _gaussian(value[1]))
    return Latent(_gaussian(value))


def _gaussian(value: Any) -> Gaussian:
    found = _of_object(value)
    if found is None and isinstance(value, tuple | list) and len(value) == 2:
        found = Gaussian(*value)
    if found is None or not all(isinstance(x, Tensor) for x in found) or found[0].shape != found[1].shape:
        raise TypeError("`read` must return (mean, log_variance) of one shape, a Normal, or a dict of these")
    if found.mean.ndim < 2 or not found.mean.shape[-1]:
        raise TypeError(
            f"`read` returned shape {tuple(found.mean.shape)}, which must be (N, units) or more: return it before it is"
            " averaged over the batch, and a unit or more"
        )
    return found


def _of_object(value: Any) -> Gaussian | None:
    """Of a ``Normal``, an ``Independent`` one, or an object with ``mean`` and ``logvar``, as diffusers have it."""
    value = getattr(value, "base_dist", value)
    if value is None or isinstance(value, Tensor | nn.Module | Mapping | tuple | list | str | int | float):
        return None
    log_variance = getattr(value, "logvar", None)
    if log_variance is None and type(value).__name__ == "Normal":
        scale = getattr(value, "scale", None)
        log_variance = 2 * scale.log() if isinstance(scale, Tensor) else None
    mean = getattr(value, "mean", None) if log_variance is not None else None
    fits = isinstance(mean, Tensor) and isinstance(log_variance, Tensor) and mean.shape == log_variance.shape
    return Gaussian(mean, log_variance) if fits and mean.ndim > 1 and mean.shape[-1] else None  # type: ignore[arg-type, union-attr]


def _fields(value: Any, module: nn.Module | None) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return {str(name): item for name, item in value.items()}
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, tuple | list) and len(value) > 1:
        names = getattr(value, "_fields", None) or (() if module is None else _returned(type(module).forward))
        names = names if len(names) == len(value) else tuple(map(str, range(len(value))))
        return dict(zip(names, value, strict=True))
    return {}


@lru_cache(maxsize=256)
def _returned(forward: Callable[..., Any]) -> tuple[str, ...]:
    """What the tuple that a ``forward`` returns calls its elements."""
    try:
        tree = ast.parse(dedent(getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    tuples = [node for node in returned if isinstance(node, ast.Tuple | ast.List)]
    return tuple(_called(element) or str(i) for i, element in enumerate(tuples[-1].elts)) if tuples else ()


def _called(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _called(node.func)
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _pairs(names: Iterable[str]) -> Iterator[tuple[str, str, float]]:
    """Names of means and of spreads that differ in nothing else, and the factor of the spread."""
    names = list(names)
    means = {_rest(_MEAN, name): name for name in names if _MEAN.search(_words(name))}
    for name in names:
        factor = next((factor for factor, spread in _SPREADS.items() if spread.search(_words(name))), None)
        mean = None if factor is None else means.get(_rest(_SPREADS[factor], name))
        if factor is not None and mean is not None and mean != name:
            yield mean, name, factor


def _rest(pattern: re.Pattern[str], name: str) -> tuple[str, ...]:
    return tuple(sorted(part for part in re.split(r"[^a-z0-9]+", pattern.sub("", _words(name))) if part))


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
