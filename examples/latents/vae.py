"""What keeps the latent of a VAE alive, and does it tell of the input then? Small ones of digits and of photographs.

Run: ``python examples/latents/vae.py`` (five minutes on one core; with ``--quick`` a few steps of each, on digits).
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_collapse import AntiCollapseMixin
from lightning_collapse.demo import load_digits
from lightning_collapse.functional import effective_rank, mutual_information
from lightning_collapse.layers import InverseLipschitzDecoder
from lightning_collapse.losses import AntiCollapseLoss, DeltaVAE, FreeBits, LinearRamp, LinearWarmup
from lightning_collapse.spectral import singular_values

STEPS, BATCH, SEEDS, UNITS, HIDDEN, NEIGHBOURS = 1000, 128, 3, 16, 128, 20


class Recipe(NamedTuple):
    """What stands in the loss beside the squared error, and the L of the decoder as a function of the step, if any."""

    divergence: AntiCollapseLoss
    weight: float | Callable[[int], float]
    lipschitz: Callable[[int], float] | None = None


def recipes(steps: int) -> dict[str, Recipe]:
    """Four weights, and what is to help at the largest."""
    plain = FreeBits(floor=0.0)
    return {
        "beta 1": Recipe(plain, 1.0),
        "beta 2": Recipe(plain, 2.0),
        "beta 4": Recipe(plain, 4.0),
        "beta 20": Recipe(plain, 20.0),
        "beta 20, warm-up": Recipe(plain, LinearWarmup(20.0, steps // 2)),
        "beta 20, free bits of 0.25": Recipe(FreeBits(), 20.0),
        "beta 20, delta-VAE": Recipe(DeltaVAE(correlation=0.8, channels=2), 20.0),
        "beta 20, inverse Lipschitz, L = 1": Recipe(plain, 20.0, lambda step: 1.0),
        "beta 20, inverse Lipschitz, L = 4": Recipe(plain, 20.0, lambda step: 4.0),
        "beta 20, L from 4 to 1": Recipe(plain, 20.0, LinearRamp(4.0, 1.0, steps)),
    }


class VAE(AntiCollapseMixin, LightningModule):
    """A Gaussian decoder of unit variance: half the squared error, summed over pixels."""

    def __init__(self, recipe: Recipe, pixels: int) -> None:
        super().__init__()
        self.set_regularizers({"divergence": (recipe.weight, recipe.divergence)})
        self.lipschitz = recipe.lipschitz
        self.encoder = nn.Sequential(nn.Linear(pixels, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2 * UNITS))
        self.decoder: nn.Module = nn.Sequential(nn.Linear(UNITS, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, pixels))
        if recipe.lipschitz is not None:
            self.decoder = InverseLipschitzDecoder(UNITS, pixels, HIDDEN, depth=1, lipschitz=recipe.lipschitz(0))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Squared error and divergence of a batch."""
        if isinstance(self.decoder, InverseLipschitzDecoder) and self.lipschitz is not None:
            self.decoder.set_lipschitz(self.lipschitz(self.global_step))
        moments = self.encoder(batch[0])
        mean, log_variance = moments.chunk(2, dim=1)
        outputs = self.decoder(mean + (log_variance / 2).exp() * torch.randn_like(mean))
        error: Tensor = (outputs - batch[0]).square().sum(dim=1).mean() / 2
        return error + self.anti_collapse_loss(moments)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


class Images(NamedTuple):
    """Rows of pixels of mean 0 and of variance 1 on average, and what they show."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Reading(NamedTuple):
    """Of the posteriors of held-out images."""

    active: float  # units whose mean varies by more than 0.01
    divergence: float  # from the model's own prior, in nats
    information: float  # of latent and input, in nats, a lower estimate from all images: no more than their logarithm
    rank: float  # effective rank of the means
    explained: float  # share of the variance of pixels that the decoder makes of the means
    neighbours: float  # accuracy of the nearest training images' majority, by the means


def standardized(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Images:
    """One shift per pixel, and one scale for all."""
    train, test = train.flatten(1), test.flatten(1)
    center = train.mean(dim=0)
    scale = (train - center).square().mean().sqrt()
    return Images((train - center) / scale, train_labels, (test - center) / scale, test_labels)


def photographs(per_cell: int = 400, size: int = 8) -> Images:
    """Gray patches of two photographs; which one and which third of its height is the label. Held out: the right."""
    generator, parts = torch.Generator().manual_seed(0), []
    for held_out in (False, True):
        patches, labels = [], []
        for number, pixels in enumerate(load_sample_images().images):
            gray = torch.tensor(pixels, dtype=torch.float32).mean(dim=2)[::2, ::2] / 255
            third, border = gray.shape[0] // 3, 2 * gray.shape[1] // 3
            left, right = (border, gray.shape[1]) if held_out else (0, border)
            every = gray.unfold(0, size, 1).unfold(1, size, 1)[:, left : right - size]
            for part in range(3):
                cell = every[part * third : (part + 1) * third - size].flatten(0, 1)
                patches.append(cell[torch.randperm(len(cell), generator=generator)[: per_cell // (1 + 3 * held_out)]])
                labels += [3 * number + part] * len(patches[-1])
        parts += [torch.cat(patches), torch.tensor(labels)]
    return standardized(*parts)


def neighbours(train: Tensor, test: Tensor, images: Images) -> float:
    """Accuracy of the majority of the nearest training rows."""
    near = torch.cdist(test, train).topk(NEIGHBOURS, largest=False).indices
    votes = nn.functional.one_hot(images.train_labels)[near].sum(dim=1).argmax(dim=1)
    return (votes == images.test_labels).double().mean().item()


@torch.no_grad()
def read(model: VAE, images: Images) -> Reading:
    """Measure on held-out images."""
    moments, known = model.encoder(images.test), model.encoder(images.train)[:, :UNITS]
    mean, log_variance = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    samples = mean + (log_variance / 2).exp() * noise
    divergence = model.regularizers["divergence"][1]
    plain = divergence if isinstance(divergence, DeltaVAE) else FreeBits(floor=0.0)
    left = (model.decoder(mean) - images.test).square().sum() / images.test.square().sum()
    return Reading(
        (mean.var(dim=0) > 0.01).sum().item(),
        plain(moments).item(),
        mutual_information(mean, log_variance, samples)[0].item(),
        effective_rank(singular_values(mean.double())).item(),
        1 - left.item(),
        neighbours(known, mean, images),
    )


def train(recipe: Recipe, images: Images, seed: int, steps: int) -> Reading:
    """Train once, and read."""
    seed_everything(seed, verbose=False)
    model, data = VAE(recipe, images.train.shape[1]), TensorDataset(images.train)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sampler = RandomSampler(data, replacement=True, num_samples=steps * BATCH)
    trainer.fit(model, DataLoader(data, BATCH, sampler=sampler))
    return read(model, images)


def table(runs: dict[tuple[str, int], Reading], seeds: int) -> str:
    """Medians over seeds and ranges, in Markdown."""
    head = "| | active units | KL | information | rank | explained | kNN |"
    lines = [head, "|---" * 7 + "|"]
    for name in dict.fromkeys(name for name, _ in runs):
        some = [runs[name, seed] for seed in range(seeds)]
        cells = [_said([getattr(reading, field) for reading in some]) for field in Reading._fields]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(values: Sequence[float]) -> str:
    low, high = (f"{end:.3g}" for end in (min(values), max(values)))
    return low if low == high else f"{statistics.median(values):.3g} ({low} to {high})"


def main(steps: int = STEPS, seeds: int = SEEDS, photos: bool = True) -> None:
    """Train by all recipes, and print the tables."""
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    digits = load_digits()
    sets = {"Digits": standardized(digits.train_images, digits.train_labels, digits.test_images, digits.test_labels)}
    if photos:
        sets["Photographs"] = photographs()
    for title, images in sets.items():
        largest = singular_values(images.train).square()[:3] / len(images.train)
        pixels = neighbours(images.train, images.test, images)
        said = ", ".join(f"{value:.3g}" for value in largest)
        print(f"{title}: largest eigenvalues of the pixels {said}; their nearest neighbours {pixels:.3f}.\n")
        runs = {
            (name, seed): train(recipe, images, seed, steps)
            for name, recipe in recipes(steps).items()
            for seed in range(seeds)
        }
        print(table(runs, seeds) + "\n")
    kept = statistics.median(runs["beta 20, free bits of 0.25", seed].divergence for seed in range(seeds))
    print(f"After {steps} steps free bits kept {kept:.2f} nats of divergence at beta 20.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 5 steps, digits alone: to see that it runs")
    main(*((5, 1, False) if parser.parse_args().quick else ()))
