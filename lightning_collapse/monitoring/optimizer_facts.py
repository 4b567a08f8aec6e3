"""Optimizer facts: what of an optimizer's settings and state its updates are judged by."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_collapse.functional.update_geometry import adam_rms_null, stability_edge


class Facts(NamedTuple):
    """Of one parameter.

    Attributes:
        cosine: What the cosine of two updates of independent gradients is; NaN if that is not known.
        rms: Null of Adam's RMS ratio; NaN if the optimizer keeps no second moments.
        edge: The stability edge of its learning rate; NaN if that is not known, or the rate is zero.
        adaptive: Whether the edge is one of the preconditioned curvature.
        moves: Whether the learning rate is above zero.
    """

    cosine: float = nan
    rms: float = nan
    edge: float = nan
    adaptive: bool = False
    moves: bool = True


def facts_of(optimizer: Optimizer, group: Mapping[str, Any]) -> Facts:
    """Facts of the parameters of a group; a learning rate that is a tensor is read, which waits for its device.

    Example:
        >>> import torch
        >>> adam = Adam([torch.zeros(2)], lr=0.1)
        >>> facts = facts_of(adam, adam.param_groups[0])
        >>> facts.cosine, round(facts.edge), facts.adaptive
        (0.9, 380, True)
    """
    rate = float(group.get("lr", nan))
    betas: Any = group.get("betas")
    known = isinstance(betas, tuple | list) and len(betas) == 2
    rms = adam_rms_null(round(float(betas[1]), 6)) if known and 0 < float(betas[1]) < 1 else nan
    plain = not group.get("nesterov") and not group.get("dampening")
    if isinstance(optimizer, Adam | AdamW) and known:
        first = float(betas[0])
        edge = stability_edge(rate, first, "average") if rate > 0 and 0 <= first < 1 else nan
        return Facts(first, rms, edge, True, rate != 0)
    if isinstance(optimizer, SGD) and plain:
        momentum = float(group.get("momentum", 0.0))
        edge = stability_edge(rate, momentum) if rate > 0 and 0 <= momentum < 1 else nan
        return Facts(momentum, nan, edge, False, rate != 0)
    return Facts(rms=rms, moves=rate != 0)


def second_moment(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Tensor | None:
    r"""Adam's bias-corrected :math:`\hat v` of a parameter, like its shard; ``None`` if there is none."""
    state = optimizer.state.get(parameter, {})
    second, step, betas = state.get("exp_avg_sq"), state.get("step"), group.get("betas")
    if not isinstance(second, Tensor) or step is None or not isinstance(betas, tuple | list) or len(betas) != 2:
        return None
    if second.shape != parameter.shape or second.is_sparse:
        return None
    step = step.double() if isinstance(step, Tensor) and step.device.type == "cpu" else step
    corrected: Tensor = second / (1 - betas[1] ** step)
    return corrected
