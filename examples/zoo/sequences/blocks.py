"""Blocks of transformers that specimens of sequences share."""

from typing import Literal

from torch import Tensor, nn

from examples.zoo.material import mlp


class Attention(nn.Module):
    """Attention of several heads; ``sharpness`` multiplies its logits."""

    def __init__(self, width: int, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal, self.sharpness = heads, causal, 1.0
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """``(N, L, D)``; ``padding`` is true where a token of ``(N, L)`` is none."""
        parts = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mask = None if padding is None else ~padding[:, None, None, :]
        attended = nn.functional.scaled_dot_product_attention(
            query * self.sharpness, key, value, attn_mask=mask, is_causal=self.causal
        )
        output: Tensor = self.out(attended.transpose(1, 2).flatten(-2))
        return output


class Block(nn.Module):
    """Attention and MLP, with LayerNorm before (``"pre"``) or behind (``"post"``) them, with or without a residual."""

    def __init__(
        self,
        width: int,
        heads: int = 4,
        causal: bool = False,
        norm: Literal["pre", "post", "none"] = "pre",
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.norm, self.residual = norm, residual
        self.attention, self.mlp = Attention(width, heads, causal), mlp(width, 2 * width, width)
        self.norm1, self.norm2 = (nn.Identity() if norm == "none" else nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, L, D)``."""
        return self._branch(self._branch(x, self.attention, self.norm1), self.mlp, self.norm2)

    def _branch(self, x: Tensor, branch: nn.Module, norm: nn.Module) -> Tensor:
        output: Tensor = branch(norm(x) if self.norm == "pre" else x)
        if self.residual:
            output = x + output
        return output if self.norm == "pre" else norm(output)
