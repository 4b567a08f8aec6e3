"""Output monitor: entropy and partition function of a head's softmax, of a policy's actions, and of a logit lens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, log, nan
from operator import attrgetter
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.output_entropy import BINS, output_readings, output_sums
from lightning_collapse.monitoring.execution_order import ExecutionOrder
from lightning_collapse.monitoring.logit_lens import LogitLens, final_norm
from lightning_collapse.monitoring.output_hooks import OutputHooks, Outputs
from lightning_collapse.monitoring.output_usage import GROUPS, usages
from lightning_collapse.monitoring.policy_covariance import advantages_of_rows, policy_sums
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.reporting import log_histogram
from lightning_collapse.rules import Trend
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.distributed import all_reduce_max, all_reduce_sum
from lightning_collapse.utilities.features import evenly, padding_mask
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.modules import Tap, clean_name, let_hooks_be_seen
from lightning_collapse.utilities.output_head import norm_behind, output_head
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.targets import shifted_labels, targets_of

POINTS = 64
"""Over which the half-life of the entropy is read."""
PICTURE_EVERY = 10
AGREES = 1e-2
"""How far, relative to one plus the log-partition, the lens of what the final norm receives may be off."""
_SUMS = 8 + BINS
_CUI = "Cui et al. 2025, arXiv 2505.22617"
_PRIOR = "Arazo et al. 2019, arXiv 1908.02983"
_DRIFT = "Wortsman et al. 2023, arXiv 2309.14322"
Reader = Callable[[Any], Tensor]


class OutputMonitor(Monitor):
    """Log how sure the softmax of a head is, whether its logits drift, and what a policy's updates do to its entropy.

    **Logged metrics**, to every logger and to ``trainer.callback_metrics``: ``output/{head}/...``, with ``advantages``
    ``policy/{head}/...`` of the tokens that have one, and with ``lens`` ``lens/{layer}/...``:

    {curves}

    Besides, to loggers that can show it, every tenth point a histogram of the entropies over ``log V``.

    A point rests on the training batch that ends in it. Logits are read in the moment the head returns them, in
    ``float32``, 1024 rows at a time. Left out are rows whose label is -100, those that ``batch["attention_mask"]``
    calls padding, and calls without a gradient where others have one: a policy that acts inside the training step is
    not the one that is trained. Compare entropies at one temperature and one truncation only.

    Args:
        head: Name of the layer that returns the logits ``(..., V)``, as a tensor or as the field ``logits``; ``None``
            for the last Linear layer with two outputs or more that the first batch runs.
        labels: A function from the batch to integer labels, or to the actions that were taken, as many as there are
            rows of logits; or the name of an attribute of the module that holds them when the head has run. ``None``
            takes them from the batch where they usually are, moved as causal language models do.
        advantages: The same for advantages, one for each row or for each sequence; the attribute is read when the step
            has ended. Tokens whose advantage is NaN have none.
        lens: Names or patterns of layers whose hidden states go through the final norm and the head, at most 1024 rows
            of each: a forward pass of the head per layer. Of what a pattern matches the outermost. ``None`` for none.
        norm: Name of the final norm; ``None`` for the last one that the model defines outside of its blocks.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument of a wrong kind; when the fit starts, as ``MisconfigurationException``, on a name
            that matches nothing, or if there is no such head.

    References:
        Cui et al., *The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models*, 2025,
        https://arxiv.org/abs/2505.22617; Wortsman et al., *Small-scale proxies for large-scale Transformer training
        instabilities*, 2023, https://arxiv.org/abs/2309.14322.

    Example::

        trainer = Trainer(callbacks=[OutputMonitor()])
    """

    family = "output"
    declares = (
        Curve("entropy", "entropy of the softmax, in nats, mean over rows", "0 to log V", "near 0", "Shannon 1948"),
        Curve("entropy_fraction", "that entropy over log V", "0 to 1", "near 0", "Shannon 1948"),
        Curve("entropy_half_life", "steps in which the entropy halves, if it falls", "0 to infinity", "falling"),
        Curve("log_z", "log-partition of the logits, mean over rows", "any number", "far from 0", _DRIFT),
        Curve("log_z_rms", "root mean square of the log-partition over rows", "0 to infinity", "growing", _DRIFT),
        Curve("max_logit", "the largest logit of any row", "any number", "grows without end", _DRIFT),
        Curve("usage", "outputs that the mean prediction uses", "1 to V, at most 256", "near 1", _PRIOR),
        Curve("length", "rows that count, per sequence that has any", "0 to infinity", "does not tell"),
        Curve("n", "rows behind the point, over all processes", "0 to infinity", "few: a rough reading"),
        Curve("flag", "logits", "0 to 7", "above 0: why to doubt the point"),
        Curve("entropy", "entropy of the softmax, of rows with an advantage", "0 to log V", "near 0", _CUI, "policy"),
        Curve("covariance", "covariance of log p and advantage", "any number", "above 0 near the end", _CUI, "policy"),
        Curve("covariance_positive", "share of covariance terms above 0", "0 to 1", "does not tell", _CUI, "policy"),
        Curve("covariance_top", "99.98 % quantile of covariance terms", "any number", "growing", _CUI, "policy"),
        *(
            Curve(name, f"{words} of what the head makes of an earlier layer", reach, "rises with depth", family="lens")
            for name, words, reach in (
                ("entropy", "entropy", "0 to log V"),
                ("log_z", "log-partition", "any number"),
                ("cross_entropy", "cross-entropy", "0 to infinity"),
            )
        ),
    )
    identity = ("head", "every_n_steps")

    def __init__(
        self,
        head: str | None = None,
        labels: Reader | str | None = None,
        advantages: Reader | str | None = None,
        lens: Sequence[str] | None = None,
        norm: str | None = None,
        every_n_steps: int | None = None,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        for name, value in (("head", head), ("norm", norm)):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"`{name}` takes the name of one layer, or None to find it, got {value!r}.")
        for name, read in (("labels", labels), ("advantages", advantages)):
            if read is not None and not isinstance(read, str) and not callable(read):
                raise ValueError(
                    f"`{name}` takes a function from a batch to a tensor, or the name of an attribute of the module,"
                    f" got {read!r}."
                )
        if lens is not None:
            check_layers(lens, "no layer")
        elif norm is not None:
            raise ValueError(f"`norm` is {norm!r}, and without `lens` there is nothing it is read for. Drop it.")
        self.head, self.labels, self.advantages, self.lens, self.norm = head, labels, advantages, lens, norm
        self._hooks: OutputHooks | None = None
        self._lens: LogitLens | None = None
        self._order: ExecutionOrder | None = None
        self._scope: StepScope | None = None
        self._root: LightningModule | None = None
        self._batch: Any = None
        self._armed = False
        self._trend = Trend(POINTS, "log")
        self._histogram: list[float] = []

    @override
    def state(self) -> dict[str, Any]:
        tap = None if self._hooks is None else self._hooks.head
        names = {} if self._root is None else {id(m): clean_name(name) for name, m in self._root.named_modules()}
        return {"trend": self._trend.state_dict(), "head": "" if tap is None else names.get(id(tap.module), "")}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._trend.load_state_dict(state["trend"])
        if self._order is not None and self._root is not None and state["head"]:
            self._order.remove()
            self._order = None
            self._listen(self.choose_tap("head", state["head"], self._root))

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        let_hooks_be_seen(pl_module)
        self._root, self._trend = pl_module, Trend(POINTS, "log")
        found = output_head(pl_module) if self.head is None else self.choose_tap("head", self.head, pl_module)
        if found is None:
            raise MisconfigurationException(
                "`OutputMonitor(head=None)`: the model has no Linear layer with two outputs or more to end with. Name"
                " the layer that returns the logits, such as `OutputMonitor(head='decoder')`."
            )
        self._listen(found)
        self._scope = StepScope(pl_module)
        self._order = ExecutionOrder(pl_module, type(self).__name__) if self.head is None else None

    @property
    @override
    def listeners(self) -> list[HookOwner]:
        return [owner for owner in (self._hooks, self._lens, self._order) if owner is not None]

    @override
    def stop(self) -> None:
        for owner in (self._hooks, self._lens, self._order, self._scope):
            if owner is not None:
                owner.remove()
        self._hooks = self._lens = self._order = self._scope = self._root = self._batch = None
        self._armed = False

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        self._armed = batches_left == 0
        asked = [self._order] if self._order is not None else []
        if self._armed and self._hooks is not None:
            self._batch, self._hooks.mask = batch, padding_mask(batch)
            self._hooks.targets = self._read_targets
            asked += [self._hooks, *([self._lens] if self._lens is not None else [])]  # type: ignore[list-item]
        if asked and self._scope is not None:
            self._scope.request(*asked)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._order is not None and self._hooks is not None:
            order, self._order = self._order, None
            ran = order.pop()
            found = output_head(pl_module, ran) if ran is not None else None
            norm = norm_behind(pl_module, ran, found.module) if found is not None and ran is not None else ""
            if norm and found is not None:
                self.warn_once(
                    f"`{found.name}` is the last Linear, and the norm `{norm}` runs behind it: a function makes the"
                    " logits, and nothing is drawn. Name a module that returns them with `head=`."
                )
                self._hooks.remove()
                self._hooks, self._armed = None, False
            elif found is not None and found.module is not self._hooks.head.module:
                self._listen(found)
                self._armed = False  # nobody has heard it yet

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Sums over the rows of all processes, and the largest logit. Collective."""
        if not self._armed or self._hooks is None:
            return {}
        self._armed = False
        outputs, device = self._hooks.pop(), pl_module.device
        pieces, peaks = self._own(outputs, device)
        lens = {} if self._lens is None else self._lens.pop()
        names = [] if self._lens is None else self._lens.names
        dtype, nothing = pieces.dtype, pieces.new_zeros(_SUMS)
        for name in names:
            rows = lens.get(name)
            known = rows is not None and outputs is not None
            pieces = torch.cat([pieces, output_sums(rows, outputs.vocabulary) if known else nothing])  # type: ignore[arg-type, union-attr]
        gap = self._gap(outputs, lens.get(self._lens.last) if self._lens is not None else None)
        total = all_reduce_sum(pieces)
        highest = all_reduce_max(torch.cat([peaks, gap.to(peaks)]))
        layer = self._hooks.head.name
        own, usage, *others = torch.split(total, [_SUMS + 1, 2 * GROUPS, *[_SUMS] * len(names)])
        readings = {(layer, "sums"): own, (layer, "peaks"): highest, (layer, "usage"): usages(usage.view(2, -1))}
        readings |= {(name, "lens"): sums for name, sums in zip(names, others, strict=True)}
        if self.advantages is not None:
            readings[layer, "policy"] = policy_sums(outputs, self._read_advantages(outputs), device).to(dtype)
        self._batch = None
        return readings

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        [layer] = {layer for layer, kind in numbers if kind == "sums"} or {""}
        if not layer:
            return []
        largest, vocabulary, gap = numbers[layer, "peaks"]
        found = _means(numbers[layer, "sums"][:_SUMS], vocabulary)
        sequences, width = numbers[layer, "sums"][_SUMS], log(max(vocabulary, 1))
        n, lost = int(found["n"]), found["nonfinite"]
        flag = Flag.NONFINITE if lost else Flag.OK
        if not n:
            flag = Flag.FEW_ROWS if vocabulary > 0 else Flag.NOT_CALLED
        if flag == Flag.NOT_CALLED:
            self.warn_once(
                f"`{layer}` did not run before a point, or returned no logits; its curves read NaN there. Name the"
                " layer that returns them with `head=`."
            )
        self._histogram = found["histogram"]
        self._trend.update(step, found["entropy"])
        values = {name: found[name] for name in ("entropy", "entropy_fraction", "log_z", "log_z_rms")}
        values["max_logit"] = largest if n else nan
        values["usage"], labels, _ = numbers[layer, "usage"]
        values |= {"length": n / sequences} if sequences else {}
        values |= {"entropy_half_life": -log(2) / self._trend.slope} if self._trend.direction() == "falling" else {}
        values |= {"n": float(n), "flag": float(flag)}
        nulls = {"entropy": width, "entropy_fraction": 1.0, "log_z": width, "usage": labels} if n else {}
        errors = {"entropy": found["error"], "entropy_fraction": found["error"] / width if width else nan}
        points = [
            Point(self.family, layer, name, step, value, n, nulls.get(name, nan), flag, errors.get(name, nan))
            for name, value in values.items()
        ]
        points += self._policy_points(layer, step, numbers.get((layer, "policy")))
        return points + self._lens_points(step, numbers, vocabulary, gap)

    @override
    def draw(self, trainer: Trainer, step: int) -> None:
        if self._hooks is not None and self._points % PICTURE_EVERY == 0 and any(self._histogram):
            edges = [i / BINS for i in range(BINS + 1)]
            for logger in trainer.loggers:
                name = f"{self.family}/{self._hooks.head.name}/entropy_histogram"
                log_histogram(logger, name, self._histogram, edges, step)

    def _listen(self, head: Tap) -> None:
        """Watch a head from now on."""
        assert self._root is not None
        for owner in (self._hooks, self._lens):
            if owner is not None:
                owner.remove()
        if self.lens is not None:
            matched = self.choose_taps(self.lens, [], self._root)
            inside = {id(part) for tap in matched for part in tap.module.modules() if part is not tap.module}
            layers = [tap for tap in matched if id(tap.module) not in inside]  # of blocks, not of what is in them
            if self.norm is not None:
                norm: Tap | None = self.choose_tap("norm", self.norm, self._root)
            else:
                norm = final_norm(self._root, head.module, [tap.module for tap in layers])
            self._lens = LogitLens(layers, head, norm, self.contained)
        self._hooks = OutputHooks(head, self.contained, None if self._lens is None else self._lens.project)

    def _own(self, outputs: Outputs | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sums and extremes of this process: with the number of sequences, and that of outputs."""
        dtype = accumulation_dtype(device)
        if outputs is None:
            nothing = torch.zeros(_SUMS + 1 + 2 * GROUPS, dtype=dtype, device=device)
            return nothing, torch.tensor([-inf, 0.0], device=device)
        if outputs.unpaired:
            self.warn_once(
                f"the head returned {len(outputs.counted)} rows and there are {outputs.unpaired} labels; all rows"
                " count. Say which labels belong to them with `labels=`."
            )
        sums = output_sums(outputs.rows, outputs.vocabulary, outputs.counted).to(device, dtype)
        sequences, start = torch.zeros(1, dtype=dtype, device=device), 0
        for count, length in outputs.sequences:
            part = outputs.counted[start : start + count * length]
            sequences += part.view(count, length).any(dim=1).sum().to(sequences)
            start += count * length
        counted = outputs.counted & outputs.rows.entropy.isfinite()
        largest = outputs.rows.max_logit.where(counted, -inf).amax() if len(counted) else torch.tensor(-inf)
        peaks = torch.stack([largest.to(device, torch.float32), torch.tensor(float(outputs.vocabulary), device=device)])
        return torch.cat([sums, sequences, outputs.usage.flatten().to(device, dtype)]), peaks

    def _gap(self, outputs: Outputs | None, last: Any) -> Tensor:
        """How far the lens of what the final norm receives is from what the head returned, the largest of all rows."""
        if outputs is None or last is None:
            return torch.zeros(1)
        rows = [evenly(field, len(last.log_z)) for field in (outputs.rows.log_z, outputs.rows.entropy)]
        if len(rows[0]) != len(last.log_z):
            return torch.zeros(1)
        pairs = zip((last.log_z, last.entropy), rows, strict=True)
        off = torch.stack([(found - wanted).abs() / (1 + wanted.abs()) for found, wanted in pairs])
        return off.nan_to_num(0.0).amax().reshape(1) if off.numel() else torch.zeros(1)

    def _policy_points(self, layer: str, step: int, sums: Any) -> list[Point]:
        if sums is None:
            return []
        n, *values = sums
        names = ("entropy", "covariance", "covariance_positive", "covariance_top")
        return [Point("policy", layer, name, step, x, int(n)) for name, x in zip(names, values, strict=True)]

    def _lens_points(self, step: int, numbers: Mapping[Name, Any], vocabulary: float, gap: float) -> list[Point]:
        if gap > AGREES:
            self.warn_once(
                f"the lens of what the final norm receives is off by {gap:.2g} from what the head returned: something"
                " else lies between them. Its curves are left out; name the final norm with `norm=`."
            )
            return []
        points = []
        for name in [name for name, kind in numbers if kind == "lens"]:
            found = _means(numbers[name, "lens"], vocabulary)
            values = {key: found[key] for key in ("entropy", "log_z", "cross_entropy")}
            points += [Point("lens", name, key, step, x, int(found["n"])) for key, x in values.items() if x == x]
        return points

    def _read_targets(self) -> Tensor | None:
        if self.labels is not None:
            return self._reading("labels", self.labels)
        labels = targets_of(self._batch)
        if labels is None or self._root is None or labels.is_floating_point():
            return None
        return shifted_labels(self._batch, labels, self._root)

    def _read_advantages(self, outputs: Outputs | None) -> Tensor | None:
        given = None if self.advantages is None else self._reading("advantages", self.advantages)
        if given is None or outputs is None:
            return None
        found = advantages_of_rows(given.detach(), outputs)
        if found is None:
            self.warn_once(
                f"there are {given.numel()} advantages and {len(outputs.counted)} rows of logits; the policy curves"
                " read NaN. Give one advantage for each row, or for each sequence."
            )
        return found

    def _reading(self, argument: str, read: Reader | str) -> Tensor | None:
        """What a user's function or attribute says; once a word of what is wrong with it."""
        try:
            found = attrgetter(read)(self._root) if isinstance(read, str) else read(self._batch)
        except Exception as error:
            self.warn_once(f"`{argument}` failed: {type(error).__name__}: {error}")
            return None
        if not isinstance(found, Tensor):
            self.warn_once(f"`{argument}` must give a tensor, and gave a {type(found).__name__}; it is left out.")
            return None
        return found


def _means(sums: Sequence[float], vocabulary: float) -> dict[str, Any]:
    """Readings of sums that have come to the host with the point."""
    found = output_readings(torch.tensor(sums, dtype=torch.float64), max(vocabulary, 1.0))
    return {name: value.tolist() for name, value in found.items()}
