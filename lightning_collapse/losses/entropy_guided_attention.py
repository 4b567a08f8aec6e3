"""Entropy-guided attention: a penalty on heads whose attention entropy leaves the band around a learned threshold."""

from collections.abc import Sequence
from math import log
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_not_negative, require_one_of, require_whole
from lightning_collapse.utilities.distributed import all_reduce_sum_with_grad

Form = Literal["normalized", "paper", "code"]
Reduction = Literal["mean", "sum"]
EPS = 1e-9  # the authors', inside the logarithm


class EntropyGuidedAttention(nn.Module):
    r"""Penalty on attention heads that look too evenly or too sharply, each beside a learned threshold of its own.

    With :math:`H_i` the entropy of row :math:`i` of a head's map, :math:`v_i` the number of keys that it sees and
    :math:`T` the number of keys, of a head

    .. math:: (\log T)^2\, \delta^2\, \mathbf 1(|\delta| > \gamma), \qquad
        \delta = \operatorname{mean}_i \frac{H_i}{\log v_i} - \theta

    averaged over heads and then layers. Means are over the rows of all sequences and processes that see two keys or
    more. ``form="paper"`` is :math:`\delta = \operatorname{mean}_i H_i / \log T - \theta`, over all rows; under a
    causal mask it is at most :math:`\log(T!) / (T \log T) - \theta`. ``form="code"`` takes :math:`\delta` of each row,
    :math:`H_i / \log T - \theta`, as the authors released it, and the mean over rows is that of the penalties. They
    train with a weight of 1e-5 and the sum over rows; how their thresholds begin they do not say.

    :meth:`calibrate_` sets the thresholds to what the heads read, and then the penalty begins at exactly zero, with
    causal masks too. Inside the band nothing has a gradient, the thresholds neither.

    It needs the maps themselves, with gradient and before dropout: of ``nn.MultiheadAttention(...)(x, x, x,
    average_attn_weights=False)``, or of a Hugging Face model with ``attn_implementation="eager"`` and
    ``output_attentions=True``. Fused attention makes none. As a regularizer of
    :class:`~lightning_collapse.AntiCollapseMixin` it is part of the model, and ``anti_collapse_loss(*maps)`` adds it;
    the callback ``Regularizer`` refuses it, since no optimizer would know the thresholds.

    Args:
        layers: Number of attention maps it takes, one of each layer.
        heads: Number of heads ``H`` of each.
        margin: Half the width γ of the band without a penalty; the authors' choice by default.
        form: Which of the three; the first is ours.
        reduction: ``"mean"``, or ``"sum"`` for the mean times the number of its rows, as released.
        hinge: Square how far the deviation is outside of the band, which does not jump at its edge; ours.

    Attributes:
        thresholds: :math:`\theta`, shape ``(layers, H)``, 0.5 before :meth:`calibrate_`. Give them no weight decay.
        views: Number of maps, for the mixin.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Jha & Reagen, *Entropy-Guided Attention for Private LLMs*, 2025. https://arxiv.org/abs/2501.03489, code at
        https://github.com/Nandan91/entropy-guided-attention-llm.

    Example:
        >>> guide, maps = EntropyGuidedAttention(layers=1, heads=2), torch.full((1, 2, 4, 4), 0.25)
        >>> round(guide(maps).item(), 4)  # (log(4) / 2)^2
        0.4805
        >>> guide.calibrate_(maps)
        >>> guide(maps).item()
        0.0
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        margin: float = 0.2,
        form: Form = "normalized",
        reduction: Reduction = "mean",
        hinge: bool = False,
    ) -> None:
        super().__init__()
        require_whole(1, layers=layers, heads=heads)
        require_not_negative(margin=margin)
        require_one_of(get_args(Form), form=form)
        require_one_of(get_args(Reduction), reduction=reduction)
        self.views = layers
        self.margin = margin
        self.form: Form = form
        self.reduction: Reduction = reduction
        self.hinge = hinge
        self.thresholds = nn.Parameter(torch.empty(layers, heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the thresholds to 0.5; also what fills a module built on the ``meta`` device."""
        self.thresholds.fill_(0.5)

    def forward(self, *maps: Tensor, visible: Tensor | None = None) -> Tensor:
        """The penalty, without a weight; collective, one all-reduce of ``layers * 2 * H`` numbers.

        Args:
            maps: One of each layer, of shape ``(B, H, L, S)``, rows that sum to 1.
            visible: Boolean, broadcasts to ``(B, 1, L, S)``: keys that a query sees. By default those to which any head
                gives any weight; say it for maps in half precision, where small weights are zero.

        Returns:
            Scalar, at least ``float32``, 0 or more.

        Raises:
            ValueError: If there is another number of maps, or one is none, or of another shape.
        """
        means, rows = self._means(maps, visible)
        penalties = means if self.form == "code" else self._outside(means - self.thresholds) * (rows > 0)
        of_layers = (penalties * rows if self.reduction == "sum" else penalties).mean(dim=1).unbind()
        return torch.stack([log(a.shape[3]) ** 2 * value for a, value in zip(maps, of_layers, strict=True)]).mean()

    @torch.no_grad()
    def calibrate_(self, *maps: Tensor, visible: Tensor | None = None) -> None:
        """Set the thresholds to what the heads of these maps read; once, on a batch of the training before its start.

        Collective: every process must call it. Arguments and errors are those of :meth:`forward`.
        """
        means, rows = self._means(maps, visible, penalized=False)
        self.thresholds.copy_(torch.where(rows > 0, means, self.thresholds).clamp(0, 1))

    def clamp_after(self, optimizer: Optimizer) -> RemovableHandle:
        """Have every step of an optimizer end with the thresholds between 0 and 1; returns what takes the hook off."""

        def clamp(*_: Any) -> None:
            self.thresholds.detach().clamp_(0, 1)

        return optimizer.register_step_post_hook(clamp)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        layers, heads = self.thresholds.shape
        return (
            f"layers={layers}, heads={heads}, margin={self.margin}, form={self.form!r}, reduction={self.reduction!r},"
            f" hinge={self.hinge}"
        )

    def _outside(self, deviation: Tensor) -> Tensor:
        outside = deviation.abs() - self.margin
        return outside.relu().square() if self.hinge else deviation.square() * (outside > 0)

    def _means(self, maps: Sequence[Any], visible: Tensor | None, penalized: bool = True) -> tuple[Tensor, Tensor]:
        """Means over rows of entropy over its maximum, or of penalties, and of how many rows, ``(layers, H)`` each."""
        _check(maps, *self.thresholds.shape)
        sums = []
        for attention, threshold in zip(maps, self.thresholds, strict=True):
            shares, counts = _shares(attention, visible, by_visible=self.form == "normalized")
            if self.form == "code" and penalized:
                shares = self._outside(shares - threshold.unsqueeze(1))
            sums.append(torch.stack([(shares * counts).sum(dim=(0, 2)), counts.expand_as(shares).sum(dim=(0, 2))]))
        totals, rows = all_reduce_sum_with_grad(torch.stack(sums, dim=1)).unbind()
        return totals / rows.clamp_min(1), rows


@full_precision
def _shares(attention: Tensor, visible: Tensor | None, by_visible: bool) -> tuple[Tensor, Tensor]:
    """Entropy of every row over its maximum, ``(B, H, L)``, and which rows count, ``(B, 1, L)``."""
    entropy = -(attention * (attention + EPS).log()).sum(dim=-1)
    if not by_visible:
        return entropy / log(max(attention.shape[3], 2)), torch.ones_like(entropy[:, :1])
    seen = (attention > 0).any(dim=1, keepdim=True) if visible is None else visible
    keys = seen.expand(len(attention), 1, *attention.shape[2:]).sum(dim=-1).to(entropy)
    return entropy / keys.clamp_min(2).log(), (keys > 1).to(entropy)


def _check(maps: Sequence[Any], layers: int, heads: int) -> None:
    if len(maps) != layers:
        raise ValueError(f"Entropy guidance takes {layers} attention maps, one of each layer, got {len(maps)}.")
    for i, attention in enumerate(maps):
        if attention is None:
            raise ValueError(
                f"Attention map {i} is None: fused attention makes no map. Load the model with"
                " `attn_implementation='eager'` and call it with `output_attentions=True`, or call"
                " `nn.MultiheadAttention` with `need_weights=True, average_attn_weights=False`."
            )
        if attention.ndim != 4 or attention.shape[1] != heads:
            raise ValueError(
                f"Attention maps must have shape (B, {heads}, L, S), got {tuple(attention.shape)} of map {i}. Of"
                " `nn.MultiheadAttention` they are with `average_attn_weights=False`."
            )
