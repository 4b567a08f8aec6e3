"""Gradient samplers: from what a layer received and is sent back to gradients of samples, one rule per kind."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_collapse.penalties.support.sample_gradients import (
    Lookups,
    Outer,
    Patches,
    Plain,
    SampleGradients,
    padded,
    wide,
)

Gradients = dict[str, SampleGradients]
Rule = Callable[[Any, Tensor, Tensor], Gradients]
"""Module, its input and the gradient of its output, both ``(B, K, ...)`` with ``K`` images or tokens per sample."""


def rule_of(module: nn.Module) -> Rule | None:
    """How gradients of single samples are found, by the shape of the weight; ``None`` for kinds that have no rule.

    Kinds are guessed: what a rule returns is to be compared with a gradient of autograd before it is used.
    """
    if hasattr(module, "parametrizations") or isinstance(module, nn.MultiheadAttention | nn.EmbeddingBag):
        return None
    own: Mapping[str, Any] = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    if weight is None or nn.parameter.is_lazy(weight) or not set(own) <= {"weight", "bias"}:
        return None
    if isinstance(module, nn.Embedding):
        return None if module.scale_grad_by_freq else _embedding
    if hasattr(module, "kernel_size"):
        return None if getattr(module, "transposed", False) or weight.ndim < 3 else _convolution
    if hasattr(module, "normalized_shape"):
        return _normalization
    return {1: _normalization, 2: _linear}.get(weight.ndim)


def _linear(module: Any, inputs: Tensor, gradients: Tensor) -> Gradients:
    a, g = wide(inputs).flatten(1, -2), wide(gradients).flatten(1, -2)
    # Hugging Face's `Conv1D` multiplies from the right: its weight is (I, O)
    transposed = getattr(module, "nf", None) == module.weight.shape[1]
    return {"weight": Outer(a, g) if transposed else Outer(g, a), **_bias(module, g.sum(dim=1))}


def _convolution(module: Any, inputs: Tensor, gradients: Tensor) -> Gradients:
    g = wide(gradients)
    a = padded(wide(inputs).flatten(0, 1), module)
    a = a.reshape(*inputs.shape[:2], *a.shape[1:])
    patches = Patches(g, a, module.weight.shape, module.stride, module.dilation, module.groups)
    return {"weight": patches, **_bias(module, g.flatten(3).sum(dim=(1, 3)))}


def _embedding(module: Any, inputs: Tensor, gradients: Tensor) -> Gradients:
    indices, g = inputs.flatten(1), wide(gradients).flatten(1, -2)
    if module.padding_idx is not None:
        g = g * (indices != module.padding_idx).unsqueeze(-1)
    return {"weight": Lookups(g, indices, module.weight.shape)}


@torch.no_grad()
def _normalization(module: Any, inputs: Tensor, gradients: Tensor) -> Gradients:
    """Scale and shift, whatever is normalized how: with scale one and shift zero a module returns what it scales."""
    parts = {"weight": torch.ones_like(module.weight)}
    if getattr(module, "bias", None) is not None:
        parts["bias"] = torch.zeros_like(module.bias)
    g = wide(gradients)
    scaled = g * functional_call(module, parts, (inputs.flatten(0, 1),)).reshape(g.shape).to(g)
    dims = module.weight.ndim
    if hasattr(module, "num_features") or hasattr(module, "num_channels"):  # channels come first
        weight, bias = (t.flatten(3).sum(dim=(1, 3)) if t.ndim > 3 else t.sum(dim=1) for t in (scaled, g))
    else:
        weight, bias = (t.flatten(1, -dims - 1).sum(dim=1) for t in (scaled, g))
    return {"weight": Plain(weight), **_bias(module, bias)}


def _bias(module: Any, gradients: Tensor) -> Gradients:
    return {} if getattr(module, "bias", None) is None else {"bias": Plain(gradients)}
