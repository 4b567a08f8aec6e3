"""Value comparison: whether a loss's constant was made of a tensor of the batch, by one-hot, shift, cast or mixing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_collapse.monitoring.call_record import SAMPLE, leading_rows

LEAST = 4
"""Numbers that must agree, and not all be the same, to be evidence."""
_ORDERED = 8
IGNORED = -100


@dataclass
class Sample:
    """The first rows of a tensor on the host, so that nothing asked of them waits for a device, and its whole shape."""

    shape: tuple[int, ...]
    values: Tensor
    integer: bool

    @property
    def numel(self) -> int:
        """How many numbers the whole tensor holds."""
        return torch.Size(self.shape).numel()

    @property
    def is_binary(self) -> bool:
        """Whether there are two numbers in it at most."""
        return bool(((self.values == self.values.amin()) | (self.values == self.values.amax())).all())


def sample_of(tensor: Tensor | None, shape: tuple[int, ...] | None = None) -> Sample | None:
    """Bring the first rows of a tensor to the host, which waits for the device; ``None`` where that is not possible."""
    rows = None if tensor is None or tensor.is_complex() else leading_rows(tensor, 4 * SAMPLE)
    if tensor is None or rows is None:
        return None
    return Sample(shape or tuple(tensor.shape), rows.cpu().double(), not tensor.is_floating_point())


def relation(made: Sample, given: Sample) -> str:
    """How a constant was made of a tensor of the batch, in words; empty if no way was found.

    Args:
        made: What the loss compares with.
        given: Of the batch.

    Example:
        >>> labels = sample_of(torch.tensor([0, 2, 1, 2]))
        >>> relation(sample_of(torch.eye(3)[[0, 2, 1, 2]]), labels)
        'one-hot'
        >>> tokens = sample_of(torch.arange(12).view(2, 6))
        >>> relation(sample_of(torch.arange(12).view(2, 6)[:, 1:].flatten()), tokens)
        'shifted'
    """
    if _same(made.values.flatten(), given.values.flatten(), made.numel == given.numel):
        return "the same values"
    if given.integer:
        return _one_hot(made, given) or _shifted(made, given) or _permuted(made, given)
    return _in_order(made, given) or _scaled(made, given) or _thresholded(made, given) or _softmax(made, given)


def narrowed(made: Sample) -> Sample | None:
    """Of targets that were stretched over several components the first; ``None`` of others."""
    values, shape = made.values, list(made.shape)
    for dim in range(values.ndim - 1, 0, -1):
        first = values.narrow(dim, 0, min(1, values.shape[dim]))
        if values.shape[dim] > 1 and torch.allclose(values, first.expand_as(values), rtol=1e-4, atol=1e-4):
            values, shape[dim] = first, 1
    return None if shape == list(made.shape) else Sample(tuple(shape), values, made.integer)


def is_masked_part(made: Sample, given: Sample) -> bool:
    """Whether targets are given tokens, or the next ones, wherever they count."""
    if made.numel != given.numel:
        return False
    n = min(made.values.numel(), given.values.numel())
    targets, tokens = made.values.flatten()[:n], given.values.flatten()[:n]
    counts = targets >= 0
    return int(counts.sum()) >= LEAST and bool((targets == tokens)[counts].all()) and _varies(targets[counts])


def is_mixture(of: Sample, *parts: Sample) -> bool:
    """Whether each row is a weighted sum of the rows of others, with weights of its own, none of them zero throughout.

    Example:
        >>> x, noise = torch.randn(2, 8, 50)
        >>> level = torch.rand(8, 1)
        >>> is_mixture(sample_of(level * x + (1 - level) * noise), sample_of(x), sample_of(noise))
        True
    """
    rows = min(len(of.values), *(len(part.values) for part in parts), 8)
    if any(part.numel != of.numel or part.shape[0] != of.shape[0] for part in parts) or not rows:
        return False
    made = of.values[:rows].reshape(rows, -1)
    columns = torch.stack([part.values[:rows].reshape(rows, -1) for part in parts], dim=2)
    if columns.shape[1] < 4 * len(parts):
        return False
    weights = torch.linalg.lstsq(columns, made.unsqueeze(2)).solution
    rest = (made - (columns @ weights).squeeze(2)).norm()
    return bool(rest <= 1e-2 * made.norm()) and bool((weights.abs().amax(dim=(0, 2)) > 1e-3).all())


def correlation(one: Sample, other: Sample) -> float:
    """Pearson's correlation of two tensors of as many numbers, 0 where there are too few."""
    n = min(one.values.numel(), other.values.numel())
    if one.numel != other.numel or n < _ORDERED:
        return 0.0
    pair = torch.stack([one.values.flatten()[:n], other.values.flatten()[:n]])
    return float(torch.corrcoef(pair)[0, 1].nan_to_num())


def _varies(values: Tensor) -> bool:
    return bool((values != values[0]).any()) if values.numel() else False


def _same(one: Tensor, other: Tensor, comparable: bool, least: int = LEAST) -> bool:
    n = min(one.numel(), other.numel())
    if not comparable or n < least or not _varies(other[:n]):
        return False
    # a difference of two numbers that are near has lost digits
    scale = float(other[:n].nan_to_num(0, 0, 0).abs().max())
    return bool(torch.allclose(one[:n], other[:n], rtol=4e-3, atol=1e-4 * scale, equal_nan=True))


def _one_hot(made: Sample, given: Sample) -> str:
    classes = made.numel // max(given.numel, 1)
    if classes < 2 or made.numel != classes * given.numel or not made.values.ndim:
        return ""
    rows = made.values
    if made.shape[-1] != classes:
        if len(made.shape) < 2 or made.shape[1] != classes:
            return ""
        rows = rows.movedim(1, -1)
    rows = rows.reshape(-1, classes)
    labels = given.values.flatten()
    n = min(len(rows), len(labels))
    rows, labels = rows[:n], labels[:n].long()
    known = (labels >= 0) & (labels < classes)
    rows, labels = rows[known], labels[known]
    if len(labels) < LEAST or not _varies(labels):
        return ""
    own = rows.gather(1, labels[:, None]).squeeze(1)
    top = rows.topk(min(2, classes), dim=1).values
    others = rows.sort(dim=1).values[:, : classes - 2]  # beside the two largest
    if not bool((own >= top[:, -1]).all()) or not bool((top[:, 0] > top[:, -1]).any()):
        return ""
    # the outputs of a teacher that knows the labels are not flat
    if classes > 2 and not bool(torch.allclose(others, others[:, :1].expand_as(others), atol=1e-4)):
        return ""
    if bool((own == top[:, 0]).all()) and bool((top[:, 0] > top[:, -1]).all()):
        return "one-hot"
    return "mixed" if classes > 2 else ""


def _shifted(made: Sample, given: Sample) -> str:
    if len(given.shape) != 2 or given.shape[1] < 2:
        return ""
    n, length = given.shape
    tokens = given.values.reshape(-1, length)
    flat = made.values.flatten()
    if made.numel == n * (length - 1):
        ways = (tokens[:, 1:], tokens[:, :-1])
        return "shifted" if any(_same(flat, way.flatten(), True) for way in ways) else ""
    if made.numel != n * length:
        return ""
    rows = flat[: flat.numel() // length * length].view(-1, length)
    m = min(len(rows), len(tokens))
    # the next tokens, or those before, which a decoder reads
    for inner, other in ((rows[:m, :-1], tokens[:m, 1:]), (rows[:m, 1:], tokens[:m, :-1])):
        counts = inner >= 0
        enough = int(counts.sum()) >= LEAST and _varies(other[counts])
        if enough and bool((inner == other)[counts].all()):
            return "shifted"
    return ""


def _permuted(made: Sample, given: Sample) -> str:
    whole = made.values.numel() == made.numel == given.numel == given.values.numel()
    if not whole or made.numel < _ORDERED or not _varies(given.values.flatten()):
        return ""
    return "permuted" if torch.equal(made.values.flatten().sort()[0], given.values.flatten().sort()[0]) else ""


def _in_order(made: Sample, given: Sample) -> str:
    """Standardized or rescaled targets have the order of the given ones in every column."""
    n = min(len(made.values), len(given.values)) if made.values.ndim and given.values.ndim else 0
    if made.numel != given.numel or made.integer or n < _ORDERED or made.shape[0] != given.shape[0]:
        return ""
    one, other = made.values[:n].reshape(n, -1), given.values[:n].reshape(n, -1)
    if one.shape != other.shape or not _varies(other.flatten()):
        return ""
    same = torch.equal(one.argsort(dim=0, stable=True), other.argsort(dim=0, stable=True))
    return "rescaled" if same else ""


def _scaled(made: Sample, given: Sample) -> str:
    """Every row has a scale and a place of its own, as a series that its past has standardized."""
    n = min(len(made.values), len(given.values), _ORDERED) if made.values.ndim > 1 and given.values.ndim > 1 else 0
    if made.shape[:1] != given.shape[:1] or made.numel != given.numel or n < LEAST:
        return ""
    pairs = torch.stack([sample.values[:n].reshape(n, -1) for sample in (made, given)])
    pairs = pairs - pairs.mean(dim=2, keepdim=True)
    lengths = pairs.norm(dim=2)
    if pairs.shape[2] < LEAST or not bool((lengths > 0).all()):
        return ""
    cosines = (pairs[0] * pairs[1]).sum(dim=1) / lengths.prod(dim=0)
    return "rescaled" if bool((cosines > 1 - 1e-4).all()) else ""


def _thresholded(made: Sample, given: Sample) -> str:
    n = min(made.values.numel(), given.values.numel())
    if made.numel != given.numel:
        return ""
    answers, numbers = made.values.flatten()[:n], given.values.flatten()[:n]
    yes, no = numbers[answers == 1], numbers[answers == 0]
    if min(len(yes), len(no)) < LEAST or len(yes) + len(no) < n:
        return ""
    return "thresholded" if bool(no.max() < yes.min()) or bool(yes.max() < no.min()) else ""


def _softmax(made: Sample, given: Sample) -> str:
    if made.shape != given.shape or len(made.shape) != 2 or made.shape[1] < 3 or bool((made.values <= 0).any()):
        return ""
    n = min(len(made.values), len(given.values))
    logits, scores = made.values[:n].log(), given.values[:n]
    rows = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(logits[:_ORDERED], scores[:_ORDERED], strict=True)]
    return "softmax" if len(rows) >= LEAST and bool((torch.stack(rows) > 1 - 1e-4).all()) else ""
