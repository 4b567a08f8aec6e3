"""Gradient alignment: where two losses conflict, the second gives way on the weights that both train."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def align_gradients(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Tensor]:
    r"""Gradients without the part that works against those of another loss.

    .. math:: g - \frac{\min(\langle g, r \rangle,\, 0)}{\|r\|^2}\, r

    over all tensors together. Give those of the weights that both losses train, a backbone, alone: with heads among
    them, as in the authors' code, what comes out is not orthogonal to the reference on the backbone. Nothing waits for
    the device. In data-parallel training take gradients that are averaged already.

    Args:
        gradients: ``g``, of the loss that gives way.
        reference: ``r``, of the loss that does not; as many, of the same shapes.

    Returns:
        New tensors; equal to ``gradients`` where there is no conflict.

    Raises:
        ValueError: If there are not as many of both.

    References:
        Yang et al., *Dual-Head Knowledge Distillation*, 2024. https://arxiv.org/abs/2411.08937, one-sided, of
        Yu et al., *Gradient Surgery for Multi-Task Learning*, NeurIPS 2020. https://arxiv.org/abs/2001.06782

    Example:
        >>> align_gradients([torch.tensor([1.0, -1.0])], [torch.tensor([0.0, 2.0])])
        [tensor([1., 0.])]
    """
    if len(gradients) != len(reference):
        raise ValueError(f"`gradients` and `reference` must be as many, got {len(gradients)} and {len(reference)}.")
    if not gradients:
        return []
    pairs = [(g.to(_wide(g)), r.to(_wide(r))) for g, r in zip(gradients, reference, strict=True)]
    product = torch.stack([(g * r).sum() for g, r in pairs]).sum()
    square = torch.stack([r.square().sum() for _, r in pairs]).sum()
    share = product.clamp_max(0) / torch.where(square > 0, square, 1.0)
    return [(g - share * r).to(own.dtype) for own, (g, r) in zip(gradients, pairs, strict=True)]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
