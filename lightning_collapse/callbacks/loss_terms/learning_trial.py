"""Learning trial: whether a penalty can learn a task, and what that costs, is found out on one batch beforehand."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from copy import deepcopy
from types import TracebackType
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_collapse.callbacks.evaluation.preserved_fit import preserved_fit
from lightning_collapse.penalties.base import Penalty
from lightning_collapse.utilities.batch import batch_size
from lightning_collapse.utilities.distributed import max_over_processes
from lightning_collapse.utilities.modules import clean_name

_REMEDIES = {
    "outputs": "how the model is called on a batch, `outputs=lambda module, batch: module.net(batch[0])`",
    "labels": "where the labels are, `labels=lambda batch: batch[1]`",
    "estimator": 'an estimator that needs no gradient of single samples, `estimator="batched"`',
}


def try_to_learn(
    penalty: Penalty,
    name: str,
    parameters: dict[str, nn.Parameter],
    trainer: Trainer,
    pl_module: LightningModule,
    batches: Iterable[Any],
    may_be_empty: bool = False,
) -> bool:
    """Have a copy of a penalty learn from one batch; neither it nor the fit notices. Says what it costs. Collective.

    Args:
        penalty: Whose; its own state stays as it is.
        name: What it is called.
        parameters: Those of the module that it is for.
        trainer: Of the fit that starts.
        pl_module: Its module.
        batches: One batch.
        may_be_empty: Whether there may be none yet, of a buffer that training fills.

    Returns:
        Whether it was tried: not on a batch without rows, on no process.

    Raises:
        MisconfigurationException: If it cannot.
    """
    # what the user passed, and parameters, are not copied; a bound method would bring its whole model along
    kept = [*parameters.values(), *(value for value in vars(penalty).values() if callable(value))]
    trial = deepcopy(penalty, {id(thing): thing for thing in kept})
    trial.start(parameters)
    try:
        with preserved_fit(trainer, pl_module, gradients=True):
            found, started = list(batches), time.perf_counter()
            empty = may_be_empty if not found else not any(map(batch_size, found))
            [tried] = max_over_processes([not empty], pl_module.device)
            if tried:
                trial.consolidate(pl_module, found)
                _tell_costs(trial, name, time.perf_counter() - started)
            return bool(tried)
    except Exception as error:
        layer = _layer_of(error.__traceback__, pl_module)
        remedies = [text for argument, text in _REMEDIES.items() if hasattr(penalty, argument)]
        remedies.append("other data, `WeightPenalty(..., loader=...)`")
        cause = f"{type(error).__name__}: {error!s:.400}".rstrip(".?")
        raise MisconfigurationException(
            f"`WeightPenalty`, {name!r}: `{type(penalty).__name__}` could not learn the task when it ends. Tried on one"
            f" batch it fails{f' in layer `{layer}`' if layer else ''}: {cause}. What"
            f" may fit: {'; '.join(remedies)}."
        ) from error


def _tell_costs(penalty: Penalty, name: str, seconds: float) -> None:
    kept: list[Tensor] = []
    for value in (penalty.state.tables, *vars(penalty).values()):
        apply_to_collection(value, Tensor, kept.append, wrong_dtype=nn.Parameter)
    size = sum(part.numel() * part.element_size() for part in kept) / 2**20
    limit = getattr(penalty, "n_samples", None)
    reads = "all of its data" if limit is None else f"up to {limit} samples"
    rank_zero_info(
        f"`WeightPenalty`, {name!r}: {size:.2f} MiB are kept beside the model after a task. To learn from one batch"
        f" took {seconds:.2f} s; when a task ends it reads {reads}."
    )


def _layer_of(trace: TracebackType | None, root: nn.Module) -> str:
    """The innermost submodule that was running, by its clean name."""
    names = {id(module): clean_name(name) for name, module in root.named_modules()}
    ran = [names[id(module)] for module in _selves(trace) if id(module) in names]
    return ran[-1] if ran else ""


def _selves(trace: TracebackType | None) -> Iterator[Any]:
    while trace is not None:
        yield trace.tb_frame.f_locals.get("self")
        trace = trace.tb_next
