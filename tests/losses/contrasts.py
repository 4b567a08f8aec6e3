"""Losses of pairs that take labels, for the battery: independent references in ``float64``, by loops."""

import math
from typing import Any

import numpy as np
import torch

from lightning_collapse.losses import BatchHardTriplet, ConR, SpreadLoss, SupCon

CLASSES = torch.tensor([0, 0, 0, 1, 0, 2, 0, 1, -100, 0, 2, 0, 0, 1, 0, 4, 0])
TARGETS = torch.tensor([0.0, 0.4, 3.0, 9.0, 3.2, 5.0, 5.5, 9.1, math.nan, 0.9, 4.8, 3.9, 2.3, 7.0, 6.4, 12.0, 2.85])


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.sqrt(row @ row)


def naive_sup_con(a: np.ndarray, b: np.ndarray, y: np.ndarray, loss: Any) -> float:
    kept = [i for i in range(len(y)) if y[i] >= 0]
    rows = [(i, unit(view[i])) for view in (a, b) for i in kept]
    supervised, paired = [], []
    for k, (i, anchor) in enumerate(rows):
        scores = {m: anchor @ row / loss.temperature for m, (_, row) in enumerate(rows) if m != k}
        total = np.log(sum(np.exp(s) for s in scores.values()))
        positives = [s for m, s in scores.items() if y[rows[m][0]] == y[i]]
        inside = np.log(np.mean(np.exp(positives)))
        supervised.append(total - (inside if loss.form == "in" else np.mean(positives)))
        paired.append(total - next(s for m, s in scores.items() if rows[m][0] == i))
    beta = loss.coefficients["self_supervised"]
    return float((1 - beta) * np.mean(supervised) + beta * np.mean(paired))


def naive_spread(a: np.ndarray, b: np.ndarray, y: np.ndarray, loss: Any) -> float:
    kept = [i for i in range(len(y)) if y[i] >= 0]
    total = 0.0
    for i in kept:
        scores = {j: b[i] @ a[j] / loss.temperature for j in kept}
        others = sum(np.exp(s) for j, s in scores.items() if y[j] != y[i])
        own = [s for j, s in scores.items() if y[j] == y[i]]
        attract = np.mean([np.log(np.exp(s) + others) - s for s in own])
        spread = np.log(sum(np.exp(s) for s in own)) - scores[i]
        total += loss.coefficients["attract"] * attract + loss.coefficients["spread"] * spread
    return float(total / len(kept))


def naive_triplet(z: np.ndarray, y: np.ndarray, loss: Any) -> float:
    values = []
    for i in range(len(y)):
        far = [np.linalg.norm(z[i] - z[j]) for j in range(len(y)) if j != i and y[j] == y[i] >= 0]
        near = [np.linalg.norm(z[i] - z[j]) for j in range(len(y)) if y[j] >= 0 and y[j] != y[i] >= 0]
        if far and near:
            excess = max(far) - min(near)
            values.append(np.log1p(np.exp(excess)) if loss.margin is None else max(loss.margin + excess, 0.0))
    return float(np.mean(values))


def predict(rows: torch.Tensor) -> torch.Tensor:
    return 4 * rows[:, :1]  # exact in half precision, where it would decide who is near


def rarity(targets: torch.Tensor) -> torch.Tensor:
    return 1 + targets / 10


def naive_conr(a: np.ndarray, b: np.ndarray, y: np.ndarray, loss: Any) -> float:
    y = y.astype(float)
    rows = [(y[i], 4 * view[i, 0], unit(view[i])) for view in (a, b) for i in range(len(y)) if np.isfinite(y[i])]
    values = []
    for k, (target, guess, anchor) in enumerate(rows):
        weight = 1 if loss.density_weight is None else 1 + target / 10
        positives, pushed = [], 0.0
        for m, (other, predicted, row) in enumerate(rows):
            score, apart = anchor @ row / loss.temperature, abs(target - other)
            if m != k and apart <= loss.window:
                positives.append(score)
            elif m != k and abs(guess - predicted) <= loss.window:
                pushed += weight * np.exp(loss.slope * apart) * np.exp(score)
        total = np.log(sum(np.exp(s) for s in positives) + pushed)
        values.append(np.mean([total - s for s in positives]) if pushed and positives else 0.0)
    return loss.coefficients["contrast"] * float(np.mean(values))


# name: loss, reference, all-reduces, views, labels, which rows count; where all is mined, all that take part are felt
named = CLASSES >= 0
CONTRASTS: dict[str, tuple[Any, Any, int, int, torch.Tensor, torch.Tensor]] = {
    "SupCon": (SupCon, naive_sup_con, 4, 2, CLASSES, named),
    "SupCon-joint": (lambda: SupCon(0.5, 0.25, "in"), naive_sup_con, 4, 2, CLASSES, named),
    "SpreadLoss": (lambda: SpreadLoss(0.5, 1.0, 3.0), naive_spread, 4, 2, CLASSES, named),
    "BatchHardTriplet": (BatchHardTriplet, naive_triplet, 4, 1, CLASSES, named & (CLASSES != 4)),
    "BatchHardTriplet-margin": (lambda: BatchHardTriplet(0.7), naive_triplet, 4, 1, CLASSES, named & (CLASSES != 4)),
    "ConR": (lambda: ConR(predict), naive_conr, 3, 2, TARGETS, TARGETS.isfinite()),
    "ConR-weighted": (
        lambda: ConR(predict, 1.0, 2.0, 0.5, 0.2, rarity),
        naive_conr,
        3,
        2,
        TARGETS,
        TARGETS.isfinite(),
    ),
}
