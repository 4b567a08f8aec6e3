"""Scaled weight projection: a frozen weight's part in an old task's input subspace, turned and scaled for a new one."""

from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def scaled_weight(weight: Tensor, basis: Tensor, scale: Tensor) -> Tensor:
    r"""What a layer multiplies by in a task that trusts an old one, :math:`W - W B B^\top + W B S B^\top` [1].

    Of two old tasks [1] adds up both changes. With :math:`S = I`, where training starts, it is the weight itself, bit
    by bit. Inputs outside of the subspace get what they got.

    Args:
        weight: :math:`W`, inputs in columns, ``(O, D)``; kernels as ``weight.flatten(1)``.
        basis: :math:`B`, orthonormal columns, ``(D, K)``, such as the directions of a
            :class:`~lightning_collapse.projections.Subspace`.
        scale: :math:`S`, ``(K, K)``, trained with the new task and kept for it.

    Returns:
        Shape ``(O, D)``, with gradient to all three.

    Raises:
        ValueError: If shapes do not fit.

    References:
        [1] Lin et al., *TRGP: Trust Region Gradient Projection for Continual Learning*, ICLR 2022.
        https://arxiv.org/abs/2202.02931

    Example:
        >>> import torch
        >>> weight, basis = torch.tensor([[1.0, 2.0, 3.0]]), torch.eye(3)[:, :2]
        >>> scaled_weight(weight, basis, torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
        tensor([[2., 1., 3.]])
    """
    if basis.ndim != 2 or weight.shape[1:] != basis.shape[:1] or scale.shape != (basis.shape[1],) * 2:
        raise ValueError(
            "`weight` (O, D), `basis` (D, K) and `scale` (K, K) must fit, got"
            f" {tuple(weight.shape)}, {tuple(basis.shape)} and {tuple(scale.shape)}."
        )
    return weight + weight @ basis @ (scale - scale.new_ones(len(scale)).diag()) @ basis.T
