"""Denoising diffusion (DDPM) of small digits: a network that predicts noise, its data, its sampler, its coherence."""

import math

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from lightning_collapse.functional.sample_gradients import rank_one_share

PIXELS, CLASSES, STEPS, WIDTH, BATCH, RATE = 64, 10, 1000, 192, 128, 2e-3
SIGNAL = (0.98 * torch.linspace(0.001, 1, STEPS) + 0.008).div(1.008).mul(math.pi / 2).cos().square()
"""Share of the variance that is the signal's at each step: the cosine schedule, down to a ratio to noise of 1e-3."""
Batch = tuple[Tensor, Tensor]
"""What the network sees, ``(N, 75)``: noisy pixels, one number per class, and time; and the noise, ``(N, 64)``."""


class Denoiser(LightningModule):
    """Two hidden layers, 66 thousand weights, Adam. The loss is that of a Gaussian of unit variance."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1, 7))
        sizes = PIXELS + CLASSES + 16
        layers = nn.Linear(sizes, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, PIXELS)
        self.net = nn.Sequential(*layers)

    def forward(self, seen: Tensor) -> Tensor:
        """The noise."""
        phases = seen[:, -1:] * self.frequencies
        noise: Tensor = self.net(torch.cat([seen[:, :-1], phases.sin(), phases.cos()], dim=1))
        return noise

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Half the squared distance, summed over pixels."""
        seen, noise = batch
        loss: Tensor = (self(seen) - noise).square().sum(dim=1).mean() / 2
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As in the paper, at a higher rate."""
        return torch.optim.Adam(self.parameters(), lr=RATE)


def noised(
    images: Tensor,
    labels: Tensor,
    between: tuple[int, int] = (0, STEPS),
    generator: torch.Generator | None = None,
) -> Batch:
    """Images, from -1 to 1, at random steps of the diffusion."""
    steps = torch.randint(*between, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    left = SIGNAL[steps].unsqueeze(1)
    return seen_at(left.sqrt() * images + (1 - left).sqrt() * noise, labels, steps), noise


def seen_at(pixels: Tensor, labels: Tensor, steps: Tensor) -> Tensor:
    """What the network is given."""
    classes = nn.functional.one_hot(labels, CLASSES)
    return torch.cat([pixels, classes, steps.unsqueeze(1) / STEPS], dim=1)


@torch.no_grad()
def generate(model: nn.Module, labels: Tensor, count: int = 25) -> Tensor:
    """Images of some classes by ``count`` steps without noise (DDIM)."""
    pixels = torch.randn(len(labels), PIXELS)
    times = torch.linspace(STEPS - 1, 0, count).long().tolist()
    for now, then in zip(times, [*times[1:], -1], strict=True):
        noise = model(seen_at(pixels, labels, torch.full((len(labels),), now)))
        clean = ((pixels - (1 - SIGNAL[now]).sqrt() * noise) / SIGNAL[now].sqrt()).clamp(-1, 1)
        noise = (pixels - SIGNAL[now].sqrt() * clean) / (1 - SIGNAL[now]).sqrt()
        left = SIGNAL[then] if then >= 0 else torch.tensor(1.0)
        pixels = left.sqrt() * clean + (1 - left).sqrt() * noise
    return pixels


class FreshNoise(Dataset[Batch]):
    """Batches of a task, each time with other noise."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: list[int]) -> Batch:
        return noised(self.images[rows], self.labels[rows])


def training_batches(images: Tensor, labels: Tensor, steps: int) -> DataLoader[Batch]:
    """So many, of rows drawn with replacement."""
    data = FreshNoise(images, labels)
    rows = RandomSampler(data, replacement=True, num_samples=steps * BATCH)
    return DataLoader(data, sampler=BatchSampler(rows, BATCH, drop_last=True), batch_size=None)


def fixed_batches(images: Tensor, labels: Tensor, seed: int, repeats: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    """Every image at some steps, the same whenever they are read."""
    made = noised(images.repeat(repeats, 1), labels.repeat(repeats), generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(*made), batch_size=256)


def coherence(model: Denoiser, batch: Batch) -> tuple[float, float]:
    """How near to rank one the Fisher information of a batch is.

    Returns:
        Share of its trace along the mean gradient, without the bias of few samples, and its second eigenvalue over the
        first.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], seen: Tensor, noise: Tensor) -> Tensor:
        answer: Tensor = functional_call(model, weights, (seen.unsqueeze(0),))
        return (answer - noise).square().sum() / 2

    with torch.no_grad():
        found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, *batch)
        rows = torch.cat([gradient.flatten(1) for gradient in found.values()], dim=1)
        products = (rows @ rows.T).double()
    share = rank_one_share(products.mean(), products.diagonal().mean(), len(rows))
    largest = torch.linalg.eigvalsh(products)[-2:]
    return share.item(), (largest[0] / largest[1]).item()
