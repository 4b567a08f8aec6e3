"""Logger adapters: text, data, pictures, histograms and the dashboard, for any logger.

Another logger joins with ``@log_image.register``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch, update_wrapper
from importlib import import_module
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_collapse.reporting.containments import METRICS, containment_of
from lightning_collapse.utilities.trainer import tensorboard_writer
from lightning_collapse.utilities.twin_packages import path_of

P = ParamSpec("P")
Handler = TypeVar("Handler", bound=Callable[..., None])


class Sink(Generic[P]):
    """A ``functools.singledispatch`` function of a logger's class that writes on rank zero only and never raises.

    Args:
        fallback: What happens for a logger class that has no handler.
    """

    def __init__(self, fallback: Callable[Concatenate[Any, P], None]) -> None:
        update_wrapper(self, fallback)
        self._dispatch = singledispatch(fallback)

    def register(self, handler: Handler) -> Handler:
        """Add a handler for the logger class that annotates its first parameter."""
        self._dispatch.register(handler)
        return handler

    def __call__(self, logger: Logger, *args: P.args, **kwargs: P.kwargs) -> None:
        """Send it to ``logger``, unless that has refused such before or all curves; a failure costs one warning."""
        failed, place = containment_of(logger).failed, f"`{self.__name__}`"
        if rank_zero_only.rank != 0 or place in failed or METRICS in failed:
            return
        try:
            self._handler(type(logger))(logger, *args, **kwargs)
        except Exception as error:  # a full disk, a lost connection: each backend raises its own classes
            if failed:
                failed[place] = repr(error)  # said before
            else:
                consequence = "curves are not affected, and what else this logger refuses is missing without a warning"
                containment_of(logger).catch(place, consequence, error)

    def _handler(self, kind: type) -> Callable[..., None]:
        """That of the class or of its nearest base; what the loggers of one package have serves those of its twin."""
        handlers = {path_of(cls): handler for cls, handler in self._dispatch.registry.items()}
        return next(handlers[path] for base in kind.__mro__ if (path := path_of(base)) in handlers)


def log_curves(logger: Logger, values: Mapping[str, float], step: int) -> None:
    """Send numbers to ``logger``; TensorBoard gets all of them in one record, which takes a tenth of the time."""
    found = tensorboard_writer(logger)
    if found is None:
        logger.log_metrics(dict(values), step=step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary  # not at import, which brings no module that is not there

    writer, prefix = found
    points = [Summary.Value(tag=prefix + name, simple_value=value) for name, value in values.items()]
    writer.add_summary(Summary(value=points), step)


@Sink
def log_text(logger: Logger, name: str, text: str, step: int) -> None:
    """Send Markdown to ``logger``. CSV appends it to ``texts.md`` in its ``log_dir``.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> logger = CSVLogger(mkdtemp(), name="run")
        >>> log_text(logger, "note", "All is **well**.", step=10)
        >>> (Path(logger.log_dir) / "texts.md").read_text().split()[-3:]
        ['All', 'is', '**well**.']
    """


@Sink
def log_data(logger: Logger, name: str, records: Sequence[str], step: int) -> None:
    """Send records, each one line of JSON, to ``logger``; CSV appends them to ``{name}.jsonl`` in its ``log_dir``.

    TensorBoard keeps them as a text, MLflow as a file; others get none.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> logger = CSVLogger(mkdtemp(), name="run")
        >>> log_data(logger, "facts", ['{"rank": 3}'], step=10)
        >>> (Path(logger.log_dir) / "facts.jsonl").read_text().strip()
        '{"rank": 3}'
    """


@Sink
def log_image(logger: Logger, name: str, image: npt.NDArray[np.uint8], step: int) -> None:
    """Send a picture ``(H, W, 3)`` to ``logger``. CSV writes ``figures/{name}/{step}.png`` in its ``log_dir``.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> logger = CSVLogger(mkdtemp(), name="run")
        >>> log_image(logger, "gray", np.full((2, 2, 3), 128, dtype=np.uint8), step=10)
        >>> [path.name for path in Path(logger.log_dir).glob("figures/gray/*")]
        ['00000010.png']
    """


@Sink
def log_histogram(logger: Logger, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
    """Send ``counts`` ``(B,)`` between ``edges`` ``(B + 1,)`` to ``logger``, here TensorBoard or W&B.

    Example:
        >>> from tempfile import mkdtemp
        >>> logger = TensorBoardLogger(mkdtemp(), name="run")
        >>> log_histogram(logger, "spread", counts=[1, 4, 2], edges=[0.0, 0.1, 0.2, 0.3], step=10)
    """


@Sink
def log_dashboard(logger: Logger, layout: Mapping[str, Mapping[str, tuple[str, Sequence[str]]]]) -> None:
    """Send a :func:`~lightning_collapse.reporting.dashboard_layout` to ``logger``, here TensorBoard; the last holds.

    Example:
        >>> from tempfile import mkdtemp
        >>> logger = TensorBoardLogger(mkdtemp(), name="run")
        >>> log_dashboard(logger, {"collapse": {"rank": ("Multiline", ["collapse/.*/effective_rank"])}})
    """


@log_text.register
def _(logger: TensorBoardLogger, name: str, text: str, step: int) -> None:
    logger.experiment.add_text(name, text, step)


@log_text.register
def _(logger: CSVLogger, name: str, text: str, step: int) -> None:
    with _open(logger, "texts.md", "ab") as file:
        file.write(f"## {name}, step {step}\n\n{text}\n\n".encode(errors="replace"))


@log_text.register
def _(logger: WandbLogger, name: str, text: str, step: int) -> None:
    logger.log_text(_safe_path(name), columns=["text"], data=[[text]], step=step)


@log_text.register
def _(logger: MLFlowLogger, name: str, text: str, step: int) -> None:
    logger.experiment.log_text(logger.run_id, text, f"{_safe_path(name)}/{step:08d}.md")


@log_data.register
def _(logger: TensorBoardLogger, name: str, records: Sequence[str], step: int) -> None:
    logger.experiment.add_text(name, "\n".join(records), step)


@log_data.register
def _(logger: CSVLogger, name: str, records: Sequence[str], step: int) -> None:
    with _open(logger, f"{_safe_path(name)}.jsonl", "ab") as file:
        file.write("".join(f"{record}\n" for record in records).encode())


@log_data.register
def _(logger: MLFlowLogger, name: str, records: Sequence[str], step: int) -> None:
    logger.experiment.log_text(logger.run_id, "\n".join(records), f"{_safe_path(name)}/{step:08d}.jsonl")


@log_image.register
def _(logger: TensorBoardLogger, name: str, image: npt.NDArray[np.uint8], step: int) -> None:
    logger.experiment.add_image(name, image, step, dataformats="HWC")


@log_image.register
def _(logger: CSVLogger, name: str, image: npt.NDArray[np.uint8], step: int) -> None:
    from PIL import Image  # Lightning does not import it, so neither may `import lightning_collapse`

    with _open(logger, f"figures/{_safe_path(name)}/{step:08d}.png", "wb") as file:
        Image.fromarray(image).save(file, format="PNG")


@log_image.register
def _(logger: WandbLogger, name: str, image: npt.NDArray[np.uint8], step: int) -> None:
    logger.log_image(_safe_path(name), [image], step=step)


@log_image.register
def _(logger: MLFlowLogger, name: str, image: npt.NDArray[np.uint8], step: int) -> None:
    logger.experiment.log_image(logger.run_id, image, f"{_safe_path(name)}/{step:08d}.png")


@log_histogram.register
def _(logger: TensorBoardLogger, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
    limits, weights = np.asarray(edges, dtype=float), np.asarray(counts, dtype=float)
    filled = np.flatnonzero(weights)
    if filled.size:
        # TensorBoard's two readers disagree about empty outer bins: one of them stretches their neighbours to `min`
        # and `max`. Without such bins they agree, and the others stay where they are.
        limits, weights = limits[filled[0] : filled[-1] + 2], weights[filled[0] : filled[-1] + 1]
    centers = (limits[:-1] + limits[1:]) / 2
    logger.experiment.add_histogram_raw(
        name,
        min=limits[0],
        max=limits[-1],
        num=weights.sum(),
        sum=weights @ centers,
        sum_squares=weights @ centers**2,
        bucket_limits=limits[1:].tolist(),
        bucket_counts=weights.tolist(),
        global_step=step,
    )


@log_histogram.register
def _(logger: WandbLogger, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
    histogram = import_module("wandb").Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))
    logger.log_metrics({_safe_path(name): histogram}, step)


@log_dashboard.register
def _(logger: TensorBoardLogger, layout: Mapping[str, Mapping[str, tuple[str, Sequence[str]]]]) -> None:
    logger.experiment.add_custom_scalars(layout)


def _open(logger: CSVLogger, file: str, mode: str) -> Any:
    # through `experiment`: its first use warns if it finds files in `log_dir`, which would be ours
    path = f"{logger.experiment.log_dir}/{file}"
    filesystem = get_filesystem(path)  # `log_dir` may be remote
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    return filesystem.open(path, mode)


def _safe_path(name: str) -> str:
    """``name`` as a relative path that stays inside its folder, suits every file system and is unique to the name."""
    return "/".join(map(_safe_part, name.split("/")))


def _safe_part(part: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", part)[:64].strip(".")
    return safe if safe and safe == part else f"{safe}_{crc32(part.encode(errors='replace')):08x}"
