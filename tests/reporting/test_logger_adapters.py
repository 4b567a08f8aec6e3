"""What arrives in real loggers, whatever the name and whatever the backend does."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_collapse.reporting import (
    dashboard_layout,
    log_dashboard,
    log_histogram,
    log_image,
    log_text,
)

IMAGE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
HOSTILE = [
    *("../../../up", "..", ".", "", "/etc/passwd", "a//b", "~/x", "a/../../../b", "...", ".h.", "%2e%2e/%2e%2e", "*?|"),
    *("a b/c.d", "C:\\x", "<script>alert(1)</script>", "nul\0byte", "line\nbreak", "x" * 500, "é/漢字", "\ud800"),
]


def send_all(logger, name="collapse/encoder/spectrum", step=7):
    log_text(logger, name, "**seven**", step)
    log_image(logger, name, IMAGE, step)
    log_histogram(logger, name, [0.0, 3.0, 0.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], step)
    log_dashboard(logger, dashboard_layout())


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_events(logger):
    logger.experiment.flush()
    return EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0, "histograms": 0}).Reload()


def test_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    send_all(logger)
    events = read_events(logger)
    name = "collapse/encoder/spectrum"

    [text] = events.Tensors(f"{name}/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (7, b"**seven**")
    [image] = events.Images(name)
    assert (image.step, image.width, image.height) == (7, 3, 2)
    [histogram] = events.Histograms(name)
    assert histogram.step == 7
    assert (histogram.histogram_value.min, histogram.histogram_value.max, histogram.histogram_value.num) == (1, 4, 4)
    assert histogram.histogram_value.sum == 3 * 1.5 + 3.5
    assert histogram.histogram_value.bucket == [3, 0, 1]  # without the empty ends
    assert histogram.histogram_value.bucket_limit == [2, 3, 4]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_tensorboard_takes_an_empty_histogram(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    log_histogram(logger, "empty", [0.0, 0.0], [0.0, 1.0, 2.0], 0)
    assert read_events(logger).Histograms("empty")[0].histogram_value.num == 0


def test_csv(tmp_path):
    logger = CSVLogger(tmp_path)
    send_all(logger)
    send_all(logger, step=8)
    folder = tmp_path / "lightning_logs" / "version_0"
    figures = "figures/collapse/encoder/spectrum"
    assert files_below(folder) == [
        f"{figures}/00000007.png",
        f"{figures}/00000008.png",
        "texts.md",
    ]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / figures / "00000007.png")), IMAGE)
    texts = (folder / "texts.md").read_text()
    assert texts.count("**seven**") == 2
    assert "## collapse/encoder/spectrum, step 8\n\n**seven**\n" in texts


def test_csv_scalars_are_as_without_pictures(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    send_all(logger)
    logger.log_metrics({"a": 2.0}, step=1)
    logger.save()
    metrics = tmp_path / "lightning_logs" / "version_0" / "metrics.csv"
    assert metrics.read_text().split() == ["a,step", "1.0,0", "2.0,1"]


@pytest.mark.parametrize("logger_class", [TensorBoardLogger, CSVLogger])
@pytest.mark.filterwarnings("ignore:.*`log_.*` failed with")  # protobuf takes no lone surrogate
def test_no_name_writes_outside_the_log_dir_or_raises(logger_class, tmp_path):
    inside = tmp_path / "deep" / "down" / "logs"
    logger = logger_class(inside)
    for name in HOSTILE:
        send_all(logger, name)
    assert files_below(tmp_path)
    assert all(file.startswith("deep/down/logs/lightning_logs/version_0/") for file in files_below(tmp_path))


def test_csv_keeps_one_picture_per_name(tmp_path):
    logger = CSVLogger(tmp_path)
    for name in HOSTILE:
        log_image(logger, name, IMAGE, 0)
    assert len(files_below(tmp_path)) == len(HOSTILE)
    assert all(len(part) < 100 for file in files_below(tmp_path) for part in file.split("/"))


@pytest.mark.parametrize("logger", [DummyLogger(), type("OtherLogger", (DummyLogger,), {})()])
def test_loggers_without_pictures_skip_them(logger):
    send_all(logger)


def test_another_logger_joins():
    class Mine(DummyLogger):
        seen: tuple = ()

    @log_text.register
    def _(logger: Mine, name: str, text: str, step: int) -> None:
        logger.seen = (name, text, step)

    logger = Mine()
    send_all(logger, "x")
    assert logger.seen == ("x", "**seven**", 7)
    assert log_text.__name__ == "log_text"


@pytest.mark.parametrize("logger_class", [TensorBoardLogger, CSVLogger])
def test_other_ranks_write_nothing(logger_class, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    send_all(logger_class(tmp_path))
    assert not files_below(tmp_path)


@pytest.mark.parametrize("logger_class", [TensorBoardLogger, CSVLogger, WandbLogger, MLFlowLogger])
def test_a_failing_backend_costs_one_warning_and_not_the_run(logger_class, monkeypatch):
    def fail(self):
        raise OSError("No space left on device")

    monkeypatch.setattr(logger_class, "experiment", property(fail))
    logger = logger_class.__new__(logger_class)
    with pytest.warns(UserWarning, match=rf"`{logger_class.__name__}`: `log_\w+` failed with .*") as warnings:
        send_all(logger)
    assert len(warnings) == 1
    send_all(logger)


def test_wandb_and_mlflow_are_called_by_their_own_interface(monkeypatch):
    calls = []

    def record(name):
        return staticmethod(lambda *args, **kwargs: calls.append((name, args, kwargs)))

    for method in ("log_text", "log_image", "log_metrics"):
        monkeypatch.setattr(WandbLogger, method, record(method))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=lambda np_histogram: np_histogram))
    send_all(WandbLogger.__new__(WandbLogger), "a")
    assert calls[0] == ("log_text", ("a",), {"columns": ["text"], "data": [["**seven**"]], "step": 7})
    assert calls[1] == ("log_image", ("a", [IMAGE]), {"step": 7})
    assert calls[2][0] == "log_metrics"
    assert calls[2][1][0]["a"][0].tolist() == [0, 3, 0, 1, 0]

    calls.clear()
    client = SimpleNamespace(log_text=record("log_text"), log_image=record("log_image"))
    monkeypatch.setattr(MLFlowLogger, "experiment", client)
    monkeypatch.setattr(MLFlowLogger, "run_id", "run")
    send_all(MLFlowLogger.__new__(MLFlowLogger), "a")
    assert calls == [
        ("log_text", ("run", "**seven**", "a/00000007.md"), {}),
        ("log_image", ("run", IMAGE, "a/00000007.png"), {}),
    ]
