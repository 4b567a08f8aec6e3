"""Experience replay: rows of earlier tasks beside those of every batch."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.continual.step_offset import StepsAcrossTasks
from lightning_collapse.replay.batch_rows import concatenate, count_rows, map_rows
from lightning_collapse.replay.replay_buffer import ReplayBuffer
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.batch import batch_size as size_of
from lightning_collapse.utilities.distributed import process_rank, to_first_process, world_size
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.random_states import own_random_states, restore_own_random_states
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.trainer import batch_hook_owner, is_aside, to_device
from lightning_collapse.utilities.training_step import wrap_method


class Replay(StepsAcrossTasks):
    """Rehearse: from the second task on every training batch has rows of a buffer behind its own [1].

    The buffer is offered the rows of each training batch, as they come from the loader, and never those that it
    rehearses. A batch is made longer on its way to the device, before the module's own batch hooks, so that these,
    ``training_step`` and every callback see one batch, and what augments a batch on its way augments rehearsed rows
    afresh. A buffer with ``storage="device"`` takes rows, and gives them, behind the transfer. Validation, and passes
    that others make over data, are left alone.

    When a task ends the buffers of all processes become one sample of all their rows, see
    :meth:`~lightning_collapse.replay.ReplayBuffer.synchronize`; until then a process rehearses what it holds itself.
    What they hold is in the checkpoint, of all processes, with their random numbers. A buffer for ``"herding"`` is
    offered nothing here, since it looks at whole classes and their features: add to it when a task ends.

    At ends of tasks it publishes ``replay/rows``, how many rows all processes hold, and where the batches have labels
    ``replay/classes`` and ``replay/largest_share``, of the most frequent of them.

    Args:
        buffer: Where rows are kept.
        batch_size: Rows to rehearse with a batch; ``None`` for as many as it has, 0 for none: they are only kept.
        from_start: Whether to rehearse in the first task too.
        rows: Returns what is kept of a batch, any nest of tensors with a row for each sample; the whole by default.
        labels: Returns the classes of these rows from the batch; where they usually are by default.
        combine: Returns the batch to train on from the batch and what is rehearsed, which has the form of what was
            kept; by default the tensors of both, one behind the other.
        name: Tells several of one trainer apart, which Lightning requires of those whose buffers are alike in policy
            and size: in their state, and in their curves, which are ``replay/{name}/rows`` then.

    Raises:
        ValueError: If an argument is none of these.
        MisconfigurationException: When the fit starts, if ``training_step`` takes an iterator or another has the same
            buffer; at the first training batch, if it cannot be kept or the buffer is larger than the memory.

    References:
        [1] Chaudhry et al., *On Tiny Episodic Memories in Continual Learning*, 2019. https://arxiv.org/abs/1902.10486

    Example::

        replay = Replay(ReplayBuffer(size=2000))
        for task in tasks:
            Trainer(callbacks=[replay]).fit(model, task)
    """

    reads_weights = False
    left_out_of_copies: ClassVar[bool] = True
    """A teacher that is copied from a module holds no rows."""

    def __init__(
        self,
        buffer: ReplayBuffer,
        batch_size: int | None = None,
        from_start: bool = False,
        rows: Callable[[Any], Any] | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        combine: Callable[[Any, Any], Any] = concatenate,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(buffer, ReplayBuffer):
            raise ValueError(f"`buffer` must be a `ReplayBuffer`, got {buffer!r:.80}.")
        if batch_size is not None:
            require_whole(0, batch_size=batch_size)
        for argument, function in (("rows", rows), ("labels", labels), ("combine", combine)):
            if not (callable(function) or (function is None and argument != "combine")):
                raise ValueError(f"`{argument}` must be a function, got {function!r:.80}.")
        self.buffer, self.batch_size, self.from_start = buffer, batch_size, from_start
        if not (name is None or (isinstance(name, str) and name)):
            raise ValueError(f"`name` must be a string that is not empty, got {name!r:.80}.")
        self.rows, self.labels, self.combine, self.name = rows, labels, combine, name
        self.rows_of_batch = 0
        self._streams = buffer.policy != "herding"
        self._tried = False
        self._pending: tuple[Any, Tensor | None] | None = None  # kept when the step on it is over
        self._in_step = False
        self._unwrap_hook: Callable[[], None] = _nothing

    @override
    def _without_fit(self) -> dict[str, Any]:
        return super()._without_fit() | {"_unwrap_hook": _nothing}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._detach()
        if "dataloader_iter" in signature(pl_module.training_step).parameters:
            raise MisconfigurationException(
                f"`{type(self).__name__}` adds rows to a batch on its way, and `training_step(dataloader_iter)` fetches"
                " batches itself. Take `batch` instead."
            )
        holders = [*trainer.callbacks, getattr(pl_module, "replay", None)]
        if sum(isinstance(holder, Replay) and holder.buffer is self.buffer for holder in holders) > 1:
            raise MisconfigurationException("Two `Replay`s keep rows in one `buffer`. Make one for each.")
        self._tried = False
        hook = "on_before_batch_transfer" if self.buffer.storage == "host" else "on_after_batch_transfer"

        def around(inner: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
            if trainer.training and not is_aside():
                batch = self._rehearse(pl_module, batch)
            return inner(batch, *args, **kwargs)

        self._unwrap_hook = wrap_method(batch_hook_owner(trainer, hook), hook, around)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._in_step = False

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep()
        labels = self.buffer.synchronize()
        counts = labels[labels >= 0].unique(return_counts=True)[1].tolist()  # type: ignore[no-untyped-call]
        readings = {"rows": len(labels)}
        if counts:
            readings |= {"classes": len(counts), "largest_share": max(counts) / sum(counts)}
        step = self._steps.step(trainer)
        points = [Point("replay", self.name or "", name, step, value) for name, value in readings.items()]
        publish(trainer, pl_module, points)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._in_step:
            self._pending = None  # a resumed run trains on the batch, and offers it, again
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._detach()

    @property
    @override
    def state_key(self) -> str:
        named = {} if self.name is None else {"name": self.name}  # as in older checkpoints where it has none
        return self._generate_state_key(policy=self.buffer.policy, size=self.buffer.size, **named)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._keep()
        own = {"buffer": self.buffer.state_dict(), "rank": process_rank()}
        return {**super().state_dict(), **own}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the buffers of the other processes. Collective."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            gather_buffers(state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._pending = None
        rank, ranks = process_rank(), world_size()
        states = state_dict.get("buffers") or {state_dict["rank"]: state_dict["buffer"]}
        for of, state in states.items():
            if of == rank:
                self.buffer.load_state_dict(state)
            elif of >= ranks and of % ranks == rank:  # of a process that is no more
                self.buffer.merge(state)
        if rank not in states and self.buffer.policy in ("ring", "class_ring"):  # its rows come after all of these
            self.buffer.seen = max(state["seen"] for state in states.values())

    def _rehearse(self, pl_module: LightningModule, batch: Any) -> Any:
        """The batch to train on in place of one."""
        if self._tried:
            with self.containment("rehearsing with a batch", "batches like it stay as they are, and are not kept"):
                return self._combined(pl_module, batch)
            return batch
        try:
            if self._streams:
                self._try_combining(batch, self.buffer.check(*self._kept_of(batch))[0])
            combined = self._combined(pl_module, batch)
        except Exception as error:
            said = str(error) if isinstance(error, ValueError | MemoryError) else f"{error!r}."
            raise MisconfigurationException(
                f"`{type(self).__name__}` cannot keep the first training batch, or add to it: {said:.400} What to"
                " keep can be said with `rows=` and `labels=`, and how to add it with `combine=`."
            ) from error
        self._tried = True
        if self._streams and not self.buffer.seen:
            rank_zero_info(
                f"`{type(self).__name__}`: the buffer takes {self.buffer.nbytes / 1e6:.3g} MB when it is full"
                f" ({self.buffer.storage}), and so much in every checkpoint."
            )
        return combined

    def _try_combining(self, batch: Any, rows: Any) -> None:
        """With its own rows, as long as there are no others: before the first task, not behind it."""
        if self.batch_size != 0 and count_rows(rows):
            states = own_random_states()
            try:
                self.combine(map_rows(torch.clone, batch), map_rows(torch.clone, rows))
            finally:
                restore_own_random_states(states)

    def _combined(self, pl_module: LightningModule, batch: Any) -> Any:
        self._keep()
        self.rows_of_batch = size_of(batch)
        wanted = self.rows_of_batch if self.batch_size is None else self.batch_size
        rehearsal = self.buffer.sample(wanted) if wanted and (self.from_start or self.task_index) else None
        kept = self._kept_of(batch) if self._streams else None
        if kept is not None and (rehearsal is None or self.combine is not concatenate):
            # what follows may change a batch in place, where it is not copied to a device before
            copied = map_rows(lambda t: t.clone() if t.device == pl_module.device else t, list(kept))
            kept = copied[0], copied[1]
        if rehearsal is not None:
            batch = self.combine(batch, rehearsal)
        self._pending, self._in_step = kept, True
        return batch

    def _kept_of(self, batch: Any) -> tuple[Any, Tensor | None]:
        rows = batch if self.rows is None else self.rows(batch)
        return rows, None if self.labels is None else self.labels(batch)

    def _keep(self) -> None:
        """Offer the latest batch to the buffer: behind the step on it, whichever way that asks for rows."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self.containment("keeping a batch", "batches like it are not kept"):
                self.buffer.add(*pending)

    def _detach(self) -> None:
        self._keep()
        self._unwrap_hook()
        self._unwrap_hook = _nothing


def gather_buffers(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the buffers of all processes, by rank, for the first one to save. Collective."""
    if world_size() > 1:
        state["buffers"] = dict(enumerate(to_first_process(state["buffer"])))
    return state


def rehearsal_batch(trainer: Trainer, buffer: ReplayBuffer, n: int) -> Any:
    """Rows of a buffer as a training step would get them; ``None`` if there are none."""
    rows = buffer.sample(n)
    return None if rows is None else to_device(trainer, rows, prepared=buffer.storage == "device")


def _nothing() -> None:
    pass


def _register() -> None:
    source = "Chaudhry et al. 2019, arXiv 1902.10486"
    for name, reads, span, collapsed in (
        ("rows", "rows that are kept, of all processes", "0 to size", "no failure"),
        ("classes", "their classes", "0 to C", "fewer than were seen"),
        ("largest_share", "share of the most frequent class", "1 / C to 1", "1: one class"),
    ):
        register_curve("replay", name, reads=reads, range=span, collapsed=collapsed, source=source)


_register()
