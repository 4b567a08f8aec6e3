"""Which loss keeps a representation from collapsing, and how useful is what it keeps? One encoder, one budget for all.

Run: ``python examples/leaderboard.py`` (25 minutes on one core; with ``--quick`` a few steps of each, on digits).
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_collapse import losses
from lightning_collapse.demo import Digits, JointEmbedding, augment, linear_accuracy, load_digits
from lightning_collapse.functional import alpha_req, effective_rank
from lightning_collapse.spectral import singular_values

STEPS, BATCH, SEEDS, NEIGHBOURS = 100, 256, 3, 20
WIDE = 256  # a sub-batch of W-MSE, which must have more rows than there are features


class Recipe(NamedTuple):
    """Losses with their published settings, and the weight of the agreement of the views that goes with them.

    AdamW does not feel the scale of an objective: what counts is how its parts stand to each other.
    """

    terms: Mapping[str, nn.Module | tuple[float, nn.Module]]
    agreement: float = 0.0  # of the mean squared difference over samples and features; 0 where a loss has its own


RECIPES: dict[str, Callable[[], Recipe]] = {
    "agreement alone": lambda: Recipe({}, 1.0),
    "VICReg": lambda: Recipe({"vicreg": losses.VICReg()}),
    "VCReg + agreement": lambda: Recipe({"vcreg": losses.VCReg()}, 0.16),
    "Barlow Twins": lambda: Recipe({"barlow": losses.BarlowTwins()}),
    "W-MSE": lambda: Recipe({"wmse": losses.WMSE(sub_batch=WIDE)}),
    "CW-RGP": lambda: Recipe({"cw_rgp": losses.CWRGP(sub_batch=32, groups=2)}),
    "spectral power 1/2": lambda: Recipe({"power": losses.SpectralTransformation()}),
    "INTL": lambda: Recipe({"intl": losses.INTL()}),
    "MMCR": lambda: Recipe({"mmcr": losses.MMCR()}),
    "CorInfoMax": lambda: Recipe({"corinfomax": losses.CorInfoMax()}),
    "SIGReg + agreement (LeJEPA)": lambda: Recipe({"sigreg": (0.05, losses.SIGReg())}, 0.95 / 4),
    "VISReg + agreement": lambda: Recipe({"visreg": (0.6, losses.VISReg())}, 0.4 / 4),
    "coding rate + alignment (EMP-SSL)": lambda: Recipe(
        {"rate": losses.CodingRate(), "alignment": (25.0, losses.Alignment())}
    ),
    "alignment + uniformity": lambda: Recipe({"alignment": losses.Alignment(), "uniformity": losses.Uniformity()}),
    "KoLeo + alignment": lambda: Recipe({"koleo": (0.1, losses.KoLeo()), "alignment": losses.Alignment()}),
    "T-REGS": lambda: Recipe({"tregs": losses.TREGS()}),
    "VICReg + LDReg": lambda: Recipe({"vicreg": losses.VICReg(), "ldreg": (0.01, losses.LDReg())}),
    "SimTPR's decorrelation": lambda: Recipe({"decorrelation": losses.FeatureDecorrelation()}),
    "effective-rank hinge + agreement": lambda: Recipe({"hinge": losses.EffectiveRankHinge()}, 1.0),
    "log-det barrier + agreement": lambda: Recipe({"barrier": losses.LogDetBarrier()}, 1.0),
}
"""With published weights where there are some: LeJEPA's distance of two views to their mean is a quarter of that
between them, and EMP-SSL's 200 cosines to the mean are 25 alignments. VCReg's, KoLeo's and the last two's are ours."""


class Student(JointEmbedding):
    """The demo's encoder and projector, trained by a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(regularized=True)
        self.agreement = recipe.agreement
        self.set_regularizers(recipe.terms)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Two views of the images; a loss of one view is that of both."""
        views = [self(augment(batch[0])) for _ in range(2)]
        loss = self.agreement * nn.functional.mse_loss(*views)
        for name, (_, term) in self.regularizers.items():
            if getattr(term, "views", 1) == 2:
                loss = loss + self.anti_collapse_loss(*views, names=[name])
            else:
                loss = loss + sum(self.anti_collapse_loss(view, names=[name]) for view in views) / 2
        return loss


class Reading(NamedTuple):
    """Of the encoder's features of held-out images."""

    rank: float
    alpha: float
    neighbours: float  # accuracy of the nearest training images' majority
    linear: float


def photographs(per_cell: int = 200, size: int = 8) -> Digits:
    """Gray patches of scikit-learn's two photographs; which photograph and which third of its height is the label.

    Training patches are from the left two thirds, held-out ones from the rest.
    """
    generator = torch.Generator().manual_seed(0)
    parts: dict[bool, tuple[list[Tensor], list[int]]] = {False: ([], []), True: ([], [])}
    for photograph, pixels in enumerate(load_sample_images().images):
        gray = torch.tensor(pixels, dtype=torch.float32).mean(dim=2)[::2, ::2] / 255
        height, width = gray.shape[0] // 3, gray.shape[1]
        for third in range(3):
            for held_out, (left, right) in ((False, (0, 2 * width // 3)), (True, (2 * width // 3, width))):
                count = per_cell // 2 if held_out else per_cell
                tops = torch.randint(third * height, (third + 1) * height - size, (count,), generator=generator)
                lefts = torch.randint(left, right - size, (count,), generator=generator)
                images, labels = parts[held_out]
                images += [gray[y : y + size, x : x + size] for y, x in zip(tops.tolist(), lefts.tolist(), strict=True)]
                labels += [3 * photograph + third] * count
    (train, train_labels), (test, test_labels) = parts.values()
    stacked = [torch.stack(images).unsqueeze(1) for images in (train, test)]
    return Digits(stacked[0], torch.tensor(train_labels), stacked[1], torch.tensor(test_labels))


@torch.no_grad()
def read(model: Student, images: Digits) -> Reading:
    """Measure."""
    train, test = (model.encoder(part).double() for part in (images.train_images, images.test_images))
    values = singular_values(test)
    center = train.mean(dim=0)
    near = torch.cdist(test - center, train - center).topk(NEIGHBOURS, largest=False).indices
    votes = nn.functional.one_hot(images.train_labels)[near].sum(dim=1)
    return Reading(
        effective_rank(values).item(),
        alpha_req(values).item(),
        (votes.argmax(dim=1) == images.test_labels).double().mean().item(),
        linear_accuracy(train, test, images),
    )


def train(name: str, images: Digits, seed: int, steps: int) -> Reading:
    """Train once, and read."""
    seed_everything(seed, verbose=False)
    model = Student(RECIPES[name]())
    data = TensorDataset(images.train_images)
    sampler = RandomSampler(data, replacement=True, num_samples=steps * BATCH)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, BATCH, sampler=sampler))
    return read(model, images)


def step_times(rounds: int) -> dict[str, float]:
    """Processor time of a training step of each, forward and backward, over that of VICReg in the same round."""
    seed_everything(0, verbose=False)
    batch, models = [torch.rand(BATCH, 1, 8, 8)], {name: Student(recipe()) for name, recipe in RECIPES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in RECIPES}
    for _ in range(rounds + 1):  # the first warms up
        for name, model in models.items():
            start = time.process_time()
            torch.autograd.backward(model.training_step(batch, 0))
            seconds[name].append(time.process_time() - start)
    pairs = {name: zip(times[1:], seconds["VICReg"][1:], strict=True) for name, times in seconds.items()}
    return {name: statistics.median(own / vicreg for own, vicreg in both) for name, both in pairs.items()}


def table(runs: dict[tuple[str, str, int], Reading], times: dict[str, float]) -> str:
    """Per loss and data the median over the seeds, in Markdown; accuracies with their range."""
    sets = list(dict.fromkeys(data for _, data, _ in runs))
    heads = [f"{data}: {what}" for data in sets for what in ("effective rank", "alpha", "kNN", "linear")]
    lines = [f"| loss | step | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for name in RECIPES:
        cells = [f"{times[name]:.2f}"]
        for data in sets:
            some = [reading for (a, b, _), reading in runs.items() if (a, b) == (name, data)]
            rank, alpha, *accuracies = zip(*some, strict=True)
            cells += [f"{statistics.median(values):.3g}" for values in (rank, alpha)]
            cells += [f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in accuracies]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(steps: int = STEPS, seeds: int = SEEDS, quick: bool = False) -> None:
    """Train all and print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data = {"digits": load_digits()} | ({} if quick else {"photographs": photographs()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        runs = {
            (name, which, seed): train(name, images, seed, steps)
            for name in RECIPES
            for which, images in data.items()
            for seed in range(seeds)
        }
        times = step_times(1 if quick else 15)
    print(table(runs, times))
    best = max(
        RECIPES, key=lambda name: statistics.median(runs[name, "digits", seed].neighbours for seed in range(seeds))
    )
    print(f"\nAfter {steps} steps of {BATCH} digits the neighbours of {best} know most.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 2 steps, digits alone: to see that it runs")
    main(*((2, 1, True) if parser.parse_args().quick else ()))
