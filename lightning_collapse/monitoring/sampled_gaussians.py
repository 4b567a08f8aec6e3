"""Reparametrized Gaussians: where a step adds scaled noise to a mean, and compares that mean with a prior."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.monitoring.function_calls import has_fused_layers
from lightning_collapse.utilities.gaussian_latents import is_of_policy
from lightning_collapse.utilities.module_tree import clean_name
from lightning_collapse.utilities.modules import curve_name, is_to_be_ignored

_NOISE = {"randn_like", "randn", "normal"}
_PRODUCTS, _SUMS = {"mul", "rmul", "multiply", "addcmul"}, {"add", "radd", "iadd"}
_AS_IT_WAS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "cuda", "cpu", "contiguous", "clone"}
_COMPARED = {"sub", "rsub", "div", "truediv", "neg", *_AS_IT_WAS}
"""What leads from a mean to what is squared in a divergence."""
_PLAIN = (Tensor, nn.Parameter)

Key = tuple[int, int]
"""The address of a tensor's first number: of its storage, and its place in it."""


class Sample(NamedTuple):
    """A Gaussian that was sampled.

    Attributes:
        name: The layer that its mean comes from, ``"model"`` where that has none.
        module: That layer.
        mean: Its means, ``(N, units)`` or more.
        scale: Its standard deviations, of that shape.
        has_prior: Whether its mean is compared with another one that is learned.
    """

    name: str
    module: nn.Module
    mean: Tensor
    scale: Tensor
    has_prior: bool


class SampledGaussians:
    r"""Listens to the functions of torch, see :class:`~lightning_collapse.monitoring.function_calls.FunctionCalls`.

    A sample is :math:`\mu + \sigma \epsilon` with noise that was drawn in the step, and with :math:`\mu` and
    :math:`\sigma` of one shape that layers have made; ``torch.distributions.Normal.rsample`` does the same. It is of a
    posterior if its mean, or the sample, is squared as it is or beside a prior, as divergences from Gaussians do:
    actions, noisy layers and regressions with a variance do not. Policies, by their names, are left out.

    Args:
        root: The model.
        on_failure: Called with what :meth:`note` has raised.

    Attributes:
        others: Names of layers whose samples are compared with no Gaussian.

    Example:
        >>> from lightning_collapse.monitoring.function_calls import FUNCTION_CALLS
        >>> net = nn.ModuleDict({"encode": nn.Linear(4, 4)})
        >>> gaussians = SampledGaussians(net, print)
        >>> FUNCTION_CALLS.add(gaussians)
        >>> mean, log_std = net["encode"](torch.ones(8, 4)).chunk(2, dim=1)
        >>> z = mean + log_std.exp() * torch.randn(8, 2)
        >>> loss = (mean.square() + (2 * log_std).exp() - 2 * log_std).sum()
        >>> FUNCTION_CALLS.remove(gaussians)
        >>> [(sample.name, tuple(sample.mean.shape)) for sample in gaussians.pop()]
        [('encode', (8, 2))]
    """

    def __init__(self, root: nn.Module, on_failure: Callable[[Exception], None]) -> None:
        self.fail = on_failure
        self.others: list[str] = []
        self._owners: dict[int, tuple[str, nn.Module]] = {}
        for name, module in root.named_modules():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), (curve_name(clean_name(name)) if name else "model", module))
        self._root = root
        self.begin()

    def can_listen(self) -> bool:
        """Whether listening changes nothing in what the model computes."""
        return not has_fused_layers(self._root)

    def begin(self) -> None:
        """Forget the last step."""
        self._noise: dict[Key, Tensor] = {}  # kept, as what follows is, since addresses are used again
        self._scaled: dict[Key, tuple[Tensor, Tensor]] = {}
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []  # mean, scale, sample
        self._origins: dict[Key, tuple[str, nn.Module]] = {}
        self._roots: dict[Key, Key] = {}
        self._squared: set[Key] = set()
        self._learned: set[Key] = set()

    def pop(self) -> list[Sample]:
        """Hand over the posteriors that were sampled, and forget the step."""
        samples = []
        for mean, scale, drawn in self._found:
            name, module = self._origins.get(_key(mean), ("model", self._root))
            keys = {self._root_of(mean), _key(drawn)}
            if is_of_policy(name):
                continue
            if keys & self._squared:
                samples.append(Sample(name, module, mean, scale, bool(keys & self._learned)))
            elif name not in self.others:
                self.others.append(name)
        self.begin()
        return samples

    def note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Take note of a function that was called."""
        made = _tensors((output,))
        if not made:
            return
        name = getattr(func, "__name__", "").strip("_")
        given = _tensors((*args, *kwargs.values()))
        if name in _NOISE or (name in _AS_IT_WAS and given and _key(given[0]) in self._noise):
            if name == "randn_like" or not any(x.requires_grad for x in given):
                self._noise[_key(made[0])] = made[0]
        elif name in _PRODUCTS:
            self._multiply(given, made[0])
        elif name in _SUMS and len(given) == 2:
            self._add(given, made[0])
        elif given and (name == "square" or (name == "pow" and _is_two(*args[1:2], *kwargs.values()))):
            self._squared.add(self._root_of(given[0]))
        self._trace(made, given, self._compare(name, given) if name in _COMPARED and given else None)

    def _trace(self, made: list[Tensor], given: list[Tensor], root: Key | None) -> None:
        """Remember what layer tensors come from, and what mean; a new one may lie where another has been."""
        origin = self._origin_of(given)
        for x in made:
            key = _key(x)
            if root is not None and root != key:
                self._roots[key] = root
            elif all(key != _key(y) for y in given):
                self._roots.pop(key, None)
            if origin is not None:
                self._origins[key] = origin
            else:
                self._origins.pop(key, None)

    def _origin_of(self, given: list[Tensor]) -> tuple[str, nn.Module] | None:
        owners = (self._owners.get(id(x)) for x in given if isinstance(x, nn.Parameter))
        found = next((owner for owner in owners if owner is not None), None)
        return found or next((self._origins[key] for x in given if (key := _key(x)) in self._origins), None)

    def _multiply(self, given: list[Tensor], output: Tensor) -> None:
        if len(given) == 2 and _key(given[0]) == _key(given[1]):
            self._squared.add(self._root_of(given[0]))
        factors = given[-2:]
        noise = [x for x in factors if _key(x) in self._noise]
        scale = next((x for x in factors if _is_made(x)), None)
        if len(factors) < 2 or len(noise) != 1 or scale is None:
            return
        if len(given) == 3:
            self._find(given[0], scale, output)
            return
        self._noise.pop(_key(output), None)  # in place
        self._scaled[_key(output)] = output, scale

    def _add(self, given: list[Tensor], output: Tensor) -> None:
        for i, x in enumerate(given):
            scaled = self._scaled.get(_key(x))
            if scaled is not None:
                self._scaled.pop(_key(output), None)  # in place
                self._find(given[1 - i], scaled[1], output)
                return

    def _find(self, mean: Tensor, scale: Tensor, output: Tensor) -> None:
        fits = scale.ndim == mean.ndim > 1 and all(a in (1, b) for a, b in zip(scale.shape, mean.shape, strict=True))
        if fits and mean.numel() and _is_made(mean) and not is_to_be_ignored():
            self._found.append((mean.detach(), scale.detach().expand_as(mean), output.detach()))

    def _compare(self, name: str, given: list[Tensor]) -> Key:
        """What a number that may be squared comes from: one of a difference's two sides."""
        first = self._root_of(given[0])
        if name not in ("sub", "rsub") or len(given) < 2:
            return first
        second = self._root_of(given[1])
        if not given[0].requires_grad:
            return second
        if given[1].requires_grad:
            pairs = ({self._root_of(mean), _key(drawn)} for mean, _, drawn in self._found)
            if any(pair == {first, second} for pair in pairs):  # that is the noise
                return (0, -1)
            self._learned |= {first, second} if _is_made(given[0]) and _is_made(given[1]) else set()
        return first

    def _root_of(self, tensor: Tensor) -> Key:
        key = _key(tensor)
        return self._roots.get(key, key)


def _key(tensor: Tensor) -> Key:
    return storage_of(tensor), int(tensor.storage_offset())


def _is_two(*exponents: Any) -> bool:
    """Whether an exponent is the number 2; those that are tensors are not read, which would wait for the device."""
    return any(isinstance(exponent, int | float) and exponent == 2 for exponent in exponents)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Strided ones, also those in lists, as recurrent layers get their weights."""
    flat = (x for value in values for x in (value if isinstance(value, tuple | list) else (value,)))
    return [x for x in flat if type(x) in _PLAIN and x.layout is torch.strided and not x.is_nested]


def _is_made(tensor: Tensor) -> bool:
    """Whether a layer has made it: no parameter, and with gradient."""
    return tensor.requires_grad and tensor.grad_fn is not None
