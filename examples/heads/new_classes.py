"""Does neural collapse reach classes that were never seen? Seven digits are learned, three are new.

Run: ``python examples/heads/new_classes.py`` (a minute on one core; with ``--quick`` one short run).
"""

import torch
from small_digits import Rows, is_quick, median, split, table, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_collapse.functional import cdnv, nearest_class_center
from lightning_collapse.spectral import ClassMoments

WIDTH, NEW, DRAWS = 128, 3, 50
POINTS = (0, 10, 30, 100, 300, 1000, 3000)


def spread(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean class-distance normalized variance."""
    moments = ClassMoments(classes, features.shape[1])
    moments.update(features, labels)
    return cdnv(moments.means, moments.within_traces / moments.count, moments.count).mean


def few_shot(features: Tensor, labels: Tensor, shots: int) -> float:
    """Accuracy of the nearest mean of so many rows per class for the other rows, on average over many draws."""
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(DRAWS):
        order = torch.randperm(len(labels), generator=generator)
        rows, classes = features[order], labels[order]
        given = torch.stack([(classes == label).nonzero().flatten()[:shots] for label in range(NEW)])
        asked = torch.ones(len(labels), dtype=torch.bool).index_fill(0, given.flatten(), False)
        guessed = nearest_class_center(rows[asked], rows[given].mean(dim=1))
        total += (guessed == classes[asked]).double().mean().item()
    return total / DRAWS


@torch.no_grad()
def read(model: nn.Sequential, known: tuple[Rows, Rows], new: Rows) -> dict[str, float]:
    """Of the last hidden layer, in eval mode."""
    model.eval()
    features, held, strangers = (model[:-1](rows.images) for rows in (*known, new))
    classes = 10 - NEW
    found = {
        "CDNV, learned, training": spread(features, known[0].digits, classes).item(),
        "CDNV, learned, held-out": spread(held, known[1].digits, classes).item(),
        "CDNV, new": spread(strangers, new.digits, NEW).item(),
    }
    found |= {f"new, {shots} shots": few_shot(strangers, new.digits, shots) for shots in (1, 5)}
    wrong = model(known[1].images).argmax(dim=1) != known[1].digits
    return found | {"test error of learned": wrong.double().mean().item()}


def learn(seed: int, norm: bool, steps: int) -> dict[int, dict[str, float]]:
    """Train once, and read at the points; which digits are new is the seed's choice."""
    torch.manual_seed(seed)
    rows, held = split(seed)
    order = torch.randperm(10).tolist()
    layers: list[nn.Module] = []
    for width in (64, WIDTH):
        layers += [nn.Linear(width, WIDTH), *([nn.BatchNorm1d(WIDTH)] if norm else []), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10 - NEW))
    known = rows.of(order[NEW:]), held.of(order[NEW:])
    steps_done = train(model, lambda x, y, _: cross_entropy(model(x), y), known[0], steps)
    # of new digits no image was trained on: all of them are asked
    new = Rows(torch.cat([rows.images, held.images]), torch.cat([rows.digits, held.digits])).of(order[:NEW])
    return {step: read(model, known, new) for step in steps_done if step in POINTS}


def main(steps: int = 3000, seeds: int = 3) -> None:
    """Train all and print the tables."""
    for norm in (True, False):
        found = [learn(seed, norm, steps) for seed in range(seeds)]
        runs = {str(step): [one[step] for one in found] for step in found[0]}
        print(table("steps, " + ("with" if norm else "without") + " BatchNorm", runs), end="\n\n", flush=True)
    first, last = (median(of, "CDNV, new") for of in (runs["0"], list(runs.values())[-1]))
    print(f"After {steps} steps without BatchNorm the CDNV of new digits went from {first:.2g} to {last:.2g}.")


if __name__ == "__main__":
    main(*((10, 1) if is_quick(__doc__) else ()))
