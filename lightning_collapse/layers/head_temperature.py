"""Softmax temperature of each attention head, learned: what a head can do about its entropy by itself."""

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.arguments import require_positive, require_whole


class HeadTemperature(nn.Module):
    r"""Divides the queries of every head by a learned temperature, and so its attention logits.

    .. math:: \operatorname{softmax}\!\Big(\frac{q k^\top}{\tau_h \sqrt E}\Big)

    Above 1 a head looks more evenly, below 1 more sharply; beside
    :class:`~lightning_collapse.losses.EntropyGuidedAttention` it gets there without larger weights. It begins at 1,
    which changes nothing, and works with fused attention. The authors learn one of every query position too, and begin
    elsewhere. Divide the weights and bias of the queries by it to have a plain network again.

    Args:
        heads: Number of heads ``H``.
        temperature: What all begin with.

    Attributes:
        temperature: τ, shape ``(H,)``. Give it no weight decay.

    Raises:
        ValueError: If ``heads`` is no positive integer, or ``temperature`` is not positive.

    References:
        Jha & Reagen, *Entropy-Guided Attention for Private LLMs*, 2025. https://arxiv.org/abs/2501.03489

    Example:
        >>> query = torch.ones(1, 2, 3, 4)
        >>> HeadTemperature(heads=2, temperature=2.0)(query)[0, 0, 0].tolist()
        [0.5, 0.5, 0.5, 0.5]
    """

    def __init__(self, heads: int, temperature: float = 1.0) -> None:
        super().__init__()
        require_whole(1, heads=heads)
        require_positive(temperature=temperature)
        self._start = temperature
        self.temperature = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill in the first temperature, on the ``meta`` device too."""
        nn.init.constant_(self.temperature, self._start)

    def forward(self, query: Tensor) -> Tensor:
        """Queries ``(B, H, L, E)``, to be given to attention, in their dtype."""
        return query / self.temperature.to(query.dtype).view(-1, 1, 1)
