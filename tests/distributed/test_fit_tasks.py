"""Two processes, each with random numbers of its own, go on where both were cut off."""

import logging
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_collapse import ContinualMetrics, fit_tasks
from tests.callbacks.continual.test_fit_tasks import Cut, CutOffError
from tests.continual import Learner, held_out, training
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, weights


def _sequence(directory, *callbacks):
    model, metrics = Learner(), ContinualMetrics([held_out(seed) for seed in (1, 2)])
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 3, "devices": 2, "use_distributed_sampler": False}

    def make_trainer():
        saver = ModelCheckpoint(directory, save_last=True)
        strategy = DDPStrategy(process_group_backend="gloo")
        return Trainer(**options, strategy=strategy, logger=False, callbacks=[metrics, *callbacks, saver])

    fit_tasks(make_trainer, model, [training(1), training(2)], directory=directory)
    return weights(model), metrics.values


def _check(rank, directory):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(rank)
    whole, values = _sequence(Path(directory) / "whole")
    torch.manual_seed(rank)
    try:
        _sequence(Path(directory) / "cut", Cut("on_train_epoch_start", 24))  # in the second task
        raise AssertionError("not cut off")
    except CutOffError:
        pass
    torch.manual_seed(100 + rank)
    again, same = _sequence(Path(directory) / "cut")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert torch.equal(values, same)
    assert not values.isnan().any()


def test_two_processes(tmp_path):
    on_two_processes(_check, str(tmp_path))
