"""Does a network sort images by the scanner they came from? Digits from four scanners, which tell of the digit or not.

Run: ``python examples/heads/scanners.py`` (half a minute on one core; with ``--quick`` one short run each).
"""

import torch
from small_digits import Rows, is_quick, median, split, table, train
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from lightning_collapse.metrics import NuisanceShares

WIDTH = 128
SCANNERS = torch.tensor([[1.0, 0.0, 0.0], [0.7, 0.2, 0.0], [1.0, 0.0, 0.8], [0.5, 0.4, 0.4]])
"""Gain, offset and share of blur of each."""
SHARES = {"balanced scanners": 0.0, "scanner by digit, 95 %": 0.95, "scanner by digit, always": 1.0}
"""Of the digits that come from the scanner of their class; the others are dealt at random."""


def scanned(images: Tensor, scanners: Tensor) -> Tensor:
    """What each scanner makes of an image."""
    gain, offset, blur = SCANNERS[scanners].T.unsqueeze(2)
    square = pad(images.view(-1, 1, 8, 8), (1, 1, 1, 1))
    blurred: Tensor = avg_pool2d(square, 3, stride=1).flatten(1)
    seen: Tensor = gain * (images + blur * (blurred - images)) + offset
    return seen


def everywhere(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Every image from every scanner: images, digits, scanners."""
    scanners = torch.arange(len(SCANNERS)).repeat_interleave(len(rows.digits))
    return scanned(rows.images.repeat(len(SCANNERS), 1), scanners), rows.digits.repeat(len(SCANNERS)), scanners


@torch.no_grad()
def read(body: nn.Module, model: nn.Module, held: Rows) -> dict[str, float]:
    """Of held-out images, each from all scanners, so that digit and scanner are independent."""
    images, digits, scanners = everywhere(held)
    features = body(images)
    metric = NuisanceShares(10, len(SCANNERS), features.shape[1])
    metric.update(features, digits, scanners)
    shares = metric.compute()
    right = (model(images).argmax(dim=1) == digits).double()
    usual = scanners == digits % len(SCANNERS)
    found = {
        "accuracy, scanner of the digit": right[usual].mean(),
        "accuracy, other scanners": right[~usual].mean(),
        "share of digits": shares["between_class"],
        "share of scanners": shares["between_domain"],
        "interaction": shares["interaction"],
        "null of scanners": shares["domain_null"],
        "CDNV of scanners": shares["domain_cdnv"],
    }
    return {name: value.item() for name, value in found.items()}


def learn(share: float, seed: int, steps: int) -> list[dict[str, float]]:
    """Read the features before and after training."""
    torch.manual_seed(seed)
    rows, held = split(seed)
    scanners = torch.randint(len(SCANNERS), rows.digits.shape)
    scanners = torch.where(torch.rand(len(scanners)) < share, rows.digits % len(SCANNERS), scanners)
    rows = Rows(scanned(rows.images, scanners), rows.digits)
    body = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(WIDTH, 10))
    readings = [read(nn.Identity(), model, held), read(body, model, held)]
    list(train(model, lambda x, y, _: cross_entropy(model(x), y), rows, steps))
    return [*readings, read(body, model, held)]


def main(steps: int = 2000, seeds: int = 3) -> None:
    """Train all and print the table."""
    runs: dict[str, list[dict[str, float]]] = {}
    for name, share in SHARES.items():
        pixels, before, after = zip(*(learn(share, seed, steps) for seed in range(seeds)), strict=True)
        runs |= {"pixels, untrained": list(pixels), "features, untrained": list(before)} | runs
        runs[name] = list(after)
    print(table("trained on", runs))
    ends = ", ".join(f"{median(runs[name], 'share of scanners'):.2g} ({name})" for name in SHARES)
    print(f"\nAfter {steps} steps the scanner has a share of the features' variation of {ends}.")


if __name__ == "__main__":
    main(*((5, 1) if is_quick(__doc__) else ()))
