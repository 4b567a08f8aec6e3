"""Processes for whatever is to be checked on several, forked from one that has imported what they need."""

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy


def spawn(check: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Run ``check(rank, *args)``, a function of a module, in processes of its own; raises what one of them raises."""
    _import_once()
    mp.start_processes(check, args, nprocs, start_method="forkserver")


def forkserver_ddp() -> DDPStrategy:
    """``ddp_spawn``, launcher, pickling and pipe alike, but its processes need not import everything again."""
    _import_once()
    return DDPStrategy(start_method="forkserver", process_group_backend="gloo")


def _import_once() -> None:
    multiprocessing.set_forkserver_preload(["lightning_collapse", "lightning.pytorch", "torch.distributed"])


def on_two_processes(check: Callable[..., None], *arguments: Any) -> None:
    """Run ``check(rank, *arguments)``, a function of a module, in two processes that a trainer takes for its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_run, (port, check, arguments), nprocs=2)


def _run(rank: int, port: int, check: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
    check(rank, *arguments)
