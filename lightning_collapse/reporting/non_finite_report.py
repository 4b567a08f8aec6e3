"""Report of the first NaN or infinity: a sentence and a table for a reader, and the same as JSON."""

import json
import os
from dataclasses import asdict
from math import isfinite, isnan
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_collapse.functional.non_finite import Cause
from lightning_collapse.monitoring.non_finite_origin import Origin
from lightning_collapse.reporting.logger_adapters import log_text
from lightning_collapse.utilities.console import rank_zero_say
from lightning_collapse.utilities.distributed import world_size

SCHEMA = 1
"""Version of the records."""


def report_folder(trainer: Trainer) -> str | None:
    """A folder ``nonfinite`` beside the logs of a run; ``None`` where it has none. Collective."""
    beside = trainer.log_dir  # asks the first process
    return None if beside is None or trainer.fast_dev_run else os.path.join(beside, "nonfinite")


@rank_zero_only
def tell(trainer: Trainer, origin: Origin, folder: str | None) -> None:
    """Say it on the console, send it to every logger that takes text, and write it as JSON; on the first process."""
    said, table, file = sentence(origin, world_size()), as_markdown(origin), ""
    for logger in trainer.loggers:
        log_text(logger, "nonfinite/first", f"{said[:1].upper()}{said[1:]}\n\n{table}", origin.step)
    try:
        if folder is not None:
            file = f"{folder}/step={origin.step:08d}.json"
            filesystem = get_filesystem(folder)  # it may be remote
            filesystem.makedirs(folder, exist_ok=True)
            with filesystem.open(file, "w") as stream:
                stream.write(as_json(origin) + "\n")
    finally:  # a full disk keeps nobody from being told
        written = f"\nThe same as JSON: {file}" if file else ""
        rank_zero_say(f"`FirstNonFinite`: {said}\n{table}{written}")


def sentence(origin: Origin, ranks: int = 1) -> str:
    """What is said of it in one sentence.

    Example:
        >>> from lightning_collapse.functional import Cause
        >>> sentence(Origin(7, Cause.OVERFLOW, "net.2", "numbers went up to 3e+04", rank=1), ranks=2)
        'first NaN or infinity at step 7 on rank 1, made by `net.2`: overflow; numbers went up to 3e+04.'
    """
    rank = f" on rank {origin.rank}" if ranks > 1 else ""
    made = "" if origin.cause is Cause.UNSEEN else f", made by `{origin.layer}`: {origin.cause.words}"
    return f"first NaN or infinity at step {origin.step}{rank}{made}; {origin.words}."


def as_markdown(origin: Origin) -> str:
    """The table in aligned columns: one line for each tensor that was passed on, and a column for each step.

    Example:
        >>> from lightning_collapse.functional import Cause
        >>> from lightning_collapse.monitoring.non_finite_origin import Row
        >>> row = Row(2, "net.2", "Linear", "output 0", [3.0, float("inf")], "float16", 14.4, "overflow")
        >>> print(as_markdown(Origin(7, Cause.OVERFLOW, "net.2", "", steps=[6, 7], rows=[row])))
        | call | module         | what     | type    | abs-max at step 6 | 7   | headroom, bits | verdict  |
        | ---- | -------------- | -------- | ------- | ----------------- | --- | -------------- | -------- |
        | 2    | net.2 (Linear) | output 0 | float16 | 3                 | inf | 14.4           | overflow |
    """
    if not origin.rows:
        return ""
    steps = [f"abs-max at step {step}" if not i else str(step) for i, step in enumerate(origin.steps)]
    lines = [["call", "module", "what", "type", *steps, "headroom, bits", "verdict"]]
    for row in origin.rows:
        module = f"{row.module} ({row.kind})" if row.kind and row.kind != row.module else row.module
        last = len(row.values) - 1
        values = ["" if isnan(size) and i < last else f"{size:.3g}" for i, size in enumerate(row.values)]
        bits = "" if isnan(row.headroom) else f"{row.headroom:.3g}"
        lines.append(["" if row.call < 0 else str(row.call), module, row.what, row.dtype, *values, bits, row.verdict])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def as_json(origin: Origin) -> str:
    """All of it as one line of JSON; numbers that JSON does not know are strings.

    Example:
        >>> from lightning_collapse.functional import Cause
        >>> as_json(Origin(7, Cause.DATA, "batch", "tensor 0 of the batch holds it already"))[:59]
        '{"schema": 1, "step": 7, "cause": "data", "layer": "batch",'
    """
    record = {"schema": SCHEMA, **asdict(origin), "cause": origin.cause.words}
    return json.dumps(_plain(record), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
