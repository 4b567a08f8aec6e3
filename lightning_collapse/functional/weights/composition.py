"""Composition scores: how far an attention head reads what an earlier one has written."""

from math import sqrt

from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def composition_scores(
    read_out: Tensor, read_in: Tensor, write_out: Tensor, write_in: Tensor, gain: Tensor | None = None
) -> Tensor:
    r"""Composition of every later head with every earlier one, less what random heads have.

    .. math:: \frac{\|W_r W_w\|_F}{\|W_r\|_F \|W_w\|_F} - \frac{1}{\sqrt{d}}, \quad
        W_r = A_r B_r, \quad W_w = A_w B_w

    in factors, by Gram matrices of ``(r, r)``: no matrix of the width of the model squared is made. With
    :math:`W_w = W_O W_V` of an earlier head and :math:`W_r = W_Q^\top W_K` of a later one it is K-composition, with
    :math:`W_K^\top W_Q` Q-composition, with :math:`W_O W_V` V-composition. The score is as it is remembered in the
    field; the baseline, right for random factors of any rank, was derived and measured here.

    Args:
        read_out: Left factors :math:`A_r` of the later heads, shape ``(R, m, r)``.
        read_in: Their right factors :math:`B_r`, which meet the residual stream, ``(R, r, d)``.
        write_out: Left factors :math:`A_w` of the earlier heads, which write to the stream, ``(W, d, s)``.
        write_in: Their right factors :math:`B_w`, ``(W, s, n)``.
        gain: Of the normalization that the later heads read through, ``(d,)``: without it scores are of another
            network.

    Returns:
        Shape ``(R, W)``: 0 for random heads, up to ``1 - 1 / sqrt(d)`` for two of rank one on one line,
        ``-1 / sqrt(d)`` where nothing written is read; NaN for a head of zeros.

    References:
        Elhage et al., *A Mathematical Framework for Transformer Circuits*, 2021.
        https://transformer-circuits.pub/2021/framework/index.html

    Example:
        >>> import torch
        >>> line = torch.tensor([[[1.0], [0.0], [0.0], [0.0]]])
        >>> composition_scores(line, line.mT, line, line.mT)
        tensor([[0.5000]])
    """
    if gain is not None:
        read_in = read_in * gain
    middle = read_in.unsqueeze(1) @ write_out  # (R, W, r, s)
    left, right = read_out.mT @ read_out, write_in @ write_in.mT
    square = ((left.unsqueeze(1) @ middle @ right) * middle).sum(dim=(-2, -1))
    reads = (left * (read_in @ read_in.mT)).sum(dim=(-2, -1))
    writes = (right * (write_out.mT @ write_out)).sum(dim=(-2, -1))
    cosine: Tensor = (square / (reads.unsqueeze(1) * writes)).clamp_min(0).sqrt()
    return cosine - 1 / sqrt(read_in.shape[-1])
