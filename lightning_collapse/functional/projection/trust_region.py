"""Trust region of gradient projection: old tasks whose input subspace the gradient of a new one lies in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@torch.no_grad()
@full_precision
def trust_region(gradient: Tensor, bases: Sequence[Tensor], threshold: float = 0.5, most: int = 2) -> list[int]:
    r"""Old tasks with :math:`\|G B_j B_j^\top\| \ge \epsilon \|G\|`, the nearest first [1].

    Args:
        gradient: :math:`G` of a weight for the new task, inputs in columns, ``(O, D)``.
        bases: Orthonormal columns :math:`B_j` of every old task, ``(D, K_j)``.
        threshold: :math:`\epsilon`, 0.5 in [1].
        most: How many are taken at most, 2 in [1].

    Returns:
        Their indices; none for a gradient of zero. Waits for the device.

    References:
        [1] Lin et al., *TRGP: Trust Region Gradient Projection for Continual Learning*, ICLR 2022.
        https://arxiv.org/abs/2202.02931

    Example:
        >>> one, other = torch.eye(3).split([1, 2], dim=1)
        >>> trust_region(torch.tensor([[3.0, 4.0, 0.0]]), [one, other])
        [1, 0]
        >>> trust_region(torch.tensor([[1.0, 4.0, 0.0]]), [one, other])
        [1]
    """
    norm = torch.linalg.vector_norm(gradient)
    # waits for the device: once, when a task begins
    shares = [(torch.linalg.vector_norm(gradient @ basis.to(gradient)) / norm).item() for basis in bases]
    near = [j for j, share in enumerate(shares) if share >= threshold]
    return sorted(near, key=lambda j: -shares[j])[:most]
