"""Attention window: statistics of the attention calls of the batches that end in a point, by layer and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_collapse.monitoring.attention_hooks import AttentionHooks, Captured, Reader, ReaderHooks, names_attention
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.attention_calls import AttentionCall
from lightning_collapse.utilities.distributed import all_reduce_max, all_reduce_sum, max_over_processes, world_size
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.modules import Tap, find_taps, is_compiled, let_hooks_be_seen

MAX_ROWS = 512
POINT_AT = (
    'Point the monitor at them: `layers={"blocks.*.attn": read}` with `def read(module, args, kwargs)` that returns'
    " `(query, key)`, each of shape (B, H, L, E)."
)
_NEWS = "a layer that begins to run"
Layers = Sequence[str] | Mapping[str, Reader] | None


class Statistics(Protocol):
    """What is read of some rows of a call, of every head.

    Attributes:
        columns: How many sums and how many maxima there are.
    """

    columns: tuple[int, int]

    def __call__(self, captured: Captured) -> tuple[Tensor, Tensor]:
        """Sums ``(H, S)``, which add up over calls and processes, and maxima ``(H, M)``, joined by the largest."""
        ...


class AttentionWindow:
    """Reads some rows of every attention call of the training steps that end in a point.

    Args:
        module: The ``LightningModule``.
        layers: Names or patterns of submodules, ``None`` for every one that is captured, or a mapping from patterns to
            functions that read.
        read: From some rows of a call to its statistics.
        warn: Says something once.
        rows: Queries to read of each sequence; 512 of all sequences together.
        whole: Called with the layer and the whole of each call whose queries and keys are there as they are: those of
            ``F.scaled_dot_product_attention``.

    Attributes:
        taps: Layers that calls may belong to.
        names: What they are called.
        heads: Of the layers that were captured, how many rows their statistics have.
        armed: Whether the running batch ends in a point.

    Raises:
        ValueError: If a pattern matches nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Layers,
        read: Statistics,
        warn: Callable[[str], None],
        rows: int,
        whole: Callable[[str, AttentionCall], None] | None = None,
    ) -> None:
        self.heads: dict[str, int] = {}
        self.armed = False
        self._module, self._layers, self._read, self._warn = module, layers, read, warn
        self._rows, self._whole = rows, whole
        self._news, self._failures = True, False
        self._captured: dict[str, tuple[Tensor, Tensor]] = {}
        self._hooks: AttentionHooks | None = None
        self._readers: ReaderHooks | None = None
        self.taps = self._listen()
        self.names = [tap.name for tap in self.taps]
        self._scope: StepScope | None = StepScope(module)

    @property
    def listeners(self) -> list[HookOwner]:
        """All that has hooks on the model."""
        return [] if self._readers is None else [self._readers]

    def before_batch(self, batch: Any, due: bool, between: bool = False) -> None:
        """Listen to the training step of this batch, if it ends in a point, or for ``whole`` alone if ``between``."""
        self.armed = due
        listening = due or (between and self._hooks is not None)
        if due:
            self._captured.clear()
        if not listening or self._scope is None:
            return
        mask = padding_mask(batch) if due else None
        if self._hooks is not None:
            self._hooks.samples = due
        for hooks in (self._hooks, self._readers):
            if hooks is not None:
                hooks.mask = mask if mask is None else mask.bool()
                self._scope.request(hooks)

    def after_batch(self) -> None:
        """Let go of the batch."""
        for hooks in (self._hooks, self._readers):
            if hooks is not None:
                hooks.mask = None

    def read(self, device: torch.device) -> dict[tuple[str, str], Tensor]:
        """Statistics of all heads of every layer, over all processes, for :meth:`tables`. Collective.

        Empty where nobody could know that the batch would end in a point, or nothing was captured yet.
        """
        if not self.armed:  # an epoch ended inside an accumulation window: nobody could know, nobody listened
            return {}
        self.armed = False
        self._agree(device)
        watched = [name for name in self.names if name in self.heads]
        if not watched:
            if not self._failures:  # else the reason has been told
                named = names_attention(self._module)
                why = "its queries and keys are hidden" if named else "no module is called so, there may be none"
                self._warn(f"no attention was captured; {why}. {POINT_AT}")
            return {}
        return self._share(watched, device)

    def tables(self, numbers: Mapping[tuple[str, str], Any]) -> dict[str, Tensor]:
        """What :meth:`read` returned and is on the host now, as ``(H, S + M)`` by layer, in double precision."""
        self._news = bool(numbers.get(("", _NEWS), 0))
        return {
            name: torch.tensor(vector, dtype=torch.float64).view(self.heads[name], -1)
            for (name, kind), vector in numbers.items()
            if kind != _NEWS
        }

    def warn_of_the_silent(self) -> None:
        """Say which layers that were meant were never captured."""
        for name in self.names if self.heads else ():
            # a pattern may well match more than attention; a name is meant
            meant = isinstance(self._layers, Mapping) or (self._layers is not None and name in self._layers)
            if meant and name not in self.heads:
                self._warn(f"the attention of `{name}` was never captured. {POINT_AT}")

    def state_dict(self) -> dict[str, int]:
        """What a resumed run goes on from: the heads of layers that were captured."""
        return dict(self.heads)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a state."""
        self.heads = {name: heads for name, heads in state.items() if name in self.names}

    def close(self) -> None:
        """Cease to listen; may be called twice."""
        if self._readers is not None:
            self._readers.remove()
        if self._scope is not None:
            self._scope.remove()
        self._hooks = self._readers = self._scope = None
        self.armed = False
        self._captured = {}

    def _listen(self) -> list[Tap]:
        if isinstance(self._layers, Mapping):
            let_hooks_be_seen(self._module)
            self._readers = ReaderHooks(self._module, self._layers, self._capture, self._failed, self._rows, MAX_ROWS)
            return self._readers.taps
        taps, outermost = attention_taps(self._module, self._layers)
        if is_compiled(self._module):
            self._failures = True
            self._warn(f"compiled code hides its attention. {POINT_AT}")
            return taps
        self._hooks = AttentionHooks(taps, self._capture, self._failed, self._rows, MAX_ROWS, outermost)
        self._hooks.whole = self._whole
        return taps

    def _capture(self, name: str, captured: Captured) -> None:
        sums, highest = self._read(captured)
        if name in self._captured:
            before, largest = self._captured[name]
            if len(before) != len(sums):
                return
            sums, highest = before + sums, torch.maximum(largest, highest)
        self._captured[name] = sums.to(accumulation_dtype(sums.device)), highest

    def _failed(self, name: str, error: Exception) -> None:
        self._failures = True
        self._warn(f"the attention of `{name}` could not be read: {type(error).__name__}: {error}")

    def _agree(self, device: torch.device) -> None:
        """Let every process know every layer that any has captured, and its heads. Collective."""
        found = {name: len(sums) for name, (sums, _) in self._captured.items()}
        if world_size() > 1 and self._news:  # at a point, and as a rule once: it waits for the device
            heads = map(int, max_over_processes([found.get(name, 0) for name in self.names], device))
            found = dict(zip(self.names, heads, strict=True))
        if world_size() == 1 or self._news:
            self.heads = {name: heads for name, heads in found.items() if heads} | self.heads

    def _share(self, watched: Sequence[str], device: torch.device) -> dict[tuple[str, str], Tensor]:
        """Sums and maxima of all heads of all layers, over all processes. Collective."""
        dtype = accumulation_dtype(device)
        (added, compared), sums, highest = self._read.columns, [], []
        for name in watched:
            heads = self.heads[name]
            of_layer = self._captured.get(name)
            if of_layer is None or len(of_layer[0]) != heads:
                of_layer = torch.zeros(heads, added), torch.full((heads, compared), -torch.inf)
            sums.append(of_layer[0].to(device, dtype))
            highest.append(of_layer[1].to(device, dtype))
        total, largest, news = torch.cat(sums), torch.cat(highest), {}
        if world_size() > 1:
            # a layer that only now begins to run: told with the sums, agreed on at the next point
            late = torch.full_like(total[:1], float(any(name not in self.heads for name in self._captured)))
            total, largest = all_reduce_sum(torch.cat([total, late])), all_reduce_max(largest)
            news, total = {("", _NEWS): total[-1, 0]}, total[:-1]
        self._captured.clear()
        table = torch.cat([total, largest], dim=1)
        parts = torch.split(table, [self.heads[name] for name in watched])
        return {(name, "heads"): part.flatten() for name, part in zip(watched, parts, strict=True)} | news


def attention_taps(module: nn.Module, layers: Sequence[str] | None) -> tuple[list[Tap], str | None]:
    """Layers that calls of attention may belong to; and what those outside of all belong to, if they count.

    Args:
        module: The model.
        layers: Names or patterns; ``None`` for every module.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    if layers is not None:
        return find_taps(module, list(layers)), None
    taps = find_taps(module, ["*"]) if list(module.children()) else []
    # the attention of a softmax or a dropout is that of the module around it
    taps = [tap for tap in taps if any(True for _ in tap.module.parameters())]
    outermost = type(module).__name__
    return [*taps, Tap(outermost, module)], outermost


def check_readers(layers: Layers) -> None:
    """Refuse what is no choice of layers.

    Raises:
        ValueError: If it is a string, empty, or a mapping to what cannot be called.
    """
    check_layers(layers, "all attention")
    if isinstance(layers, Mapping) and not all(map(callable, layers.values())):
        raise ValueError(f"`layers` as a mapping takes functions `read(module, args, kwargs)`, got {layers!r}.")
