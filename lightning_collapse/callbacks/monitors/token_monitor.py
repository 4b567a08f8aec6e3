"""Token monitor: whether the tokens of a sequence become one vector over the depth of a transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan, sqrt
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.hooked_monitor import HookedMonitor
from lightning_collapse.callbacks.monitors.monitor import Detail, Name
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.monitoring.token_hooks import TokenHooks
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.modules import let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.transformer_blocks import make_block, transformer_blocks

_NO_TOKENS = "{} did not run on tokens (N, L, D) before a point; the curves read NaN there."
_DONG, _LU = "Dong et al., ICML 2021, arXiv 2103.03404", "Lu 2026, arXiv 2605.06169"


class TokenMonitor(HookedMonitor[TokenHooks]):
    r"""Log how alike the tokens of a sequence are over the depth of a transformer, and what makes them so.

    **Logged metrics**, ``tokens/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    Blocks are found by themselves (GPT-2, BERT, T5, Llama, ViT, ``nn.TransformerEncoder`` and others, batch first or
    not): the first four curves and ``contraction`` are of the stream behind each. In every block the last map of each
    attention and that of the MLP write to the stream: of them, under their own names, ``relative_residual``,
    ``contraction`` against the stream that the block received, and, of plain weights under automatic optimization, the
    parts of the gradient that the training has. Formulas are those of
    :func:`~lightning_collapse.functional.relative_residual` and its neighbors in ``functional``, and of
    :func:`~lightning_collapse.functional.mean_mode_gradient`. Nulls are of independent tokens of zero mean.

    A high cosine is no failure by itself: features of language models lie in a narrow cone, and a classifier needs one
    vector in the end. What tells is a residual that dies out while the loss gets nowhere, which is the verdict *token
    collapse*. What attention does to a causal sequence as a filter is not judged.

    A point rests on all sequences of the step that ends in it, on all processes, each of the same weight. Padding does
    not count, zeros in ``batch["attention_mask"]`` or what a block is given as ``src_key_padding_mask``; rows that hold
    several documents are read by document, up to 64 in each.

    Args:
        layers: Names of blocks, or glob patterns of them; ``None`` finds them.
        segments: Key of the batch under which every token's document is numbered, ``(N, L)``; ``None`` looks for
            documents in ``batch["position_ids"]``, where each begins with 0.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing.

    Example::

        trainer = Trainer(callbacks=[TokenMonitor(), CollapseGuard()])
    """

    family = "tokens"
    declares = (
        Curve("relative_residual", "what is left of a sequence without its mean token", "0 to 1", "near 0", _DONG),
        Curve("token_cosine", "mean cosine of two tokens of a sequence", "-1 to 1", "near 1", _LU),
        Curve("mean_mode_ratio", "length of the mean part of sequences over the rest", "0 to 1e6", "growing", _LU),
        Curve(
            "loudest_token_share",
            "share of the squared length of a sequence that its longest token has",
            "1 / T to 1",
            "near 1: other norms speak of that token",
            "Sun et al., COLM 2024, arXiv 2402.17762",
        ),
        Curve(
            "contraction",
            "residual behind a block, or of what is written, over that of the stream before the block",
            "0 to infinity",
            "far below 1, of a block",
            _DONG,
        ),
        Curve(
            "received",
            "`relative_residual` of the stream before the first block",
            "0 to 1",
            "0 from the start: by design",
        ),
        Curve("mean_gradient", "part of a gradient that moves all tokens alike", "0 to infinity", "growing", _LU),
        Curve("centered_gradient", "part of a gradient that tells tokens apart", "0 to infinity", "near 0", _LU),
        Curve(
            "amplification",
            "squared gradient of a writer over what its tokens bring, of independent ones 1",
            "0 to the number of tokens",
            "growing",
            _LU,
        ),
        Curve("n", "sequences of two tokens or more behind the point", "0 to infinity", "few: a rough reading"),
        Curve("flag", "tokens", "0 to 6", "above 0: why to doubt the point"),
    )
    identity = ("layers", "segments", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        segments: str | None = None,
        every_n_steps: int | None = None,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "all blocks")
        if segments is not None and not isinstance(segments, str):
            raise ValueError(f"`segments` is a key of the batch, or None for `position_ids`, got {segments!r}.")
        self.layers = layers
        self.segments = segments
        self._blocks: set[str] = set()

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        taps = self.choose_taps(self.layers, (), pl_module)
        blocks = [make_block(tap.name, tap.module) for tap in taps] or transformer_blocks(pl_module)
        if not blocks:
            self.warn_once("the model has no attention, so there is nothing to read. Name its blocks in `layers`.")
        let_hooks_be_seen(pl_module)
        self._scope = StepScope(pl_module)
        self._hooks = TokenHooks(blocks, self.contained)
        self._blocks = {block.name for block in blocks}

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        step = trainer.accumulate_grad_batches
        if self._hooks is None or self._scope is None or batches_left >= step:
            return
        if batches_left >= step - 1:
            self._hooks.begin()
        self._hooks.mask = padding_mask(batch)
        self._hooks.segments = _segments(batch, self.segments, self._hooks.mask)
        self._scope.request(self._hooks)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._left == 0 and self._hooks is not None and pl_module.automatic_optimization:
            with self.contained("reading gradients", "their curves are missing"):
                self._hooks.read_gradients()

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        return {} if self._hooks is None else self._hooks.pop(pl_module.device)

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        names = dict.fromkeys(name for name, _ in numbers)
        found = {name: {key: value for (of, key), value in numbers.items() if of == name} for name in names}
        received = dict[str, float]()  # by a stack of blocks: what its first one does, which is by design
        for name in (name for name in found if name in self._blocks):
            found[name]["received"] = received.setdefault(name.rpartition(".")[0], found[name]["received"])
        return [point for name, own in found.items() for point in self._points_of(name, step, own)]

    def _points_of(self, name: str, step: int, own: Mapping[str, float]) -> list[Point]:
        n, is_block = int(own["n"]), name in self._blocks
        if not n and not is_block:  # of a writer whose rows are no sequences, such as an expert's
            return []
        flag = Flag.OK if own["tokens"] else Flag.FEW_ROWS
        if not own["seen"]:
            flag = Flag.NOT_CALLED
            if self._hooks is None or name not in self._hooks.left_out:
                self.warn_of_layer(name, _NO_TOKENS)
        elif own["lost"]:
            flag = Flag.NONFINITE
        share = sqrt(n / own["tokens"]) if n else nan
        nulls = {
            "relative_residual": own["null_residual"],
            "token_cosine": 0.0,
            "mean_mode_ratio": own["null_ratio"],
            "mean_gradient": share,
            "centered_gradient": sqrt(1 - share * share),
            "amplification": 1.0,
        }
        left_out = () if is_block else ("token_cosine", "mean_mode_ratio", "loudest_token_share", "received")
        drawn = {c.name: own[c.name] for c in self.declares if c.name in own and c.name not in left_out}
        drawn = {key: value for key, value in drawn.items() if is_block or isfinite(value)}
        return [
            Point(
                self.family,
                name,
                key,
                step,
                value if isfinite(value) else nan,
                n,
                nulls.get(key, nan),
                flag,
                drawn=key != "received",
            )
            for key, value in (drawn | {"flag": float(flag)}).items()
        ]


def _segments(batch: Any, key: str | None, mask: Tensor | None) -> Tensor | None:
    """Number of every token's document in its row, from 0."""
    given = batch.get(key or "position_ids") if isinstance(batch, Mapping) else None
    if not isinstance(given, Tensor) or given.ndim != 2 or given.is_floating_point():
        return None
    begins = given[:, 1:] != given[:, :-1] if key is not None else given[:, 1:] == 0
    if mask is not None and mask.shape == given.shape:
        begins = begins & mask[:, 1:].bool()
    return torch.nn.functional.pad(begins.long().cumsum(dim=1), (1, 0))
