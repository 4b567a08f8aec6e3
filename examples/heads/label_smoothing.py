"""Does label smoothing fold classes into points, and does MaxSup not? Six digits are learned, four are new.

Run: ``python examples/heads/label_smoothing.py`` (a minute on one core; with ``--quick`` one short run each).
"""

from collections.abc import Callable

import torch
from small_digits import Rows, is_quick, median, split, table, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from lightning_collapse.functional.factors import linear_probe
from lightning_collapse.losses import MaxSup

WIDTH, KNOWN, NEW = 128, range(6), range(6, 10)
MAX_SUP = MaxSup()
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cross-entropy": lambda logits, labels, _: cross_entropy(logits, labels),
    "label smoothing 0.1": lambda logits, labels, _: cross_entropy(logits, labels, label_smoothing=0.1),
    "MaxSup 0.1": lambda logits, labels, _: cross_entropy(logits, labels) + MAX_SUP(logits),
    "MaxSup 0.1 to 0.2": lambda logits, labels, done: cross_entropy(logits, labels) + (1 + done) * MAX_SUP(logits),
}
"""Of logits, labels and the share of training that is done."""


def variation(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine distance of pairs of one class, and of all pairs, each class as heavy as the others."""
    centers = torch.stack([normalize(features[labels == label]).mean(dim=0) for label in range(len(KNOWN))])
    return (1 - centers.square().sum(dim=1)).mean(), 1 - centers.mean(dim=0).square().sum()


@torch.no_grad()
def read(model: nn.Sequential, rows: Rows, held: Rows) -> dict[str, float]:
    """Of the last hidden layer."""
    body, (known, known_held) = model.eval()[:-1], (part.of(KNOWN) for part in (rows, held))
    found = {"test error": (model(known_held.images).argmax(dim=1) != known_held.digits).double().mean()}
    for name, part in (("training", known), ("held-out", known_held)):
        within, total = variation(body(part.images), part.digits)
        found |= {f"variation within classes, {name}": within, f"separation, {name}": 1 - within / total}
    new, new_held = (part.of(NEW) for part in (rows, held))
    targets = (one_hot(part.digits, len(NEW)).float() for part in (new, new_held))
    target, target_held = targets
    found["probe of new digits"] = linear_probe(body(new.images), target, body(new_held.images), target_held).mean()
    return {name: value.item() for name, value in found.items()}


def learn(loss: str, seed: int, steps: int) -> dict[str, float]:
    """Train once, and read."""
    torch.manual_seed(seed)
    rows, held = split(seed)
    model = nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, len(KNOWN))
    )
    list(train(model, lambda x, y, done: LOSSES[loss](model(x), y, done), rows.of(KNOWN), steps))
    return read(model, rows, held)


def main(steps: int = 3000, seeds: int = 3) -> None:
    """Train all and print the table."""
    runs = {loss: [learn(loss, seed, steps) for seed in range(seeds)] for loss in LOSSES}
    print(table("loss", runs))
    within = ", ".join(f"{median(found, 'variation within classes, training'):.2g} ({loss})"
                       for loss, found in runs.items())  # fmt: skip
    print(f"\nAfter {steps} steps images of one class are apart by a cosine distance of {within}.")


if __name__ == "__main__":
    main(*((5, 1) if is_quick(__doc__) else ()))
