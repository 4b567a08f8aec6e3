"""Which quantizers keep their codes in use? Six of them, on a linear map of Gaussians and on handwritten digits.

Run: ``python examples/latents/vq.py`` (two minutes on one core; with ``--quick`` one short run).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_collapse.functional import assignment_null, effective_rank
from lightning_collapse.functional.assignment import perplexity
from lightning_collapse.layers import EMAVectorQuantizer, SimVQ, VectorQuantizer

WIDTH, BATCH = 8, 128


RATES = 1e-3, 3e-3


def wide_vq(codes: int, dim: int) -> VectorQuantizer:
    """Codes that begin as those of a new ``nn.Embedding``."""
    quantizer = VectorQuantizer(codes, dim)
    nn.init.normal_(quantizer.codebook.weight)
    return quantizer


def sim_vq(codes: int, dim: int) -> VectorQuantizer:
    """A new SimVQ."""
    quantizer = VectorQuantizer(codes, dim)
    SimVQ.convert_(quantizer, init="published")
    return quantizer


QUANTIZERS: dict[str, Callable[[int, int], VectorQuantizer]] = {
    "VQ": VectorQuantizer,
    "VQ, Gaussian codes": wide_vq,
    "VQ, rotation trick": lambda codes, dim: VectorQuantizer(codes, dim, estimator="rotation"),
    "EMA": EMAVectorQuantizer,
    "EMA, restarts": lambda codes, dim: EMAVectorQuantizer(codes, dim, restart=True),
    "SimVQ": sim_vq,
}


class Data(NamedTuple):
    """Rows to train on and to read, with labels where there are."""

    codes: int
    tokens: int  # of a row
    train: Tensor
    held_out: Tensor
    labels: tuple[Tensor, Tensor] | None = None


class Reading(NamedTuple):
    """Of held-out rows."""

    usage: float  # share of codes that a row chooses
    perplexity: float
    error: float  # squared, over the variance
    rank: float  # effective, of the chosen codes
    accuracy: float  # of five nearest neighbours among the codes of training rows


class Autoencoder(nn.Module):
    """Rows to a few tokens, to their codes, and back."""

    def __init__(self, data: Data, quantizer: VectorQuantizer) -> None:
        super().__init__()
        inputs, latent = data.train.shape[1], data.tokens * WIDTH
        self.encoder = nn.Sequential(nn.Linear(inputs, 128), nn.GELU(), nn.Linear(128, latent))
        self.encoder.append(nn.Unflatten(1, (data.tokens, WIDTH)))
        self.quantizer = quantizer
        self.decoder = nn.Sequential(nn.Flatten(), nn.Linear(latent, 128), nn.GELU(), nn.Linear(128, inputs))


def gaussians() -> Data:
    """Four Gaussian numbers through a fixed linear map, with noise."""
    generator = torch.Generator().manual_seed(0)
    through = torch.randn(4, 16, generator=generator) / 2  # variances near 1

    def rows(count: int) -> Tensor:
        latent, noise = (torch.randn(count, width, generator=generator) for width in (4, 16))
        return latent @ through + 0.1 * noise

    return Data(256, 1, rows(20_000), rows(4096))


def digits() -> Data:
    """Images of four tokens each; a third is held out."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, held_out = order[: len(order) * 2 // 3], order[len(order) * 2 // 3 :]
    rows = (images / 16).float()
    return Data(512, 4, rows[train], rows[held_out], (labels[train], labels[held_out]))


def train(data: Data, kind: str, rate: float, seed: int, steps: int) -> Autoencoder:
    """With Adam."""
    torch.manual_seed(seed)
    model = Autoencoder(data, QUANTIZERS[kind](data.codes, WIDTH))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        rows = data.train[torch.randint(len(data.train), (BATCH,))]
        quantized, _, loss = model.quantizer(model.encoder(rows))
        optimizer.zero_grad()
        torch.autograd.backward(mse_loss(model.decoder(quantized), rows) + loss)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def read(model: Autoencoder, data: Data) -> Reading:
    """What the held-out rows choose, and what is left of them."""
    quantized, indices, _ = model.quantizer(model.encoder(data.held_out))
    counts = torch.bincount(indices.flatten(), minlength=data.codes).double()
    error = mse_loss(model.decoder(quantized), data.held_out) / data.held_out.var(dim=0, correction=0).mean()
    centered = quantized.flatten(0, 1) - quantized.flatten(0, 1).mean(dim=0)
    accuracy = float("nan")
    if data.labels is not None:
        seen = model.quantizer(model.encoder(data.train)).quantized.flatten(1)
        neighbours = KNeighborsClassifier(5).fit(seen.numpy(), data.labels[0].numpy())
        accuracy = neighbours.score(quantized.flatten(1).numpy(), data.labels[1].numpy())
    used = (counts > 0).double().mean().item()
    rank = effective_rank(torch.linalg.svdvals(centered)).item()
    return Reading(used, perplexity(counts).item(), error.item(), rank, accuracy)


def table(runs: dict[tuple[str, str, float, int], Reading], sets: dict[str, Data], seeds: int) -> str:
    """Medians over seeds and ranges, in Markdown."""
    head = "| data | quantizer | rate | codes used | perplexity | error | rank of codes | nearest neighbours |"
    lines = [head, "|---" * 8 + "|"]
    for name, data in sets.items():
        for kind in QUANTIZERS:
            for rate in RATES:
                some = [runs[name, kind, rate, seed] for seed in range(seeds)]
                cells = [_said([getattr(reading, field) for reading in some]) for field in Reading._fields]
                lines.append(f"| {name} | {kind} | {rate:g} | {' | '.join(cells)} |")
        n = len(data.held_out) * data.tokens
        null = f"{1 - (1 - 1 / data.codes) ** n:.2f} | {assignment_null(n, data.codes):.0f}"
        lines.append(f"| {name} | *equally likely codes* | | {null} | | | |")
    return "\n".join(lines)


def _said(values: Sequence[float]) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    places = 0 if middle >= 10 else 2
    return f"{middle:.{places}f} ({low:.{places}f} to {high:.{places}f})" if middle == middle else ""


def main(steps: int = 500, seeds: int = 3) -> None:
    """Train every quantizer on both, read it, and print the table."""
    sets, runs = {"Gaussians": gaussians(), "digits": digits()}, {}
    for name, data in sets.items():
        for kind in QUANTIZERS:
            for rate in RATES:
                for seed in range(seeds):
                    runs[name, kind, rate, seed] = read(train(data, kind, rate, seed, steps), data)
    print(table(runs, sets, seeds))
    plain, simple = (
        statistics.median(runs["digits", kind, RATES[0], seed].usage for seed in range(seeds))
        for kind in ("VQ", "SimVQ")
    )
    print(f"\nAfter {steps} steps on digits {plain:.0%} of the codes of VQ were in use, of SimVQ {simple:.0%}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 5 steps: to see that it runs")
    main(*((5, 1) if parser.parse_args().quick else ()))
