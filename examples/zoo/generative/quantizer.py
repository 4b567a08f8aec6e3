"""Vector quantization: a codebook that follows gradients, or the rows that its codes win."""

import torch
from torch import Tensor, nn

CODES, WIDTH = 64, 8


class Codebook(nn.Module):
    """The nearest of some codes.

    Args:
        restarts: Whether codes that none chose are put where a random row is; the others follow the rows they won.
    """

    counts: Tensor

    def __init__(self, restarts: bool) -> None:
        super().__init__()
        self.restarts = restarts
        self.codes = nn.Parameter((2 * torch.rand(CODES, WIDTH) - 1) / CODES, requires_grad=not restarts)
        self.register_buffer("counts", torch.ones(CODES))

    def choose(self, rows: Tensor) -> Tensor:
        """The number of the nearest code."""
        return torch.cdist(rows, self.codes).argmin(dim=1)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of rows, with the gradient of the rows, and the loss that draws both together."""
        chosen = self.choose(rows.detach())
        if self.restarts and self.training:
            self._follow(rows.detach(), chosen)
        codes = self.codes[chosen]
        loss = (codes - rows.detach()).square().mean() + 0.25 * (codes.detach() - rows).square().mean()
        return rows + (codes - rows).detach(), loss

    @torch.no_grad()
    def _follow(self, rows: Tensor, chosen: Tensor) -> None:
        won = nn.functional.one_hot(chosen, CODES).type_as(rows)
        self.counts.lerp_(won.sum(dim=0), 0.05)
        means = (won.T @ rows) / won.sum(dim=0).clamp_min(1).unsqueeze(1)
        self.codes.lerp_(torch.where(won.any(dim=0).unsqueeze(1), means, self.codes), 0.2)
        idle = (self.counts < 0.05).unsqueeze(1)
        self.codes.copy_(torch.where(idle, rows[torch.randint(len(rows), (CODES,))], self.codes))
        self.counts.masked_fill_(idle.squeeze(1), 1.0)
