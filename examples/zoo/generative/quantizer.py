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


class Projected(nn.Module):
    """A codebook that follows gradients, at PyTorch's defaults for an embedding; with a matrix all codes move (SimVQ).

    Args:
        matrix: Whether codes are fixed and pass through a Linear that is trained, as in Zhu et al. (2024, arXiv
            2411.02038), code of the authors.
    """

    def __init__(self, matrix: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(CODES, WIDTH)
        nn.init.normal_(self.table.weight, std=WIDTH**-0.5)
        self.table.weight.requires_grad_(not matrix)
        self.project = nn.Linear(WIDTH, WIDTH) if matrix else nn.Identity()

    @property
    def codes(self) -> Tensor:
        """As they are compared."""
        codes: Tensor = self.project(self.table.weight)
        return codes

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of rows, with the gradient of the rows, and the loss that draws both together."""
        table = self.codes
        codes = nn.functional.embedding(torch.cdist(rows, table).argmin(dim=1), table)
        loss = (codes - rows.detach()).square().mean() + 0.25 * (codes.detach() - rows).square().mean()
        return rows + (codes - rows).detach(), loss


class Residual(nn.Module):
    """Codebooks with restarts, each of what the one before it has left."""

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Codebook(restarts=True) for _ in range(levels))

    @property
    def codes(self) -> Tensor:
        """Those of the first level."""
        first = self.levels[0]
        assert isinstance(first, Codebook)
        return first.codes

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of their codes, and of their losses."""
        whole, losses = torch.zeros_like(rows), rows.new_zeros(())
        for level in self.levels:
            codes, loss = level(rows - whole.detach())
            whole = whole + codes
            losses = losses + loss
        return rows + (whole - rows).detach(), losses
