"""Do supervised losses fold what is finer than their labels? Odd and even digits are told, and the digit is asked.

Run: ``python examples/heads/subclasses.py`` (four minutes on one core; with ``--quick`` one short run each).
"""

from collections.abc import Callable

import torch
from small_digits import Rows, is_quick, median, split, table
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_collapse.functional.factors import subclass_accuracy, subclass_cdnv
from lightning_collapse.losses import InfoNCE, SpreadLoss, SupCon
from lightning_collapse.spectral import ClassMoments

BATCH, RATE, NOISE = 256, 1e-3, 0.1
SUP_CON, JOINT, MOSTLY, SPREAD, SIM_CLR = SupCon(), SupCon(beta=0.5), SupCon(beta=0.1), SpreadLoss(), InfoNCE()
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "SupCon": lambda first, second, labels: SUP_CON(first, second, labels),
    "SupCon, a tenth SimCLR": lambda first, second, labels: MOSTLY(first, second, labels),
    "SupCon, half SimCLR": lambda first, second, labels: JOINT(first, second, labels),
    "SpreadLoss": lambda first, second, labels: SPREAD(first, second, labels),
    "SimCLR": lambda first, second, labels: SIM_CLR(first, second),
}


def view(images: Tensor) -> Tensor:
    """Each image moved by up to a pixel, with noise."""
    square = images.view(-1, 8, 8)
    places = torch.arange(8) + torch.randint(-1, 2, (2, len(images), 1))
    down, right = places % 8
    moved = square.gather(1, down.unsqueeze(2).expand(-1, 8, 8)).gather(2, right.unsqueeze(1).expand(-1, 8, 8))
    return moved.flatten(1) + NOISE * torch.randn_like(images)


def folded(features: Tensor, digits: Tensor) -> dict[str, Tensor]:
    """How well the digit is told among those of its parity, and what noise would read."""
    found, moments = subclass_accuracy(features, digits % 2, digits), ClassMoments(10, features.shape[1])
    moments.update(features, digits)
    cdnv = subclass_cdnv(moments.means, moments.within_traces / moments.count, moments.count, torch.arange(10) % 2)
    return {"accuracy": found.accuracy, "null": found.null, "CDNV": cdnv.mean}


@torch.no_grad()
def read(encoder: nn.Module, projector: nn.Module, rows: Rows, held: Rows) -> dict[str, float]:
    """Of the projections, which the loss is of, and of the features before them."""
    found: dict[str, Tensor] = {}
    for name, part in (("training", rows), ("held-out", held)):
        features = encoder(part.images)
        of_loss = folded(normalize(projector(features)), part.digits)
        found |= {f"projections, {name}: {measure}": value for measure, value in of_loss.items()}
    before = folded(features, held.digits)
    found |= {f"features, held-out: {measure}": before[measure] for measure in ("accuracy", "CDNV")}
    return {name: value.item() for name, value in found.items() if not name.endswith("training: null")}


def learn(loss: str, seed: int, steps: int) -> dict[str, float]:
    """Train once, and read; ``"untrained"`` only reads."""
    torch.manual_seed(seed)
    rows, held = split(seed)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
    projector = nn.Linear(128, 64)
    optimizer = torch.optim.Adam([*encoder.parameters(), *projector.parameters()], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps if loss in LOSSES else 0):
        picked = torch.randint(len(rows.digits), (BATCH,))
        views = (normalize(projector(encoder(view(rows.images[picked])))) for _ in range(2))
        optimizer.zero_grad()
        LOSSES[loss](*views, rows.digits[picked] % 2).backward()  # type: ignore[call-arg, no-untyped-call]
        optimizer.step()
        schedule.step()
    return read(encoder, projector, rows, held)


def main(steps: int = 1000, seeds: int = 3) -> None:
    """Train all and print the table."""
    runs = {loss: [learn(loss, seed, steps) for seed in range(seeds)] for loss in ("untrained", *LOSSES)}
    print(table("loss", runs))
    told = ", ".join(f"{median(found, 'projections, held-out: accuracy'):.2f} ({loss})" for loss, found in runs.items())
    print(f"\nAfter {steps} steps the digit is told within its parity at {told}.")


if __name__ == "__main__":
    main(*((2, 1) if is_quick(__doc__) else ()))
