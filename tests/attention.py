"""Small models with attention, in the several ways it is written."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

HEADS, WIDTH, LENGTH, WORDS = 4, 32, 24, 50


class Attention(nn.Module):
    """Causal self-attention of a GPT, with one fused projection."""

    def __init__(self, how="fused", sharpness=1.0):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.softmax = nn.Softmax(dim=-1)
        self.how, self.sharpness = how, sharpness

    def split(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.sharpness * q, k, v

    def forward(self, x):
        q, k, v = self.split(x)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
            weights = {
                "softmax": lambda: F.softmax(scores, dim=-1),
                "method": lambda: scores.softmax(-1),
                "module": lambda: self.softmax(scores),
                "hidden": lambda: (scores - scores.logsumexp(dim=-1, keepdim=True)).exp(),
            }[self.how]()
            y = F.dropout(weights, 0.1, self.training) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention(**kwargs)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class GPT(LightningModule):
    """Two blocks that learn to repeat their input."""

    def __init__(self, checkpointing=False, **kwargs):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(**kwargs) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)
        self.checkpointing = checkpointing

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
                if self.checkpointing
                else block(x)
            )
        return self.head(x)

    def training_step(self, batch, batch_idx):
        tokens = batch["input_ids"] if isinstance(batch, dict) else batch
        return F.cross_entropy(self(tokens).flatten(0, 1), tokens.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Encoder(GPT):
    """The same with torch's own transformer layers."""

    def __init__(self, dropout=0.1):
        LightningModule.__init__(self)
        self.embed = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS)
        self.padding = None

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=self.padding))


def tokens(n=6, size=8, seed=1, **extra):
    """A loader of ``n`` batches of token numbers."""
    data = torch.randint(WORDS, (n * size, LENGTH), generator=torch.Generator().manual_seed(seed))
    if not extra:
        return DataLoader(data, batch_size=size)
    return DataLoader([{"input_ids": row, **extra} for row in data], batch_size=size)


def read_qkv(attn, args, kwargs):
    """How the attention above makes queries and keys."""
    q, k, _ = attn.split(args[0])
    return q, k, True
