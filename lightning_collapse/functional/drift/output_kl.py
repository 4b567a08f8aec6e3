"""Output divergence: how far the predictions of a network are from those of a frozen reference, on the same inputs."""

from torch import Tensor
from torch.nn.functional import log_softmax

from lightning_collapse.spectral.precision import full_precision


@full_precision
def output_kl(reference: Tensor, now: Tensor) -> Tensor:
    r"""Mean Kullback-Leibler divergence of predictions from those of a reference, :math:`E \sum_c p_c \ln(p_c / q_c)`.

    0 for equal networks in eval mode at one precision.

    Args:
        reference: Logits ``(n, C)`` of the reference, :math:`p` their softmax.
        now: Logits ``(n, C)`` of the network on the same inputs.

    Returns:
        0-dimensional, 0 to infinity, in nats.

    Example:
        >>> import torch
        >>> output_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(0.4338)
    """
    p, q = log_softmax(reference, dim=-1), log_softmax(now, dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).mean()
