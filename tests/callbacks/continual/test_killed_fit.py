"""A fit that the system kills in the middle of a task goes on from its last checkpoint as if it had not been."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_collapse import Projection, Replay, WeightPenalty
from lightning_collapse.penalties import EWC
from lightning_collapse.replay import ReplayBuffer
from tests.continual import steady, task
from tests.toys import QUIET

SAVED, KILLED = 4, 5
"""Steps of the second task, which has six; at the end of the second one dies."""


def methods() -> list[Any]:
    return [Replay(ReplayBuffer(10, policy="class_balanced")), WeightPenalty(EWC(weight=10.0)), Projection()]


class Resumable(DataLoader):
    """A loader that goes on where a checkpoint was saved, as those of streams do; every other pass is a whole one."""

    first = given = 0

    def __iter__(self) -> Any:
        first, self.first, self.given = self.first, 0, 0
        for batch in super().__iter__():
            self.given += 1
            if self.given > first:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.first = state_dict["given"]


def fit(model: Any, callbacks: list[Any], index: int, **kwargs: Any) -> None:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(**{**QUIET, "logger": False, "enable_checkpointing": saves}, callbacks=callbacks)
    trainer.fit(model, Resumable(task(index), batch_size=8), **kwargs)


class Kill(Callback):
    """As a scheduler does that waits no longer, between two checkpoints."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def train_whole(directory: Path) -> None:
    whole, callbacks = steady(), methods()
    for index in range(3):
        fit(whole, callbacks, index)
    keep(whole, callbacks, directory / "whole")


def train_and_die(directory: Path) -> None:
    model, callbacks = steady(), methods()
    fit(model, callbacks, 0)
    saver = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(model, [*callbacks, saver, Kill()], 1)


def resume(directory: Path) -> None:
    resumed, again = steady(seed=3), methods()
    fit(resumed, again, 1, ckpt_path=directory / f"step={SAVED}.ckpt", weights_only=True)
    fit(resumed, again, 2)
    keep(resumed, again, directory / "resumed")


def keep(model: Any, callbacks: list[Any], path: Path) -> None:
    replay, penalty, _ = callbacks
    rows = next(iter(replay.buffer.loader(10, shuffle=False)))
    torch.save({"weights": model.state_dict(), "rows": rows, "learned": penalty.penalty.state_dict()}, path)


def run(function: Callable[[Path], None], directory: Path) -> int | None:
    """Its exit code, of a process of its own: what other tests have set changes rounding in this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_collapse", "lightning.pytorch"])
    process = context.Process(target=alone, args=(function, directory))
    process.start()
    process.join(120)
    return process.exitcode


def alone(function: Callable[[Path], None], directory: Path) -> None:
    torch.set_num_threads(1)
    function(directory)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a system without this signal")
def test_a_fit_that_is_killed_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    assert run(train_and_die, tmp_path) == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"step=2.ckpt", f"step={SAVED}.ckpt"}
    assert run(train_whole, tmp_path) == run(resume, tmp_path) == 0
    torch.testing.assert_close(
        torch.load(tmp_path / "whole", weights_only=False),
        torch.load(tmp_path / "resumed", weights_only=False),
        rtol=0,
        atol=0,
    )
