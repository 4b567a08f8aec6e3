"""Random loggers: good ones, and those that fail."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from tests.toys import MemoryLogger

GOOD = ("none", "memory", "csv", "tensorboard")
BAD = ("raises", "fails later", "refuses folders", "both")


class Failing(MemoryLogger):
    """Raises on metrics: always, from the third call on, or where a name is the folder of an earlier one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.how == "raises" or (self.how == "fails later" and step is not None and step >= 3):
            raise OSError("no space left on device")
        for old in {name for _, row in self.rows for name in row} | set(metrics):
            if any(new.startswith(old + "/") or old.startswith(new + "/") for new in metrics):
                raise OSError(f"{old} is a file, not a folder")
        super().log_metrics(metrics, step)


def loggers(kind: str, folder: Path) -> list[Logger] | bool:
    """What a trainer takes."""
    made: dict[str, Any] = {
        "none": lambda: False,
        "memory": lambda: [MemoryLogger()],
        "csv": lambda: [CSVLogger(folder, "csv")],
        "tensorboard": lambda: [TensorBoardLogger(folder, "tb")],
        "both": lambda: [MemoryLogger(), Failing("raises")],
    }
    return made[kind]() if kind in made else [Failing(kind)]
