"""Feature window: the rows of chosen layers in the training batches right before a point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.functional.lidar import Lidar
from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.monitoring.codebooks import Codebooks
from lightning_collapse.monitoring.execution_order import ExecutionOrder
from lightning_collapse.monitoring.feature_buffer import Batch, FeatureBuffer, LayerFeatures
from lightning_collapse.monitoring.feature_hooks import Captured, FeatureHooks
from lightning_collapse.monitoring.sampling_plan import SamplingPlan
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.monitoring.training_flops import TrainingFlops
from lightning_collapse.monitoring.view_pairs import ROWS, ViewPairs
from lightning_collapse.spectral.cost import rows_within
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import max_over_processes, world_size
from lightning_collapse.utilities.execution import Execution, functional_layers
from lightning_collapse.utilities.features import evenly, padding_mask
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.modules import Tap, let_hooks_be_seen, weighted_layers
from lightning_collapse.utilities.private_torch import tree_leaves

EVERYTHING = 1 << 31


class FeatureWindow:
    """Hooks, sampling plan and buffer of some layers, from the first batch of a fit to its end.

    The first batch shows what a layer returns; from then on rows are copied in the batches that a point rests on, as
    few as hold the wanted number, and one more. A point that falls on a short batch is filled up from the ones before
    it, whether the end of an epoch lies between them or not. Forward passes outside of the training step do not count.
    Between points a forward pass costs one ``if`` per layer.

    Args:
        root: The ``LightningModule``, for its training step and for what that costs; or any module, whose forward pass
            is the step then.
        taps: Where to look.
        device: Where rows of layers that have not run are said to be.
        rows: Rows of a point, on all processes together; a function of the layer's width; or ``None`` for four per
            feature, as far as ``max_overhead`` allows.
        max_overhead: Share of the floating-point operations of training that a spectrum of these rows may cost.
        max_dim: Layers with more features are kept as a random projection to this many.
        limit: Rows to copy per call of a layer; ``None`` for four per feature, but 1024 at most.
        position: Copy this token of every sequence only.
        paired: Leave out rows that nothing lies beside.
        take: Is given the tap's name, the rows of every batch of the window, what lies beside them, and the batches
            left, instead of the buffer; for sums that need no rows.
        containment: Where failures of hooks are told, in the name of its owner.
        choose: Other taps, if the order in which the first batch runs the modules asks for others; it may set
            :attr:`rows` and ``limit`` for them.
        views: Keep rows of two views of the same samples too, of layers that see two.
        positions: Take every position of a map for a row, and not their mean.
        codebooks: Counts the codes of the batches too.

    Attributes:
        hooks: The hooks.
        plans: How rows of each layer are collected, of those that have run.
        window: Batches before a point to listen to.
        pairs: The views, if they were asked for.
        unpaired: Rows that a layer returned and what was given beside them, if the latest batch had unlike numbers.
        beside_width: Numbers that lie beside a row; 0 before there were any.
        functional: Clean names of layers that the first batch has not called, and whose weights it has trained: a
            function was given them. Known where ``choose`` is given.

    Example:
        >>> from lightning_collapse.utilities.modules import default_taps
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> window = FeatureWindow(net, default_taps(net), torch.device("cpu"), rows=16)
        >>> for step in range(4):  # a point every second step
        ...     left = 1 - step % 2
        ...     window.before_batch(None, left)
        ...     _ = net(torch.randn(8, 4))
        ...     window.after_batch(left, between=2)
        >>> {name: tuple(layer.rows.shape) for name, layer in window.features().items()}
        {'0': (16, 3), '2': (16, 2), '2.input': (16, 3)}
        >>> window.close()
    """

    def __init__(
        self,
        root: nn.Module,
        taps: Sequence[Tap],
        device: torch.device,
        rows: int | Callable[[int], int] | None = None,
        max_overhead: float = 0.0,
        max_dim: int = EVERYTHING,
        limit: int | None = None,
        position: int | None = None,
        paired: bool = False,
        take: Callable[[str, Captured, Tensor | None, int], None] | None = None,
        containment: Containment | None = None,
        choose: Callable[[Execution], Sequence[Tap]] | None = None,
        views: bool = False,
        positions: bool = False,
        codebooks: Codebooks | None = None,
    ) -> None:
        let_hooks_be_seen(root)
        self.taps = self._listening = list(taps)
        self.rows = rows
        self.max_overhead = max_overhead
        self.max_dim = max_dim
        self.plans: dict[str, SamplingPlan] = {}
        self.window = 1
        self.pairs = ViewPairs() if views else None
        self.codebooks = codebooks
        self._root, self._device = root, device
        self.limit = limit
        self._make_hooks = partial(FeatureHooks, position=position, containment=containment, positions=positions)
        self.hooks = self._make_hooks(self.taps, limit)
        self._scope = StepScope(root)
        self._choose, self._chosen, self._execution = choose, self.taps, Execution(())
        self._order = ExecutionOrder(root, self.hooks.containment.owner) if choose is not None else None
        self.functional: list[str] = []
        self._requested = False
        self._flops = TrainingFlops(root, containment) if max_overhead else None
        self._budget = 0.0
        self._batch_flops = 0
        self._buffer = FeatureBuffer(max_dim)
        self._usual: dict[str, int] = {}
        self._limits: dict[str, int] = {}
        self._time = 0
        self._negotiated = False
        self._beside: Tensor | None = None
        self._paired, self._take = paired, take
        # every second batch may have nothing beside its rows: then the one before a point's last is asked
        self._patience = 2 if paired else 1
        self.unpaired: tuple[int, int] | None = None
        self.beside_width = 0

    def wants(self, batches_left: int) -> bool:
        """Whether the batch that is followed by ``batches_left`` others before a point is listened to."""
        return not self._negotiated or batches_left < self.window

    def before_batch(self, batch: Any, batches_left: int, beside: Tensor | None = None) -> None:
        """Listen to the coming batch, if a point will rest on it.

        Args:
            batch: For its padding mask.
            batches_left: Batches between this one and the one that ends in a point.
            beside: What belongs to each row that a layer returns, shape ``(n, k)``, such as targets: kept with it.
        """
        if self._flops is not None:
            self._flops.total = 0  # the sanity check has run through the model too
        if self._chosen != self._listening:
            self.hooks.remove()
            doubted = self.hooks.doubted
            self.taps = self._listening = self._chosen
            self.hooks = self._make_hooks(self.taps, self.limit)
            self.hooks.doubted = doubted
        if self.wants(batches_left):
            self._requested = True
            self.hooks.mask, self.hooks.limits = padding_mask(batch), self._limits
            if self.pairs is not None:
                self.hooks.views = ROWS if self.pairs.open or self.pairs.layers else 0
                self.hooks.halved = None if self.pairs.open else self.pairs.layers
            if self.codebooks is not None:
                self.codebooks.given = {storage_of(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
            self._scope.request(*(one for one in (self.hooks, self._order, self.codebooks) if one is not None))
            self._beside = beside

    def lay_beside(self, beside: Tensor) -> None:
        """Have something else beside the rows of the batch that is listened to, see :meth:`before_batch`."""
        if self._requested:
            self._beside = beside

    def after_batch(self, batches_left: int, between: int) -> None:
        """Take in what was captured.

        Collective after the first batch, and while a layer has not run yet at points, and before them if it is paired.

        Args:
            batches_left: As in :meth:`before_batch`.
            between: Batches from one point to the next.
        """
        self._time += 1
        if not self._requested:
            return
        self._requested = False
        captured = self.pop()
        if self.codebooks is not None:
            self.codebooks.collect(self._time)
        beside = self._pair(captured)
        first = not self._negotiated
        if first or (batches_left < self._patience and len(self.plans) < len(self.taps)):
            self._negotiate(captured, beside, between)
        for name, of_layer in captured.items():
            plan = self.plans.get(name)
            if plan is None or batches_left >= plan.window or (self._paired and name not in beside):
                continue
            if self._take is not None:
                self._take(name, of_layer, beside.get(name), batches_left)
                continue
            if self.pairs is not None and of_layer.views is not None and of_layer.views.shape[2] <= self.max_dim:
                self.pairs.add(name, self._time, of_layer.views)
            batch = Batch(self._time, of_layer.rows, of_layer.mask, beside.get(name))
            batch = batch.spread(plan.rows if first else plan.rows_per_batch)  # the first point rests on it alone
            self._usual[name] = max(self._usual.get(name, 0), len(batch.rows))
            self._buffer.add(name, batch, self._capacity(name))
        if self._order is not None:
            order, self._order = self._order, None
            self._follow(order.pop())
            self.functional = functional_layers(self._root, order.not_called)

    def listen(self, batch: Any, planned: bool = True) -> None:
        """Copy rows of all calls until :meth:`pop`: as many as planned of each, or as the limit of its layer allows."""
        self.hooks.armed, self.hooks.mask = True, padding_mask(batch)
        self.hooks.limits = self._limits if planned else {}

    def pop(self) -> dict[str, Captured]:
        """Cease to copy, and hand over what was captured."""
        self.hooks.armed = False
        return self.hooks.pop()

    def features(self) -> dict[str, LayerFeatures]:
        """What the latest batches brought, of every layer that has ever run on any process."""
        found = {}
        for name, plan in self.plans.items():
            width = min(plan.width, self.max_dim)
            since = self._time - plan.window + 1
            layer = self._buffer.read(name, width, self._capacity(name), since, self._device)
            layer.expected, layer.width = plan.rows * world_size(), plan.width
            found[name] = layer
        return found

    def views(self) -> dict[str, Tensor]:
        """Sums over pairs of views, of layers that see two or may, see :class:`ViewPairs`. Collective."""
        if self.pairs is None:
            return {}
        return self.pairs.read(list(self.plans), self._time - self.window + 1, self._device)

    def lidar(self) -> dict[str, Lidar]:
        """LiDAR of layers that see two views and bring more pairs than features, or might. Collective."""
        if self.pairs is None:
            return {}
        return self.pairs.lidar(self.lidar_widths(), self._time - self.window + 1, self._device)

    def lidar_widths(self) -> dict[str, int]:
        """Widths of the layers that bring more pairs than features, if they see two views."""
        enough = {name: plan for name, plan in self.plans.items() if plan.width <= self.max_dim}
        return {name: of.width for name, of in enough.items() if of.rows * world_size() > 2 * (of.width + 1)}

    def codes(self) -> dict[str, Tensor]:
        """Perplexity, rows and unused share of codebooks, see :class:`Codebooks`. Collective."""
        return {} if self.codebooks is None else self.codebooks.read(self._time - self.window + 1, self._device)

    def affordable(self, width: int) -> int:
        """Rows whose spectrum costs no more than ``max_overhead``; at least 64, at most four per feature."""
        return rows_within(self._budget, width)

    @property
    def settled(self) -> bool:
        """Whether it looks where it will look from now on; the first batch may have asked for other layers."""
        return self._chosen == self.taps

    @property
    def listeners(self) -> list[HookOwner]:
        """All that has hooks now."""
        return [owner for owner in (self.hooks, self._flops, self._order) if owner is not None]

    def close(self) -> None:
        """Remove the hooks and forget the rows; may be called twice."""
        self.hooks.remove()
        self._scope.remove()
        for listener in (self._flops, self._order):
            if listener is not None:
                listener.remove()
        self._buffer.clear()
        if self.pairs is not None:
            self.pairs.clear()
        if self.codebooks is not None:
            self.codebooks.clear()
        self._beside = None

    def state_dict(self) -> dict[str, Any]:
        """Plans and rows, as numbers, lists and tensors."""
        return {
            "plans": {name: list(plan) for name, plan in self.plans.items()},
            "batch_flops": self._batch_flops,
            "time": self._time,
            "beside_width": self.beside_width,
            "usual": dict(self._usual),
            "budget": self._budget,
            "execution": [list(names) for names in self._execution],
            "views": {} if self.pairs is None else self.pairs.state_dict(rows=world_size() == 1),
            "codes": {} if self.codebooks is None else self.codebooks.state_dict(),
            "rows": self._buffer.state_dict() if world_size() == 1 else {},  # a checkpoint holds those of one process
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called; with several processes the rows start anew."""
        self._follow(Execution(*map(tuple, state["execution"])))
        names = [tap.name for tap in self._chosen]
        self.plans = {name: SamplingPlan(*plan) for name, plan in state["plans"].items() if name in names}
        self._measure_window()
        self._negotiated = bool(self.plans)
        self._batch_flops, self._time, self._budget = state["batch_flops"], state["time"], state["budget"]
        self.beside_width, self._usual = state["beside_width"], dict(state["usual"])
        if world_size() == 1:
            self._buffer.load_state_dict(state["rows"], names, self._device)
        if self.pairs is not None and state.get("views"):
            self.pairs.load_state_dict(state["views"], self._device)
        if self.codebooks is not None and state.get("codes"):
            self.codebooks.load_state_dict(state["codes"], self._device)
        if self._negotiated:
            self._settle()
            if self._order is not None:
                self._order.remove()
                self._order = None

    def _follow(self, execution: Execution | None) -> None:
        """Watch what the order of execution says from the next batch on; what it does not say has no point before."""
        if self._choose is None or not execution or not execution.order:
            return
        self._execution, self._chosen = execution, list(self._choose(execution))
        self.taps = [tap for tap in self.taps if tap in self._chosen]
        self.plans = {tap.name: self.plans[tap.name] for tap in self.taps if tap.name in self.plans}
        self._measure_window()

    def _capacity(self, name: str) -> int:
        """Rows of a point on this process: what as many full batches bring as the plan has, or less if it says so."""
        plan = self.plans[name]
        return min(plan.rows, plan.batches * self._usual.get(name, 0))

    def _pair(self, captured: Mapping[str, Captured]) -> dict[str, Tensor]:
        """What lies beside the rows of each layer, as far as there is one for each."""
        given, self._beside, self.unpaired = self._beside, None, None
        if given is None:
            return {}
        pairs = {}
        for name, of_layer in captured.items():
            if len(given) == of_layer.returned:
                pairs[name] = evenly(given, len(of_layer.rows)).to(of_layer.rows.device)
            else:
                self.unpaired = of_layer.returned, len(given)
        return pairs

    def _negotiate(self, captured: Mapping[str, Captured], beside: Mapping[str, Tensor], between: int) -> None:
        """Decide how rows are collected, from what one batch brought. Collective."""
        if self._flops is not None:
            weights = sum(p.numel() for _, layer in weighted_layers(self._root) for p in layer.parameters())
            positions = max((of_layer.returned for of_layer in captured.values()), default=0)
            self._batch_flops = self._batch_flops or self._flops.total or 6 * weights * positions
        known = beside if self._paired else captured
        shapes = [captured[tap.name].rows.shape if tap.name in known else (0, 0) for tap in self.taps]
        width = max((pair.shape[1] for pair in beside.values()), default=0)
        own = [self._batch_flops, width, *(size for shape in shapes for size in shape)]
        # waits for the device off the step path: it happens once, as a rule
        self._batch_flops, self.beside_width, *numbers = map(int, max_over_processes(own, self._device))
        self._budget = self.max_overhead * self._batch_flops * between / max(len(self.taps), 1)
        for tap, per_batch, width in zip(self.taps, numbers[::2], numbers[1::2], strict=True):
            if per_batch and tap.name not in self.plans:
                rows = self.rows(width) if callable(self.rows) else self.rows
                rows = rows or self.affordable(min(width, self.max_dim))
                self.plans[tap.name] = SamplingPlan.make(rows, width, per_batch, between)
        self._measure_window()
        self._negotiated = True
        self._settle()

    def _measure_window(self) -> None:
        # not asked of the plans at every step, which would take as long as all else that a step brings
        self.window = max((plan.window for plan in self.plans.values()), default=self._patience)

    def _settle(self) -> None:
        if self._flops is not None:
            self._flops.remove()
            self._flops = None
        if self._take is None:
            self._limits = {name: plan.rows_per_batch for name, plan in self.plans.items()}
