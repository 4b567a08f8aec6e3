"""What announces a loss explosion? A small GPT on English text, healthy or driven into one in three ways.

Run: ``python examples/loss_explosion.py`` (twelve minutes on one core; with ``--quick`` one short run of each kind).
"""

import argparse
import logging
import math
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_collapse import AttentionEntropyMonitor, CollapseGuard, SpectralAlignmentMonitor
from lightning_collapse.callbacks import Verdict

VOCABULARY, TEXT = torch.unique(
    torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore"))),
    return_inverse=True,
)
CONTEXT, BATCH, WIDTH, HEADS, DEPTH = 48, 16, 64, 4, 3
WARM_UP, ONSET = 50, 200


@dataclass(frozen=True)
class Course:
    """How a run goes: at step 200 something is switched on."""

    rate: float = 5e-3
    growth: float = 1.0  # of the learning rate, per step
    growth_of_logits: float = 1.0  # of the learning rate of queries, keys and values
    bits: int = 0  # of the mantissa of the attention output that the backward pass sees


COURSES = {
    "healthy": Course(rate=1e-3),
    "healthy, fast": Course(),
    "learning rate grows": Course(growth=1.02),
    "attention logits grow": Course(growth_of_logits=1.03),
    "biased rounding": Course(bits=1),
}
HEALTHY = ("healthy", "healthy, fast")


class RoundedAttention(torch.autograd.Function):
    """Causal attention whose output is rounded towards minus infinity, and whose backward pass uses that output.

    As in fused kernels: the gradient of the logits subtracts the dot product of the output and its gradient, so that a
    rounding with a bias, which arXiv:2510.04212 finds in bf16, adds up in the same direction step after step.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bits: int) -> Tensor:
        """Attend, and round."""
        scale = query.shape[-1] ** -0.5
        logits = (query @ key.mT * scale).masked_fill(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1), -math.inf)
        weights = logits.softmax(dim=-1)
        mantissa, exponent = torch.frexp(weights @ value)
        output = torch.ldexp(torch.floor(mantissa * 2**bits) / 2**bits, exponent)
        ctx.save_for_backward(query, key, value, weights, output)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """What a fused kernel computes."""
        query, key, value, weights, output = ctx.saved_tensors
        of_weights = gradient @ value.mT - (gradient * output).sum(dim=-1, keepdim=True)
        of_logits = weights * of_weights * ctx.scale
        return of_logits @ key, of_logits.mT @ query, weights.mT @ gradient, None


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """Features of shape ``(N, L, D)``."""
        qkv = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv)
        attended: Tensor
        if bits:
            attended = RoundedAttention.apply(query, key, value, bits)  # type: ignore[no-untyped-call]
        else:
            attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        output: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return output


class GPT(LightningModule):
    """Next character; nothing in it knows that it is watched."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self.course = course
        self.tokens, self.places = nn.Embedding(len(VOCABULARY), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(VOCABULARY), bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.05)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy of the next character."""
        x = self.tokens(batch[:, :-1]) + self.places.weight
        for block in self.blocks:
            x = block(x, self.course.bits if batch_idx >= ONSET else 0)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up, and what the course does to the learning rate."""
        named = list(self.named_parameters())
        groups = [{"params": [p for name, p in named if (".qkv." in name) == attention]} for attention in (True, False)]
        optimizer = torch.optim.AdamW(groups, lr=self.course.rate, betas=(0.9, 0.95), weight_decay=0.1)
        factors = [self.course.growth * self.course.growth_of_logits, self.course.growth]
        schedule: list[Any] = [partial(_schedule, growth) for growth in factors]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _schedule(growth: float, step: int) -> float:
    return min((step + 1) / WARM_UP, 1.0) * growth ** max(step - ONSET, 0)


class Characters(IterableDataset[Tensor]):
    """Random passages of the text, the same ones for every run of a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            start = torch.randint(len(TEXT) - CONTEXT - 1, (BATCH, 1), generator=generator)
            yield TEXT[start + torch.arange(CONTEXT + 1)]


RULES = {"loss": 2.0, "gradient norm": 3.0, "weight norm": 2.0, "largest activation": 3.0}
"""A signal fires where it exceeds its own median since the warm-up this many times."""
VERDICTS = {"sign diversity": "loss_explosion", "attention entropy": "attention_entropy_collapse"}
SIGNALS = (*VERDICTS, *list(RULES)[1:])


class PlainSignals(Callback):
    """What one would look at without this library, at every step."""

    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {name: [] for name in RULES}
        self._gradient = self._peak = torch.zeros(())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to what enters the last norm."""
        pl_module.norm.register_forward_pre_hook(self._hear)  # type: ignore[union-attr]

    def _hear(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self._peak = args[0].detach().abs().amax()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The gradient's norm."""
        self._gradient = _norm([p.grad for p in pl_module.parameters() if p.grad is not None])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note all four; a run whose loss is not a number any more is over."""
        weights = _norm([p.detach() for p in pl_module.parameters()])
        for name, value in zip(RULES, (outputs["loss"], self._gradient, weights, self._peak), strict=True):
            self.curves[name].append(float(value) if math.isfinite(value) else math.inf)
        trainer.should_stop |= math.isinf(self.curves["loss"][-1])

    def first(self, name: str) -> int | None:
        """The first step at which a signal fires."""
        curve = self.curves[name]
        steps = range(2 * WARM_UP, len(curve))
        return next((i for i in steps if curve[i] > RULES[name] * statistics.median(curve[WARM_UP:i])), None)


def _norm(tensors: list[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))
    return norm


def first_alarms(course: str, seed: int, steps: int) -> tuple[dict[str, int | None], float]:
    """The first step at which each signal fires in one run, ``None`` for never; and the median of its last losses."""
    seed_everything(seed, verbose=False)
    verdicts: list[Verdict] = []
    plain = PlainSignals()
    guard = CollapseGuard(action=lambda trainer, module, verdict: verdicts.append(verdict))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[SpectralAlignmentMonitor(every_n_steps=10), AttentionEntropyMonitor(every_n_steps=10), guard, plain],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(GPT(COURSES[course]), DataLoader(Characters(seed), batch_size=None))
    alarms: dict[str, int | None] = {name: plain.first(name) for name in RULES}
    for name, kind in VERDICTS.items():
        alarms[name] = next((verdict.step for verdict in verdicts if verdict.kind == kind), None)
    return alarms, statistics.median(plain.curves["loss"][-20:])


def table(runs: dict[tuple[str, int], tuple[dict[str, int | None], float]]) -> str:
    """Every run a row, in Markdown, and below the leads over the loss and the false alarms."""
    lines = [f"| run | seed | last loss | loss doubles | {' | '.join(SIGNALS)} |", "|---" * (4 + len(SIGNALS)) + "|"]
    for (course, seed), (alarms, last) in runs.items():
        cells = [_said(alarms[name]) for name in ("loss", *SIGNALS)]
        lines.append(f"| {course} | {seed} | {last:.3g} | {' | '.join(cells)} |")
    failed = [a for (course, _), (a, _) in runs.items() if course not in HEALTHY]
    lines += [
        "",
        "| signal | fired in failing runs | median lead over the loss, steps | false alarms in healthy runs |",
    ]
    lines.append("|---|---|---|---|")
    for name in SIGNALS:
        pairs = [(a["loss"], a[name]) for a in failed]
        leads = [loss - step for loss, step in pairs if loss is not None and step is not None]
        lead = f"{statistics.median(leads):.0f} (of {len(leads)})" if leads else "none"
        fired = sum(a[name] is not None for a in failed)
        healthy = [a[name] is not None for (course, _), (a, _) in runs.items() if course in HEALTHY]
        lines.append(f"| {name} | {fired} of {len(failed)} | {lead} | {sum(healthy)} of {len(healthy)} |")
    return "\n".join(lines)


def _said(step: int | None) -> str:
    return "never" if step is None else str(step)


def main(steps: int = 800, seeds: int = 3, first_seed: int = 3) -> None:
    """Train all runs and print the table; the guard's rules were chosen on seeds 0 to 2."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    some = range(first_seed, first_seed + seeds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        runs = {(course, seed): first_alarms(course, seed, steps) for course in COURSES for seed in some}
    print(table(runs))
    doubled = [alarms["loss"] is not None for (course, _), (alarms, _) in runs.items() if course not in HEALTHY]
    print(
        f"\nAfter {steps} steps the loss had doubled in {sum(doubled)} of {len(doubled)} runs that were driven to it."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps: to see that it runs")
    main(*((60, 1) if parser.parse_args().quick else ()))
