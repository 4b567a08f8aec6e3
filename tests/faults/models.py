"""Random models: small networks of every build, and the module that trains them."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

WIDTH = 16
CLASSES = 4


class Last(nn.Module):
    """A recurrent network that returns the features of the last token."""

    def __init__(self, kind: str = "GRU") -> None:
        super().__init__()
        self.cells = getattr(nn, kind)(4, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0][:, -1]


class Causal(nn.Module):
    """A block of causal attention with torch's fused function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(4, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.norm(self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)))


class Residual(nn.Module):
    """Two residual blocks behind layer normalization; with ``checkpointed`` they run again in the backward pass."""

    def __init__(self, checkpointed: str = "") -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in "12"
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            again = self.checkpointed and torch.is_grad_enabled()
            x = x + (checkpoint(block, x, use_reentrant=self.checkpointed == "reentrant") if again else block(x))
        return x


class Queue(nn.Module):
    """Keeps the latest features in a buffer that the forward pass writes, as momentum contrast does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("queue", torch.zeros(8, WIDTH))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.queue.copy_(torch.cat([out.detach(), self.queue])[:8])
        self.calls += 1
        return out - self.queue.mean(dim=0)


class Functional(nn.Module):
    """Weights of its own that only functions use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(32, WIDTH) / 4)
        self.second = nn.Parameter(torch.randn(WIDTH, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.first)), self.second)


class Adapter(nn.Module):
    """A frozen layer and a trained correction of rank two."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


class Codes(nn.Module):
    """Inputs as whole numbers, embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding((x.nan_to_num().clamp(-2, 2) + 3).long()).mean(dim=1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, WIDTH))


def _conv() -> nn.Module:
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, WIDTH, 3)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), first, nn.BatchNorm2d(8), nn.ReLU(), second, pool, nn.Flatten())


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Linear(4, WIDTH), encoder, nn.Flatten(), nn.Linear(64, WIDTH))


def _shared() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh())


def _parametrized() -> nn.Module:
    normed = nn.utils.parametrizations
    return nn.Sequential(
        normed.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.SiLU(), normed.spectral_norm(nn.Linear(WIDTH, WIDTH))
    )


BODIES = {
    "mlp": _mlp,
    "conv": _conv,
    "transformer": _transformer,
    "causal": lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), Causal(), nn.Flatten(), nn.Linear(64, WIDTH)),
    "gru": lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), Last("GRU")),
    "lstm": lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), Last("LSTM")),
    "residual": Residual,
    "checkpointed": lambda: Residual("plain"),
    "reentrant": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Residual("reentrant")),
    "shared": _shared,
    "parametrized": _parametrized,
    "queue": Queue,
    "functional": Functional,
    "adapter": Adapter,
    "codes": Codes,
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


class Lit(LightningModule):
    """A body, a layer that faults replace, and a head.

    Attributes:
        now: Training steps so far, from 1 in the first; faults go by it.
        middle: What faults replace; its outputs may be odd, see :func:`even`.
    """

    def __init__(self, body: str, optimizer: str, scheduler: str, objective: str, logs: bool) -> None:
        super().__init__()
        self.front = BODIES[body]()
        self.middle: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES if objective == "classes" else 1)
        self.optimizer, self.scheduler, self.objective, self.logs = optimizer, scheduler, objective, logs
        self.now = 0
        self.ran: list[float] = []

    def features(self, x: Tensor) -> Tensor:
        h = self.front(x)
        return h if self.middle is None else even(self.middle(h), h)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def loss(self, batch: Any) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        if self.objective == "views":  # a siamese model: the layers run once for each view
            one, two = (self.features(x + 0.1 * torch.randn_like(x)) for _ in range(2))
            return F.mse_loss(self.head(one), two.mean(dim=1, keepdim=True)) + F.mse_loss(one, two)
        out = self(x)
        return F.cross_entropy(out, y) if self.objective == "classes" else F.mse_loss(out, y.to(out).unsqueeze(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.now += 1
        loss = self.loss(batch)
        self.ran.append(float(loss))
        if self.logs:
            self.report(loss)
        return loss

    @torch.compiler.disable  # else what is logged tells from which step on Dynamo gave up compiling
    def report(self, loss: Tensor) -> None:
        self.log("loss", loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer]([p for p in self.parameters() if p.requires_grad])
        if self.scheduler == "none":
            return optimizer
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": self.scheduler}
        ]


class ManualLit(Lit):
    """The same optimized by hand, with an optimizer for each part."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if loss is not None:
            self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step(closure=None if self.optimizer != "lbfgs" else lambda: loss)

    def configure_optimizers(self) -> Any:
        parts = ([p for p in part.parameters() if p.requires_grad] for part in (self.front, self.middle, self.head))
        return [OPTIMIZERS[self.optimizer](parameters) for parameters in parts]


def even(value: Any, before: Tensor) -> Tensor:
    """An odd output as a dense real tensor like ``before``, which stands in for what cannot be one."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        value = next((each for each in value if isinstance(each, Tensor)), None)
    if not isinstance(value, Tensor):
        return before
    if value.is_nested:
        value = torch.cat(value.unbind())
    if value.layout != torch.strided:
        value = value.to_dense()
    if value.is_complex():
        value = value.real
    if value.ndim == 0:
        return before * (1 + 0 * value.to(before.dtype))
    if value.ndim > 2:
        value = value.flatten(1)
    return value.to(before.dtype) if value.shape == before.shape else before
