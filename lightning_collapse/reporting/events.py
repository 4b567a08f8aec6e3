"""Event files of TensorBoard as plain records: every point of every curve, and no file can stop the reading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from struct import unpack_from
from typing import Any

Histograms = dict[int, tuple[list[float], list[float]]]

_PATTERN = "*.tfevents.*"
_TEXT = "/text_summary"  # what `SummaryWriter.add_text` appends
_HEAD, _TAIL = 12, 4  # of a TFRecord: length and its checksum before the message, the message's checksum behind it


@dataclass
class Run:
    """What the event files of one folder say.

    Attributes:
        name: Path of the folder below the one that was asked for.
        scalars: Value by step, by tag.
        histograms: ``(right edges, counts)`` by step, by tag.
        texts: Text by step, by tag; of several texts at one step each that differs, one below the other.
        began: Time of the first event, in seconds since 1970; NaN without one.
        ended: Time of the last event.
    """

    name: str
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    histograms: dict[str, Histograms] = field(default_factory=dict)
    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    began: float = nan
    ended: float = nan

    @property
    def last_step(self) -> int:
        """Largest step of any record; 0 without one."""
        kinds: tuple[dict[str, Any], ...] = (self.scalars, self.histograms, self.texts)
        return max((max(points) for kind in kinds for points in kind.values()), default=0)


def read_runs(logdir: str | Path) -> list[Run]:
    """Read all event files under a folder; files in one folder are one run, as in TensorBoard.

    Nothing is sampled away. What is written at a step again, as after a resume, replaces what was there, but for texts:
    a guard may say several things at one step. A file whose end is still being written, or broken, is read up to there.

    Args:
        logdir: The folder, as ``tensorboard --logdir`` takes it.

    Returns:
        The runs in the order of their names, steps in ascending order.

    Raises:
        ValueError: If there is no such folder, or no event file under it.
    """
    root = Path(logdir)
    if not root.is_dir():
        raise ValueError(
            f"`logdir` must be a folder with TensorBoard event files, got {str(logdir)!r}: no such folder."
        )
    files = sorted(path for path in root.rglob(_PATTERN) if path.is_file())
    if not files:
        raise ValueError(
            f"`logdir` must be a folder with TensorBoard event files, got {str(logdir)!r}: none is under it. Give the"
            " folder that `TensorBoardLogger(save_dir)` writes to, such as 'lightning_logs'."
        )
    runs: dict[Path, Run] = {}
    for path in files:
        folder = path.parent
        name = root.resolve().name if folder == root else folder.relative_to(root).as_posix()
        _add(runs.setdefault(folder, Run(name)), path)
    return [_in_order(run) for run in sorted(runs.values(), key=lambda run: _natural(run.name))]


def _add(run: Run, path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    for message in _records(path):
        try:
            event = Event.FromString(message)
        except Exception:  # protobuf's own class, of a package that is not ours to import
            return  # nothing behind it can be trusted
        if event.wall_time:
            run.began = min(event.wall_time, run.began) if run.began == run.began else event.wall_time
            run.ended = max(event.wall_time, run.ended) if run.ended == run.ended else event.wall_time
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                run.scalars.setdefault(value.tag, {})[event.step] = value.simple_value
            elif kind == "histo":
                bins = list(value.histo.bucket_limit), list(value.histo.bucket)
                run.histograms.setdefault(value.tag, {})[event.step] = bins
            elif kind == "tensor" and value.tag.endswith(_TEXT):
                text = b"\n".join(value.tensor.string_val).decode(errors="replace")
                texts = run.texts.setdefault(value.tag.removesuffix(_TEXT), {})
                before = texts.get(event.step)
                texts[event.step] = text if before in (None, text) else f"{before}\n{text}"


def _records(path: Path) -> Iterator[bytes]:
    """Messages of a TFRecord file. Without its checksums, which in Python cost more than all the rest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(_HEAD)) == _HEAD:
            (length,) = unpack_from("<Q", head)
            if length > size:
                return
            message = file.read(length)
            if len(message) < length or len(file.read(_TAIL)) < _TAIL:
                return
            yield message


def _in_order(run: Run) -> Run:
    for kind in (run.scalars, run.histograms, run.texts):
        for tag in list(kind):
            kind[tag] = dict(sorted(kind[tag].items()))  # type: ignore[arg-type]
    return run


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """``version_2`` before ``version_10``."""
    parts = re.split(r"([0-9]+)", name)  # every second one is a number
    return [(i % 2 == 1, int(part) if i % 2 else 0, part) for i, part in enumerate(parts)]
