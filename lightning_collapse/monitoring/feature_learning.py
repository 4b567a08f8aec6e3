"""Feature learning of one layer: what is kept of its beginning, and how far it has come from there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_collapse.functional.feature_learning import (
    kernel_alignment,
    null_space_share,
    projected_tangent_kernel,
    relative_weight_change,
    sign_similarity,
    tangent_kernel,
)
from lightning_collapse.monitoring.probe_capture import Probed
from lightning_collapse.utilities.features import evenly

MEASURES = ("weight_change", "representation_alignment", "kernel_alignment", "sign_similarity", "null_space_share")
MOST_ENTRIES = 2**20
"""Of a weight, and of the signs of a layer, that are kept; more are thinned to rows that are spread over all."""
MOST_NUMBERS = 2**22
"""Of whole gradients of all samples together; of wider layers projections are compared."""
WIDEST = 256
"""Inputs and rows: where both are more, the span of the inputs is not asked for."""


@torch.no_grad()
def thinned(rows: Tensor) -> Tensor:
    """A copy of at most :data:`MOST_ENTRIES` entries, whole rows."""
    return evenly(rows, max(MOST_ENTRIES // max(rows.shape[1], 1), 1))


@torch.no_grad()
def beginning(weight: Tensor, probed: Probed | None, is_linear: bool) -> dict[str, Tensor]:
    """What is kept of a layer: its weight, Gram matrices of features and of gradients, and signs.

    Args:
        weight: Shape ``(o, i)``.
        probed: What ran, if anything did.
        is_linear: Whether the output is the input times the weight.
    """
    kept = {"weight": thinned(weight)}
    if probed is None:
        return kept
    kept["gram"] = gram = _gram(probed.outputs)
    kept["positive"] = _positive(probed.outputs)
    if not is_linear:
        return kept
    generator = torch.Generator().manual_seed(0)
    unrelated = torch.randn(weight.shape[1], min(weight.shape[0], 4096), generator=generator).to(probed.inputs)
    kept["gram_null"] = kernel_alignment(_gram(probed.inputs @ unrelated), gram).debiased
    if probed.gradients is not None:
        kept["kernel"] = kernel = _kernel(probed.gradients, probed.inputs)
        dealt = _kernel(probed.gradients.roll(1, dims=0), probed.inputs)
        kept["kernel_null"] = kernel_alignment(dealt, kernel).debiased
    return kept


@torch.no_grad()
def since(kept: Mapping[str, Tensor], weight: Tensor, probed: Probed | None, is_linear: bool) -> dict[str, Tensor]:
    """Readings by measure, each with its null, shape ``(2,)``; those that cannot be had are missing.

    Args:
        kept: What :func:`beginning` returned, on the device of the weight.
        weight: Shape ``(o, i)``, now.
        probed: What ran now.
        is_linear: As of :func:`beginning`.
    """
    now = thinned(weight)
    nan = torch.full((), torch.nan, device=weight.device)
    found = {"weight_change": (relative_weight_change(now, kept["weight"]), nan)}
    if probed is not None and "gram" in kept and len(kept["gram"]) == len(probed.outputs):
        alignment = kernel_alignment(_gram(probed.outputs), kept["gram"]).debiased
        found["representation_alignment"] = alignment, kept.get("gram_null", nan)
        found["sign_similarity"] = sign_similarity(_positive(probed.outputs), kept["positive"])
        if "kernel" in kept and probed.gradients is not None:
            alignment = kernel_alignment(_kernel(probed.gradients, probed.inputs), kept["kernel"]).debiased
            found["kernel_alignment"] = alignment, kept["kernel_null"]
        rows = probed.inputs.flatten(0, 1)
        if is_linear and min(rows.shape) <= WIDEST:
            share, null = null_space_share(now.to(rows) - kept["weight"].to(rows), rows).unbind()
            found["null_space_share"] = share, null
    return {name: torch.stack([part.to(nan) for part in pair]) for name, pair in found.items()}


def _gram(outputs: Tensor) -> Tensor:
    rows = outputs.flatten(1).to(torch.promote_types(outputs.dtype, torch.float32))
    return rows @ rows.T


def _positive(outputs: Tensor) -> Tensor:
    return thinned(outputs.flatten(0, 1)) > 0


def _kernel(gradients: Tensor, inputs: Tensor) -> Tensor:
    samples, length, outputs = gradients.shape
    exact = length == 1 or samples * outputs * inputs.shape[2] <= MOST_NUMBERS
    return (tangent_kernel if exact else projected_tangent_kernel)(gradients, inputs)
