"""Token hooks: readings of every sequence that a residual stream and its writers bring in one training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_collapse.functional.mean_mode_gradient import mean_mode_parts, mean_mode_product, mean_mode_square
from lightning_collapse.functional.token_similarity import (
    TokenGroups,
    TokenMoments,
    capped_ratio,
    contraction_ratio,
    loudest_token_share,
    mode_norms,
    relative_residual,
    token_cosine,
    token_moments,
)
from lightning_collapse.monitoring.tap_hook import TapHook
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import all_gather_rows, all_reduce_sum, world_size
from lightning_collapse.utilities.features import find_features
from lightning_collapse.utilities.gradients import follow_gradient
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.module_tree import own_weight
from lightning_collapse.utilities.modules import Tap, is_to_be_ignored
from lightning_collapse.utilities.private_torch import version_of
from lightning_collapse.utilities.transformer_blocks import TransformerBlock
from lightning_collapse.utilities.weight_matrices import whole

_PADDING = ("key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask")
MEANS = ("relative_residual", "token_cosine", "loudest_token_share", "null_residual", "null_ratio")
_COLUMNS = (
    "n",
    "tokens",
    "seen",
    "lost",
    *MEANS,
    "mean",
    "centered",
    "contracted",
    "contraction",
    "entered",
    "received",
)


class _Writer(NamedTuple):
    block: str
    weight: Tensor | None
    transposed: bool


class TokenHooks(HookOwner):
    """Forward hooks on blocks and on what writes to the stream, which add up readings of sequences while ``armed``.

    Every call counts, except activation checkpointing's recomputation in the backward pass, and every sequence of it.
    Kept are sums of readings, and of writers with a plain weight one mean of each sequence; no activation. Nothing
    waits for the device. Where a block receives what the one before it returned, that is read once. A compiled model
    stays one graph, and shows no gradients. What fails inside a hook is one warning that names the layer.

    Args:
        blocks: Where to listen.
        containment: Where failures are told, in the name of its owner.

    Attributes:
        armed: Whether to add up now.
        mask: Padding mask ``(N, L)`` of the running batch, for blocks that are not told of any themselves.
        segments: Number of every token's document ``(N, L)``, where rows are packed with several.
        left_out: Why nothing is read of a layer, by name, of those that have failed.

    Example:
        >>> from lightning_collapse.utilities.transformer_blocks import transformer_blocks
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> hooks = TokenHooks(transformer_blocks(net))
        >>> hooks.armed = True
        >>> _ = net(torch.ones(4, 3, 8))
        >>> found = hooks.pop(torch.device("cpu"))
        >>> int(found["layers.1", "n"]), float(found["layers.0.linear2", "relative_residual"]) < 1
        (4, True)
        >>> hooks.remove()
    """

    def __init__(self, blocks: Sequence[TransformerBlock], containment: Containment | None = None) -> None:
        self.armed = False
        self.mask: Tensor | None = None
        self.segments: Tensor | None = None
        self.containment = containment or Containment(type(self).__name__)
        self.left_out: dict[str, str] = {}
        self.names = [name for block in blocks for name in (block.name, *(writer.name for writer in block.writers))]
        self.blocks = {block.name: block.length_first for block in blocks}
        self._writers = {writer.name: _writer(block.name, writer) for block in blocks for writer in block.writers}
        self.begin()
        taps = [Tap(block.name, block.module, "input") for block in blocks]
        for block in blocks:
            taps += [tap for w in block.writers for tap in (Tap(w.name, w.module, "input"), w)]
            taps.append(Tap(block.name, block.module))
        self._hooks = [hook for tap in taps if (hook := self._hook(tap)) is not None]

    def begin(self) -> None:
        """Forget what was added up: a step that may end in a point begins."""
        self._sums: dict[str, Tensor] = {}
        self._pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._energy: dict[str, Tensor] = {}
        self._padding: Tensor | None = None
        self._before: dict[str, TokenMoments] = {}
        self._inputs: dict[str, tuple[TokenGroups, Tensor, Tensor]] = {}
        self._latest: tuple[Any, int, TokenMoments] | None = None

    def remove(self) -> None:
        """Stop listening and forget; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.armed, self.mask, self.segments = False, None, None
        self.begin()

    def capture(self, hook: TapHook, value: Any) -> None:
        """Read what a block or a writer has received or returned; for hooks."""
        if not self.armed or hook.failed or is_to_be_ignored():
            return
        try:
            with torch.no_grad():
                self._read(hook, find_features(value))
        except Exception as error:
            hook.failed = True
            self._leave_out(hook.name, error)

    def note_padding(self, given: Mapping[str, Any]) -> None:
        """Take note of the padding that a block is told of, true or minus infinity; for hooks."""
        masks = [given[name] for name in _PADDING if isinstance(given.get(name), Tensor)]
        self._padding = masks[0] == 0 if masks else None

    @torch.no_grad()
    def read_gradients(self) -> None:
        """Compare the gradients of writers with their mean parts: once a step, right after its last backward pass.

        On sharded weights it is collective.
        """
        for name, pairs in self._pairs.items():
            _, weight, transposed = self._writers[name]
            if weight is None or weight.grad is None or name in self._gradients:
                continue
            total = whole(weight.grad).to(accumulation_dtype(weight.device))
            total = total.mT if transposed else total
            product = torch.stack([mean_mode_product(total, *pair) for pair in pairs]).sum()
            self._gradients[name] = torch.stack([torch.ones_like(product), total.square().sum(), product])

    @torch.no_grad()
    def pop(self, device: torch.device) -> dict[tuple[str, str], Tensor]:
        """Readings of all processes since :meth:`begin`, by layer and measure.

        Collective: every process calls it at a point, where it may wait for the others.
        """
        self.armed, self.mask, self.segments = False, None, None
        zeros = torch.zeros(len(_COLUMNS), dtype=accumulation_dtype(device), device=device)
        own = [self._sums.get(name, zeros).to(device) for name in self.names]
        for name in self._writers:
            own += [self._gradients.get(name, zeros[:3]).to(device), self._energy.get(name, zeros[:1]).to(device)]
        if not own:
            return {}
        sizes = [len(_COLUMNS)] * len(self.names) + [4] * len(self._writers)
        parts = torch.split(all_reduce_sum(torch.cat(own)), sizes)
        found = {name: _readings(sums) for name, sums in zip(self.names, parts, strict=False)}
        for name, sums in zip(self._writers, parts[len(self.names) :], strict=True):
            if self._writers[name].weight is not None:
                found[name] |= self._parts(name, sums)
        self.begin()
        return {(name, measure): value for name, of_layer in found.items() for measure, value in of_layer.items()}

    def _parts(self, name: str, sums: Tensor) -> dict[str, Tensor]:
        """Of a gradient that is the mean over data-parallel processes, of which each saw its own sequences."""
        _, weight, transposed = self._writers[name]
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape  # type: ignore[union-attr]
        pairs = [torch.cat(pair, dim=1).to(sums) for pair in self._pairs.get(name, ())]
        rows, _ = all_gather_rows(torch.cat([sums.new_zeros(0, outputs + inputs), *pairs]))
        square, ranks = mean_mode_square(rows[:, :outputs], rows[:, outputs:]), world_size()
        has, total, product, energy = sums
        found = mean_mode_parts(total / has, product / ranks, square / ranks**2, energy / ranks**2)
        return {f"{part}_gradient": value for part, value in zip(("mean", "centered"), found, strict=False)} | {
            "amplification": found.amplification
        }

    def _read(self, hook: TapHook, features: Tensor | None) -> None:
        writer = self._writers.get(hook.name)
        block = hook.name if writer is None else writer.block
        tokens = None if features is None else self._as_tokens(block, hook, features.detach())
        if features is None or tokens is None:
            return
        if hook.before and writer is None:
            self._before[block] = self._moments(features, tokens)
        elif hook.before:
            self._inputs[hook.name] = self._of_input(tokens)
        else:
            self._add(hook.name, self._moments(features, tokens), self._before.get(block), tokens)
            known = self._inputs.pop(hook.name, None)
            if known is not None and features.requires_grad and writer is not None and writer.weight is not None:
                follow_gradient(features, partial(self._receive, hook, known))

    def _as_tokens(self, block: str, hook: TapHook, features: Tensor) -> Tensor | None:
        """Tokens ``(N, L, D)``, of maps with their channels last too; ``None`` of all else."""
        if features.is_nested or features.ndim not in (3, 4) or hook.axis.is_first(features):
            return None
        return features.flatten(1, -2) if features.ndim == 4 else self._turned(block, features)

    def _turned(self, block: str, tokens: Tensor) -> Tensor:
        return tokens.transpose(0, 1) if self.blocks[block] else tokens

    def _which(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Padding mask and segments, where they are of these tokens."""
        known = self.mask if self._padding is None else self._padding
        mask, segments = (x if x is not None and x.shape == tokens.shape[:2] else None for x in (known, self.segments))
        return mask, segments

    def _moments(self, features: Tensor, tokens: Tensor) -> TokenMoments:
        if self._latest is not None and self._latest[0]() is features and self._latest[1] == version_of(features):
            return self._latest[2]
        moments = token_moments(tokens, *self._which(tokens))
        self._latest = ref(features), version_of(features), moments
        return moments

    def _of_input(self, tokens: Tensor) -> tuple[TokenGroups, Tensor, Tensor]:
        """Which tokens count, the mean of every sequence, and the squared lengths of its tokens."""
        mask, segments = self._which(tokens)
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        squares = torch.linalg.vector_norm(tokens, dim=-1).square()
        groups = TokenGroups.of(squares.isfinite() if mask is None else squares.isfinite() & mask.bool(), segments)
        count = groups.sum(groups.real.to(tokens.dtype)).clamp_min(1)
        return groups, groups.sum(groups.clear(tokens)) / count.unsqueeze(-1), groups.clear(squares)

    def _receive(self, hook: TapHook, known: tuple[TokenGroups, Tensor, Tensor], gradient: Tensor) -> None:
        """Keep what the mean part of a gradient is made of; for the hook of a tensor, which changes nothing."""
        if hook.failed or torch.is_grad_enabled():  # of a gradient that is itself part of the loss
            return
        try:
            groups, means, squares = known
            gradient = self._turned(self._writers[hook.name].block, gradient) if gradient.ndim == 3 else gradient
            gradient = gradient.flatten(1, -2)
            gradient = groups.clear(gradient.to(means.dtype))
            energy = (torch.linalg.vector_norm(gradient, dim=-1).square() * squares).sum(
                dtype=accumulation_dtype(gradient.device)
            )
            self._energy[hook.name] = self._energy.get(hook.name, 0) + energy.view(1)
            self._pairs.setdefault(hook.name, []).append((groups.sum(gradient).to(energy), means.to(energy)))
        except Exception as error:
            hook.failed = True
            self._leave_out(hook.name, error)

    def _add(self, name: str, moments: TokenMoments, before: TokenMoments | None, tokens: Tensor) -> None:
        mask, segments = self._which(tokens)
        count = moments.n
        offered = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        seen = TokenGroups.of(offered, segments).real.sum()
        contraction = received = count[:0]
        if before is not None:
            received = relative_residual(before)
        if before is not None and before.mean.shape == moments.mean.shape:
            contraction = contraction_ratio(moments, before)
        some = count > 1
        nulls = (1 - 1 / count).sqrt(), (count - 1).rsqrt()
        columns = [
            some,
            torch.where(some, count, 0),
            seen,
            seen - count.sum(),
            relative_residual(moments),
            token_cosine(moments),
            loudest_token_share(moments),
            *(torch.where(some, null, 0) for null in nulls),
            *mode_norms(moments),
            contraction.isfinite(),
            contraction,
            received.isfinite(),
            received,
        ]
        sums = torch.stack([c.to(accumulation_dtype(c.device)).nansum() for c in columns])
        self._sums[name] = self._sums.get(name, 0) + sums

    def _hook(self, tap: Tap) -> TapHook | None:
        try:
            return _TokenHook(self, tap)
        except Exception as error:  # a ScriptModule refuses hooks
            self._leave_out(tap.name, error)
            return None

    def _leave_out(self, name: str, error: Exception) -> None:
        self.left_out[name] = str(error)
        self.containment.catch(f"reading layer `{name}`", "it is left out from now on", error)


class _TokenHook(TapHook):
    owner: TokenHooks

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if not torch.compiler.is_compiling() and self.owner.armed and self.before and self.name in self.owner.blocks:
            self.owner.note_padding(value)
        super().run(module, args, value)


def _writer(block: str, tap: Tap) -> _Writer:
    weight = own_weight(tap.module)
    # of a weight that is computed from others (a converted layer) there is no gradient to read
    plain = isinstance(weight, Tensor) and weight.ndim == 2 and weight.requires_grad and weight.is_leaf
    return _Writer(block, weight if plain else None, plain and getattr(tap.module, "nf", None) == weight.shape[1])


def _readings(sums: Tensor) -> dict[str, Tensor]:
    of = dict(zip(_COLUMNS, sums, strict=True))
    means = {name: of[name] / of["n"] for name in MEANS}
    counts = {name: of[name] for name in ("n", "tokens", "seen", "lost")}
    own = {"contraction": of["contraction"] / of["contracted"], "received": of["received"] / of["entered"]}
    return counts | means | own | {"mean_mode_ratio": capped_ratio(of["mean"], of["centered"])}
