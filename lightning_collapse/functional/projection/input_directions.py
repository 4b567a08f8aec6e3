"""Gradient projection memory: the fewest directions that hold a share of the energy of a layer's inputs."""

import torch
from torch import Tensor

from lightning_collapse.spectral.eigenvalues import eigenvectors
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision


@torch.no_grad()
@full_precision
def input_directions(
    second_moment: Tensor, known: Tensor | None = None, threshold: float = 0.97, released: bool = False
) -> Tensor:
    r"""Directions to add to those known, until both hold a share of the energy of inputs [1].

    The smallest :math:`k` with :math:`\|P R\|^2 + \sum_{i \le k} \hat\sigma_i^2 \ge \epsilon \|R\|^2`, where :math:`P`
    projects onto the known ones and :math:`\hat\sigma_i`, descending, are singular values of :math:`R - P R`.

    Args:
        second_moment: :math:`R R^\top` of inputs, not centered, ``(D, D)``; any scale.
        known: Orthonormal columns ``(D, K)``; none by default.
        threshold: :math:`\epsilon`, above 0 and at most 1.
        released: Whether to keep one fewer where none are known, as the authors' code does.

    Returns:
        Orthonormal columns ``(D, k)``, in ``float64`` where the device has it; none for inputs that are zero or not
        finite.

    Raises:
        ValueError: If ``threshold`` is out of range.

    References:
        [1] Saha, Garg & Roy, *Gradient Projection Memory for Continual Learning*, ICLR 2021, eqs. 5 and 9.
        https://arxiv.org/abs/2103.09762

    Example:
        >>> moment = torch.tensor([71.9, 18.0, 6.5, 2.9, 0.7]).diag()
        >>> input_directions(moment, threshold=0.97).shape, input_directions(moment, released=True).shape
        (torch.Size([5, 4]), torch.Size([5, 3]))
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` is a share of energy, above 0 and at most 1, got {threshold}.")
    moment = second_moment.to(accumulation_dtype(second_moment.device))
    known = moment[:, :0] if known is None else known
    values, vectors = eigenvectors(deflated(moment, known))
    total = moment.trace()
    reached = total - values.sum() + torch.cat([values.new_zeros(1), values.cumsum(0)])
    short = reached < threshold * total
    short = short[1:] if released and not known.shape[1] else short[:-1]
    resolved = values > len(values) * torch.finfo(values.dtype).eps * total  # beyond it lies rounding
    return vectors[:, : min(int(short.sum()), int(resolved.sum()))]


@full_precision
def deflated(second_moment: Tensor, known: Tensor) -> Tensor:
    r"""Second moment of what inputs have outside of known directions, :math:`(I - M M^\top) R R^\top (I - M M^\top)`.

    Args:
        second_moment: Shape ``(D, D)``.
        known: Orthonormal columns :math:`M`, ``(D, K)``.

    Returns:
        Shape ``(D, D)``, symmetric.

    Example:
        >>> deflated(torch.eye(2), torch.tensor([[1.0], [0.0]]))
        tensor([[0., 0.],
                [0., 1.]])
    """
    known = known.to(second_moment)
    half = second_moment - known @ (known.T @ second_moment)
    rest = half - (half @ known) @ known.T
    return (rest + rest.T) / 2
