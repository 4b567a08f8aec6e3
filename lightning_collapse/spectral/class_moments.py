"""Class moments, streaming: means and within-class scatter, right where it is tiny, on any split or rank."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.distributed import all_reduce_sum

CLASS_STATES = ("count", "shift", "total", "square", "second", "rounding", "ignored", "invalid", "nonfinite")
SUMS = ("count", "total", "square", "second", "rounding", "ignored", "invalid", "nonfinite")

PER_CLASS = ("count", "shift", "total", "square")


class ClassMoments:
    r"""Sufficient statistics of a stream of labelled features, accumulated about an anchor per class.

    With :math:`y = x - r_c` for the anchor :math:`r_c` of the row's class, frozen at the mean of the class in the batch
    it first appears in: :math:`n_c`, :math:`\sum_c y`, :math:`\sum_c \|y\|^2` and, over all classes together,
    :math:`\sum y y^\top`. One pass is enough, and the within-class scatter does not drown in the distance between the
    classes, as it does in raw sums and in sums about one common anchor. Two streams with different anchors merge
    exactly.

    Memory is ``2 C D + D ** 2`` numbers and ``O(N D)`` during an update, never ``N x C`` nor ``C x C``. Rows with NaN
    or infinity, and rows whose label names no class, are left out and counted: an update neither raises on what the
    tensors hold nor waits for the device. It writes in place into the tensors that :meth:`states` names.

    Args:
        num_classes: Number of classes ``C``.
        dim: Number of features ``D``.
        device: Where the sums live.
        scatter: Keep the pooled within-class scatter. Without it only its trace is known, per class, and the memory is
            ``2 C D``: enough for everything but ``nc1`` and ``vci``.
        ignore_index: Label of rows to skip, as in ``torch.nn.functional.cross_entropy``.
        dtype: What is summed in; the default is ``float64`` wherever the device has it.

    Attributes:
        count: Rows per class, ``(C,)``.
        shift: The anchors, ``(C, D)``; zero for a class without rows.
        total: Sums of anchored rows, ``(C, D)``.
        square: Sums of their squared norms, ``(C,)``.
        second: Sum of their outer products over all classes, ``(D, D)``; ``(0, 0)`` without ``scatter``.
        rounding: Sum over rows of the square of the ``eps`` of the narrowest dtype that holds their batch: what narrow
            features cannot tell, cast to a wider dtype or not; 0-dimensional.
        ignored: Rows with label ``ignore_index``, 0-dimensional.
        invalid: Rows with any other label outside ``0 .. C - 1``, 0-dimensional.
        nonfinite: Rows of a class that were left out for a NaN or an infinity, 0-dimensional.

    Example:
        >>> moments = ClassMoments(num_classes=3, dim=1)
        >>> moments.update(torch.tensor([[1001.0], [999.0], [5.0], [7.0]]), torch.tensor([0, 0, 1, -100]))
        >>> moments.count.tolist(), moments.means.tolist(), moments.within_traces.tolist()
        ([2.0, 1.0, 0.0], [[1000.0], [5.0], [nan]], [2.0, 0.0, 0.0])
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        device: torch.device | str | None = None,
        scatter: bool = True,
        ignore_index: int = -100,
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype = dtype or accumulation_dtype(device)
        self.ignore_index = ignore_index
        width = dim if scatter else 0
        shapes: dict[str, tuple[int, ...]] = {
            "shift": (num_classes, dim),
            "total": (num_classes, dim),
            "second": (width, width),
        }
        shapes |= dict.fromkeys(("count", "square"), (num_classes,))
        for name in CLASS_STATES:
            setattr(self, name, torch.zeros(shapes.get(name, ()), dtype=dtype, device=device))

    count: Tensor
    shift: Tensor
    total: Tensor
    square: Tensor
    second: Tensor
    rounding: Tensor
    ignored: Tensor
    invalid: Tensor
    nonfinite: Tensor

    @classmethod
    def from_states(cls, states: dict[str, Tensor], ignore_index: int = -100) -> ClassMoments:
        """The accumulator whose :meth:`states` these are (the tensors themselves, not copies)."""
        moments = cls.__new__(cls)
        moments.ignore_index = ignore_index
        for name in CLASS_STATES:
            setattr(moments, name, states[name])
        return moments

    def states(self) -> dict[str, Tensor]:
        """The tensors by name: all there is to save or to send."""
        return {name: getattr(self, name) for name in CLASS_STATES}

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            features: Shape ``(N, D)``, any floating dtype.
            labels: Class of each row, shape ``(N,)``, any integer dtype.

        Raises:
            ValueError: If a shape does not fit, or the labels are not integers. Targets given as probabilities (mixup,
                label smoothing) name no class: measure on unmixed batches.
        """
        dim = self.shift.shape[1]
        if features.ndim != 2 or features.shape[1] != dim or labels.shape != features.shape[:1]:
            raise ValueError(
                f"Expected `features` of shape (N, {dim}) and `labels` of shape (N,), got {tuple(features.shape)} and"
                f" {tuple(labels.shape)}. Flatten tokens or pool maps first."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"`labels` must be integers, got {labels.dtype}. Mixed or soft targets name no class.")
        self._update(features.detach(), labels, relative_rounding(features.detach()))

    @full_precision
    def _update(self, features: Tensor, labels: Tensor, eps: float | Tensor) -> None:
        labels = labels.long()
        ignored = labels == self.ignore_index
        named = ~ignored & (labels >= 0) & (labels < len(self.count))
        features, considered, weight = finite_rows(features, named, self.shift.dtype)
        self.ignored += ignored.sum()
        self.invalid += len(labels) - ignored.sum() - considered
        self.nonfinite += considered - weight.sum()
        self.rounding += weight.sum() * eps**2
        labels = torch.where(named, labels, 0)  # such a row has weight zero
        here = torch.zeros_like(self.count).index_add_(0, labels, weight)
        # the anchor of an unseen class is zero, so its mean can be summed in place
        unseen = torch.where(self.count > 0, 0.0, 1 / here.clamp_min(1))
        self.shift.index_add_(0, labels, features * unseen[labels].unsqueeze(1))
        self.count += here
        anchored = features.sub_(self.shift[labels]).mul_(weight.unsqueeze(1))  # `finite_rows` made a copy
        self.total.index_add_(0, labels, anchored)
        self.square.index_add_(0, labels, torch.linalg.vector_norm(anchored, dim=1).square())
        if len(self.second):
            self.second.addmm_(anchored.T, anchored)

    @full_precision
    def about(self, shift: Tensor) -> ClassMoments:
        """The same statistics about other anchors ``(C, D)``; exact algebra, no data needed. Classes without rows stay.

        Meant for anchors near the class means: what is far from them costs digits of the scatter.
        """
        seen = (self.count > 0).unsqueeze(1)
        delta = torch.where(seen, shift - self.shift, 0.0)
        moved = self.from_states(self.states(), self.ignore_index)
        moved.shift = shift
        moved.total = self.total - self.count.unsqueeze(1) * delta
        # sum of (y - d)(y - d)' is S - T'D - D'T + D'nD = S - T'D - D'(T - nD)
        moved.square = self.square - ((self.total + moved.total) * delta).sum(dim=1)
        if len(self.second):
            moved.second = self.second - self.total.T @ delta - delta.T @ moved.total
        return moved

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Statistics of both streams together, exact whatever their anchors; the larger number of classes holds.

        Both must keep the scatter or neither.
        """
        classes = max(len(self.count), len(other.count))
        first, second = self.grow(classes), other.grow(classes)
        shift = torch.where((first.count > 0).unsqueeze(1), first.shift, second.shift)
        first, second = first.about(shift), second.about(shift)
        merged = {name: getattr(first, name) + getattr(second, name) for name in SUMS}
        return self.from_states(merged | {"shift": shift}, self.ignore_index)

    def reduce(self, group: dist.ProcessGroup | None = None) -> ClassMoments:
        """Statistics of all processes together, about the class means; a class may be missing on any of them.

        Collective: every process must call it, with the same ``C``, ``D`` and ``scatter``; two all-reduces, of
        ``C D + C`` and of ``C D + C + D ** 2 + 4`` numbers. Without a process group the statistics are returned about
        their means.
        """
        classes = len(self.count)
        sums = torch.cat([self.count, (self.count.unsqueeze(1) * self.shift + self.total).flatten()])
        count, sums = torch.split(all_reduce_sum(sums, group), [classes, self.shift.numel()])
        moved = self.about(sums.view_as(self.shift) / count.clamp_min(1).unsqueeze(1))
        names = [name for name in SUMS if name != "count"]
        parts = [getattr(moved, name) for name in names]
        packed = all_reduce_sum(torch.cat([part.flatten() for part in parts]), group)
        pieces = torch.split(packed, [part.numel() for part in parts])
        reduced = {name: piece.view_as(part) for name, piece, part in zip(names, pieces, parts, strict=True)}
        return self.from_states(reduced | {"count": count, "shift": moved.shift}, self.ignore_index)

    def select(self, classes: Tensor) -> ClassMoments:
        """Those of some classes ``(K,)``, in this order; what is about all classes together stays as it is."""
        states = self.states()
        for name in PER_CLASS:
            states[name] = states[name][classes]
        return self.from_states(states, self.ignore_index)

    def grow(self, num_classes: int) -> ClassMoments:
        """The same statistics with room for more classes; itself if there is room already."""
        more = num_classes - len(self.count)
        if more <= 0:
            return self
        states = self.states()
        for name in PER_CLASS:
            state = states[name]
            states[name] = torch.cat([state, state.new_zeros(more, *state.shape[1:])])
        return self.from_states(states, self.ignore_index)

    @property
    def means(self) -> Tensor:
        """Class means, ``(C, D)``; NaN for a class without rows, so that it cannot pass for a mean at the origin."""
        count = self.count.unsqueeze(1)
        return torch.where(count > 0, self.shift + self.total / count.clamp_min(1), torch.nan)

    def global_mean(self, weighting: Literal["classes", "samples"] = "classes") -> Tensor:
        """Mean ``(D,)`` of the means of classes that have rows, or of all rows; the same if classes are balanced."""
        weight = (self.count > 0).to(self.count) if weighting == "classes" else self.count
        return weight @ self.means.nan_to_num(0.0) / weight.sum()

    @property
    def within_traces(self) -> Tensor:
        """Sum of squared distances to the class mean, per class, ``(C,)``: ``n_c`` times the class's variance."""
        return (self.square - self.total.square().sum(dim=1) / self.count.clamp_min(1)).clamp_min(0)

    @property
    def resolution(self) -> Tensor:
        """Relative rounding of the features, 0-dimensional: the ``eps`` of a dtype that holds them, or a mean."""
        return (self.rounding / self.count.sum().clamp_min(1)).sqrt()

    @property
    @full_precision
    def within_scatter(self) -> Tensor:
        """Sum of outer products of rows less their class mean, ``(D, D)``; over the number of rows it is ``Sigma_W``.

        Empty, ``(0, 0)``, without ``scatter``.
        """
        if not len(self.second):
            return self.second
        scaled = self.total / self.count.clamp_min(1).sqrt().unsqueeze(1)
        return torch.addmm(self.second, scaled.T, scaled, alpha=-1)


def relative_rounding(features: Tensor) -> float | Tensor:
    """The ``eps`` of the narrowest dtype that holds all numbers, such as those of a model in ``bfloat16``, cast or not.

    Example:
        >>> relative_rounding(torch.tensor([[0.1, 0.3]]).bfloat16().float())
        tensor(0.0078)
    """
    eps = torch.finfo(features.dtype).eps
    if features.dtype not in (torch.float32, torch.float64):
        return eps
    found: Tensor | float = eps
    features = features[:: max(len(features) // 32, 1)]  # as many numbers are not narrow by chance
    for narrow in (torch.float32, torch.float16, torch.bfloat16):
        if torch.finfo(narrow).eps > eps:
            held = (features == features.to(narrow).to(features.dtype)) | features.isnan()
            found = torch.where(held.all(), torch.finfo(narrow).eps, found)
    return found
