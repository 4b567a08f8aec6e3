"""Rollback: return to the last healthy state of training before the onset, at a lower learning rate."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_collapse.callbacks.guard.action import Action, checkpoint_folder
from lightning_collapse.callbacks.guard.healthy_snapshots import HealthySnapshots, Snapshot
from lightning_collapse.callbacks.guard.skipped_updates import SkippedUpdates
from lightning_collapse.callbacks.guard.training_health import weights_are_finite
from lightning_collapse.callbacks.guard.training_state import Undo, apply
from lightning_collapse.rules import Judgement, Verdict
from lightning_collapse.utilities.private_torch import nested_schedulers, scheduler_rates
from lightning_collapse.utilities.trainer import load_own_checkpoint, logging_step

_FROM_NEXT = -1


class Rollback(Action):
    """Action of ``CollapseGuard``: restore the last healthy state before the onset, lower the learning rate.

    At points where no rule sees anything it saves the state of training; the newest few of these files are kept. At a
    verdict it brings back what one of them holds of weights, buffers, optimizers, learning-rate schedulers, the
    gradient scaler, the running statistics of regularizers and the copies of callbacks that average weights
    (``WeightAveraging``, EMA, SWA), and multiplies every learning rate by ``factor``. The weights are those that are
    trained, whatever other callbacks put into checkpoints. The fit goes on from there with new data: its step count,
    the position in the data, other callbacks and the state of random number generators are not turned back, so that the
    batches since then are passed over; ``skip_steps`` passes over more, as Chowdhery et al. did ("PaLM", 2022, arXiv
    2204.02311: from about 100 steps before a spike, without 200 to 500 batches).

    Which of them: a failure is noticed after its onset, and what was saved in between may hold it. It is the newest
    that lies ``margin`` steps before the earliest onset (``Verdict.since``) of the new verdicts; if none does, the
    oldest that there is, and the warning says so. Newer ones are removed.

    All of it comes back, or nothing, with a warning: if the present training has other weights, parameter groups,
    schedulers or averages than the saved one, as after a backbone was unfrozen, or if one of them cannot be loaded. If
    a file cannot be read, the next older one is taken.

    Args:
        factor: What every learning rate is multiplied by; relative to the rate when a state was saved, once more for
            each return since then.
        every_n_steps: Optimizer steps that lie between two saves at least.
        times: How often; one more time it returns and ends the fit, which leaves the weights of a healthy state.
        margin: Optimizer steps before the onset at which a state counts as healthy.
        keep: Number of files. They reach back at least ``(keep - 1) * every_n_steps`` steps.
        skip_steps: Optimizer steps after a return whose update is not made: batches are read, losses and gradients
            computed and curves drawn, buffers of the forward pass and learning-rate schedules go on, while weights,
            states of optimizers and averages stay as they are, bit by bit.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When the fit starts, if ``skip_steps`` is asked for and an optimizer runs its closure
            several times in a step, as ``LBFGS`` does.

    Example::

        guard = CollapseGuard(action=["warn", Rollback(factor=0.5, skip_steps=200)])
        trainer = Trainer(callbacks=[SpectralAlignmentMonitor(), guard])
    """

    goes_on = True

    def __init__(
        self,
        factor: float = 0.5,
        every_n_steps: int = 500,
        times: int = 3,
        margin: int = 100,
        keep: int = 3,
        skip_steps: int = 0,
    ) -> None:
        if not 0 < factor <= 1:
            raise ValueError(f"`factor` multiplies the learning rate and must lie in (0, 1], got {factor}.")
        for name, number in (("every_n_steps", every_n_steps), ("times", times), ("margin", margin), ("keep", keep)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        if skip_steps < 0:
            raise ValueError(f"`skip_steps` must be at least 0, got {skip_steps}.")
        self.factor = factor
        self.every_n_steps = every_n_steps
        self.times = times
        self.margin = margin
        self.keep = keep
        self.skip_steps = skip_steps
        self._dirpath: str | None = None
        self._snapshots = HealthySnapshots(keep)
        self._returns = 0
        self._skips_until = 0  # the step whose update is made again; `_FROM_NEXT` until it is known
        self._updates: SkippedUpdates | None = None
        self._averages: list[bool | None] = []

    def check(self, others: Sequence[Action], kinds: Sequence[str]) -> None:
        """Refuse another one."""
        if same := sum(isinstance(other, Rollback) for other in others):
            raise ValueError(f"`action` has {same + 1} `Rollback`s, which would undo each other. Keep one.")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {
            "snapshots": self._snapshots.state_dict(),
            "returns": self._returns,
            "skips_until": self._skips_until,
            "averages": self._averages if self._updates is None else self._updates.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self._snapshots.load_state_dict(state_dict["snapshots"])
        self._returns, self._skips_until = state_dict["returns"], state_dict["skips_until"]
        self._averages = state_dict["averages"]

    def attach(self, trainer: Trainer, pl_module: LightningModule, dirpath: str | None) -> None:
        """Note where to save, and be asked before updates if some may have to be left out.

        Raises:
            MisconfigurationException: If they cannot be left out.
        """
        self.detach()
        self._dirpath = dirpath
        if self.skip_steps:
            who = f"Rollback(skip_steps={self.skip_steps})"
            self._updates = SkippedUpdates(trainer, lambda _: self._skips(trainer), who, self._averages)

    def detach(self) -> None:
        """No longer be asked."""
        if self._updates is not None:
            self._averages = self._updates.state_dict()
            self._updates.remove()
        self._updates = None

    def _skips(self, trainer: Trainer) -> bool:
        """Whether the update of the running step is left out."""
        step = logging_step(trainer)
        if self._skips_until == _FROM_NEXT:
            self._skips_until = step + self.skip_steps
        skips = step < self._skips_until
        if self._updates is not None:
            self._updates.note(skips)
        return skips

    def on_points(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> None:
        """Save where all is well. Collective."""
        if judgement.healthy:
            self.remember(trainer, pl_module, logging_step(trainer), checkpoint_folder(trainer, self._dirpath))

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> bool | None:
        """Return. Collective."""
        first = min(judgement.new, key=lambda verdict: verdict.since)
        return self.restore(trainer, pl_module, judgement.step, first)

    def remember(self, trainer: Trainer, pl_module: LightningModule, step: int, folder: str) -> None:
        """Save this healthy state, if the last one is old enough or of no use any more. Collective."""
        if trainer.fast_dev_run or not self._snapshots.needs(trainer, step, self.every_n_steps):
            return
        if weights_are_finite(trainer, pl_module):  # whatever the rules say: their layers need not have run since
            self._snapshots.save(trainer, folder, step, self._returns)

    def restore(self, trainer: Trainer, pl_module: LightningModule, step: int, first: Verdict | None = None) -> bool:
        """Return to a healthy state before the onset of a verdict, and say whether that was possible. Collective."""
        ends = self._returns >= self.times
        if ends:
            trainer.should_stop = True
            rank_zero_warn(f"`Rollback` has returned {self.times} times, and stops the fit at step {step}.")
        if not self._snapshots.kept:
            rank_zero_warn(f"`Rollback` has no healthy state to return to at step {step}: no point was healthy yet.")
            return False
        if changed := self._snapshots.changed(trainer):
            since = self._snapshots.kept[-1].step
            rank_zero_warn(f"`Rollback` returns to nothing at step {step}: since step {since} the {changed}.")
            return False
        onset = step if first is None else first.since
        there = self._bring_back(trainer, self._snapshots.before(onset, self.margin))
        if there is None:
            return False
        self._snapshots.drop_after(trainer, there.step)
        self._returns += 1
        scale = self.factor ** (self._returns - there.returns)
        _scale_learning_rates(trainer, scale)
        self._skips_until = _FROM_NEXT
        rates = "" if ends else f", the learning rates {scale:g} times what they were then"
        rank_zero_warn(
            f"`Rollback` at step {step}: weights, optimizers and schedulers are those of step {there.step} again"
            f"{rates}. {self._why(there.step, onset, first)}"
        )
        return True

    def _why(self, there: int, onset: int, first: Verdict | None) -> str:
        """Which onset lies behind it, and whether what was kept reaches before it."""
        what = f"step {onset}" if first is None else f"the onset of {first.name} at step {onset}"
        if there <= onset - self.margin:
            words = f"That is {onset - there} steps before {what}."
        else:
            words = f"None is kept of {self.margin} steps before {what} or earlier: this is the oldest there is."
        return words + (f" The next {self.skip_steps} updates are not made." if self.skip_steps else "")

    def _bring_back(self, trainer: Trainer, candidates: Sequence[Snapshot]) -> Snapshot | None:
        """Load the first that can be read, whole; if a process cannot, all are as they were before. Collective."""
        for snapshot in candidates:
            state = self._read(trainer, snapshot.path)
            if state is None:
                continue
            undo, problem = Undo(trainer), ""
            try:
                apply(trainer, state)
            except Exception as error:
                problem = f"`Rollback` cannot bring back {snapshot.path!r}, and all is as before: {error!r:.400}"
            if trainer.strategy.reduce_boolean_decision(not problem):
                return snapshot
            undo()
            rank_zero_warn(problem or f"`Rollback` returns to nothing: another process cannot use {snapshot.path!r}.")
            return None
        return None

    @staticmethod
    def _read(trainer: Trainer, path: str) -> dict[str, Any] | None:
        """What a file holds, if every process can read it; a warning says if not. Collective."""
        state, problem = None, ""
        try:
            state = load_own_checkpoint(trainer, path)  # we have written it: it may hold objects of any class
        except Exception as error:  # cleaned up, a lost disk: the run must not end now
            problem = f"`Rollback` cannot read {path!r} and does not return to it: {error!r:.400}"
        if trainer.strategy.reduce_boolean_decision(not problem):
            return state
        rank_zero_warn(problem or f"`Rollback` does not return to {path!r}: another process cannot read it.")
        return None


def _scale_learning_rates(trainer: Trainer, factor: float) -> None:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):  # the latter of schedulers that cycle
                if name in group:
                    group[name] = _scaled(group[name], factor)
    for config in trainer.lr_scheduler_configs:
        for scheduler in _nested(config.scheduler):
            for name in scheduler_rates(scheduler):
                if isinstance(rates := getattr(scheduler, name, None), list):
                    setattr(scheduler, name, [_scaled(rate, factor) for rate in rates])


def _nested(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those it is made of."""
    yield scheduler
    for inner in nested_schedulers(scheduler):
        yield from _nested(inner)


@torch.no_grad()
def _scaled(rate: Any, factor: float) -> Any:
    return rate.mul_(factor) if isinstance(rate, Tensor) else rate * factor
