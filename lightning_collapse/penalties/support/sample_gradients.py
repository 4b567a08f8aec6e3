"""Sample gradients in the form that layers leave them: sums over samples without one tensor per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_collapse.utilities.private_torch import border_of

Power = Literal["squares", "absolute", "signed"]
"""What of the gradients of samples is summed: squares, absolute values, or they themselves."""
CHUNK = 2**21
"""Numbers in one chunk of per-sample gradients and what they are made of: 8 MiB in ``float32``."""


class SampleGradients(ABC):
    r"""Gradients :math:`G_n` of the samples of a batch with respect to one parameter.

    Args:
        shape: That of the parameter.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    @property
    @abstractmethod
    def samples(self) -> int:
        """How many."""

    @property
    def work(self) -> int:
        """Numbers that :meth:`rows` needs per sample."""
        return self.shape.numel()

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Some of them, ``(n, *shape)``."""

    def add_to(self, total: Tensor, power: Power) -> None:
        r"""Add :math:`\sum_n G_n^2`, :math:`\sum_n |G_n|` or :math:`\sum_n G_n`."""
        for rows in self.chunks():
            total += apply_power(rows, power).sum(dim=0)

    def square_norms(self) -> Tensor:
        r""":math:`\sum_n \|G_n\|^2`, 0-dimensional."""
        return torch.stack([rows.square().sum() for rows in self.chunks()]).sum()

    def chunks(self) -> Iterator[Tensor]:
        """All of them, a few at a time."""
        step = max(1, CHUNK // max(1, self.work))
        for start in range(0, self.samples, step):
            yield self.rows(start, min(start + step, self.samples))


class Plain(SampleGradients):
    """Gradients as they are, ``(B, *shape)``: of parameters that are small beside what passes them."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.shape[1:])
        self.values = values

    @property
    @override
    def samples(self) -> int:
        return len(self.values)

    @override
    def rows(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    @override
    def add_to(self, total: Tensor, power: Power) -> None:
        total += apply_power(self.values, power).sum(dim=0)


class Outer(SampleGradients):
    r"""Of a matrix: :math:`G_n = \sum_p g_{np} a_{np}^\top` over positions.

    Args:
        gradients: Of what the matrix returned, ``(B, P, O)``.
        inputs: What it multiplied, ``(B, P, I)``.
    """

    def __init__(self, gradients: Tensor, inputs: Tensor) -> None:
        super().__init__(torch.Size((gradients.shape[2], inputs.shape[2])))
        self.gradients, self.inputs = gradients, inputs

    @property
    @override
    def samples(self) -> int:
        return len(self.inputs)

    @override
    def rows(self, start: int, stop: int) -> Tensor:
        return self.gradients[start:stop].transpose(1, 2) @ self.inputs[start:stop]

    @override
    def square_norms(self) -> Tensor:
        """Without a matrix per sample: of one position a product of norms, of few one of Gram matrices."""
        positions, wide, tall = self.inputs.shape[1], *self.shape
        if positions * (wide + tall) > wide * tall:
            return super().square_norms()
        inputs, gradients = (part @ part.transpose(1, 2) for part in (self.inputs, self.gradients))
        return (inputs * gradients).sum()

    def factors(self, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs ``(n, P, I)`` and gradients ``(n, P, O)`` of the first samples, a few at a time."""
        yield self.inputs[:stop], self.gradients[:stop]

    @override
    def add_to(self, total: Tensor, power: Power) -> None:
        if self.inputs.shape[1] != 1 and power != "signed":
            super().add_to(total, power)
            return
        # one position: the square of a product is the product of squares; and a plain sum needs no samples apart
        gradients, inputs = self.gradients.flatten(0, 1), self.inputs.flatten(0, 1)
        total.addmm_(apply_power(gradients, power).T, apply_power(inputs, power))


class Patches(SampleGradients):
    """Of a convolution's kernel: the outer products over its output positions, unfolded a few samples at a time.

    Args:
        gradients: Of what the convolution returned, ``(B, K, O, *outputs)`` for ``K`` images per sample.
        inputs: What it received, already padded, ``(B, K, C, *sizes)``.
        shape: Of the kernel, ``(O, C / groups, *kernel)``.
        stride: One number per spatial dimension.
        dilation: One number per spatial dimension.
        groups: Number of groups.
    """

    def __init__(
        self,
        gradients: Tensor,
        inputs: Tensor,
        shape: torch.Size,
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__(shape)
        self.gradients, self.inputs = gradients, inputs
        self.stride, self.dilation, self.groups = stride, dilation, groups

    @property
    @override
    def samples(self) -> int:
        return len(self.inputs)

    @property
    @override
    def work(self) -> int:
        _, images, _, *outputs = self.gradients.shape
        return images * self.inputs.shape[2] * prod(self.shape[2:]) * prod(outputs) + 2 * self.shape.numel()

    @override
    def rows(self, start: int, stop: int) -> Tensor:
        patches = self.unfolded(start, stop)
        gradients = self.gradients[start:stop]
        n, images, channels, *_ = gradients.shape
        gradients = gradients.reshape(n, images, self.groups, channels // self.groups, -1)
        if images > 1:
            patches = patches.permute(0, 2, 3, 1, 4).flatten(3)
            gradients = gradients.permute(0, 2, 3, 1, 4).flatten(3)
        else:
            patches, gradients = patches[:, 0], gradients[:, 0]
        return (gradients @ patches.transpose(-1, -2)).reshape(n, *self.shape)

    def factors(self, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs ``(n, P, I)`` and gradients ``(n, P, O)`` of the first samples, a few at a time, of one group."""
        step = max(1, CHUNK // self.work)
        for start in range(0, stop, step):
            end = min(start + step, stop)
            inputs = self.unfolded(start, end)[:, :, 0].transpose(2, 3)
            yield inputs.flatten(1, 2), self.gradients[start:end].flatten(3).transpose(2, 3).flatten(1, 2)

    def unfolded(self, start: int, stop: int) -> Tensor:
        """What each output position saw, ``(n, K, groups, C / groups * kernel, P)``."""
        x = self.inputs[start:stop].contiguous()
        kernel, outputs = self.shape[2:], self.gradients.shape[3:]
        strides = x.stride()[3:]
        windows = x.as_strided(
            (*x.shape[:3], *kernel, *outputs),
            (
                *x.stride()[:3],
                *(s * d for s, d in zip(strides, self.dilation, strict=True)),
                *(s * d for s, d in zip(strides, self.stride, strict=True)),
            ),
            x.storage_offset(),
        )
        return windows.reshape(*x.shape[:2], self.groups, self.shape[1] * prod(kernel), -1)


class Lookups(SampleGradients):
    """Of a table: what was sent back to the rows that a sample looked up, repeated ones added.

    Args:
        gradients: Of what the table returned, ``(B, P, D)``, zero where it does not count.
        indices: Rows that were looked up, ``(B, P)``.
        shape: Of the table, ``(V, D)``.
    """

    def __init__(self, gradients: Tensor, indices: Tensor, shape: torch.Size) -> None:
        super().__init__(shape)
        self.gradients, self.indices = gradients, indices

    @property
    @override
    def samples(self) -> int:
        return len(self.indices)

    @override
    def rows(self, start: int, stop: int) -> Tensor:
        indices, gradients = self.indices[start:stop], self.gradients[start:stop]
        table = gradients.new_zeros(len(indices), *self.shape)
        return table.scatter_add(1, indices.unsqueeze(-1).expand_as(gradients), gradients)

    @override
    def add_to(self, total: Tensor, power: Power) -> None:
        vocabulary = self.shape[0]
        sample = torch.arange(self.samples, device=self.indices.device).unsqueeze(1)
        pairs, where = (sample * vocabulary + self.indices).flatten().unique(return_inverse=True)  # type: ignore[no-untyped-call]
        sums = self.gradients.new_zeros(len(pairs), self.shape[1]).index_add_(0, where, self.gradients.flatten(0, 1))
        total.index_add_(0, pairs % vocabulary, apply_power(sums, power))


def apply_power(gradients: Tensor, power: Power) -> Tensor:
    """Squares, absolute values, or the argument itself."""
    if power == "signed":
        return gradients
    return gradients.square() if power == "squares" else gradients.abs()


def wide(tensor: Tensor) -> Tensor:
    """At least ``float32``."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def dense(gradient: Tensor) -> Tensor:
    """At least ``float32``, and not sparse."""
    return wide(gradient.to_dense() if gradient.is_sparse else gradient)


def concatenated(parts: Sequence[SampleGradients]) -> SampleGradients:
    """Of a parameter that was used several times: the sum, one form for all."""
    first: Any = parts[0]
    if len(parts) == 1:
        return parts[0]
    if isinstance(first, Outer):
        return Outer(*(torch.cat([getattr(part, name) for part in parts], 1) for name in ("gradients", "inputs")))
    if isinstance(first, Lookups):
        gradients, indices = (
            torch.cat([getattr(part, name) for part in parts], 1) for name in ("gradients", "indices")
        )
        return Lookups(gradients, indices, first.shape)
    if isinstance(first, Plain):
        return Plain(torch.stack([part.values for part in parts if isinstance(part, Plain)]).sum(dim=0))
    return Sum(parts)


class Sum(SampleGradients):
    """Of parts whose positions cannot be lined up, such as images of several sizes."""

    def __init__(self, parts: Sequence[SampleGradients]) -> None:
        super().__init__(parts[0].shape)
        self.parts = parts

    @property
    @override
    def samples(self) -> int:
        return self.parts[0].samples

    @property
    @override
    def work(self) -> int:
        return sum(part.work for part in self.parts)

    @override
    def rows(self, start: int, stop: int) -> Tensor:
        return torch.stack([part.rows(start, stop) for part in self.parts]).sum(dim=0)


def padded(inputs: Tensor, module: Any) -> Tensor:
    """Images ``(N, C, *sizes)`` with the border that a convolution adds."""
    sides = border_of(module)
    if not any(sides):
        return inputs
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return pad(inputs, sides, mode=mode)
