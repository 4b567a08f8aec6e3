"""Points reach every logger and every reader, whatever some of them do."""

import gc

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_collapse import CollapseMonitor, WeightPenalty
from lightning_collapse.penalties import L2Init
from lightning_collapse.reporting import containments, log_dashboard, log_text, publish
from lightning_collapse.utilities.points import Point
from tests.toys import MemoryLogger, PointKeeper, Toy, fit


class Full(CSVLogger):
    """On a disk that is full until somebody cleans up."""

    full = True
    calls = 0

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        if self.full:
            raise OSError(28, "No space left on device")
        super().log_metrics(metrics, step)


class Unhashable(MemoryLogger):
    """Compares by what it holds, as a dataclass does."""

    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, Unhashable) and self.rows == other.rows


class Broken(Callback):
    """Cannot read a point."""

    calls = 0

    def on_points(self, trainer, pl_module, points):
        self.calls += 1
        raise RuntimeError("no idea")


def failures(said):
    return [str(warning.message) for warning in said if " failed with " in str(warning.message)]


def monitor():
    return CollapseMonitor(["encoder"], every_n_steps=1)


def test_a_logger_that_raises_is_dropped_with_one_warning_and_all_else_goes_on(tmp_path):
    full, whole, keeper = Full(tmp_path), MemoryLogger(), PointKeeper()
    with pytest.warns(UserWarning, match=r"`Full`: `log_metrics` failed with OSError\(28") as said:
        trainer = fit(Toy(), [monitor(), keeper], logger=[full, whole], log_every_n_steps=1)
    assert len(failures(said)) == 1
    assert full.calls == 1
    assert trainer.global_step == 6
    assert len(whole.curve("collapse/encoder/effective_rank")) == 6
    assert len(keeper.curve("collapse/encoder/effective_rank")) == 6
    assert "collapse/encoder/effective_rank" in trainer.callback_metrics


def test_a_fresh_fit_tries_again(tmp_path):
    full = Full(tmp_path)
    for _ in range(2):
        with pytest.warns(UserWarning, match="`log_metrics` failed"):
            fit(Toy(), [monitor()], logger=full, log_every_n_steps=1)
    full.full = False
    trainer = fit(Toy(), [monitor()], logger=full, log_every_n_steps=1)
    full.save()
    assert trainer.global_step == 6
    assert "effective_rank" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_a_logger_that_takes_nothing_at_all_costs_one_warning_and_not_the_run():
    class Nothing(MemoryLogger):
        def log_metrics(self, metrics, step=None):
            raise OSError("gone")

    @log_dashboard.register
    @log_text.register
    def _(logger: Nothing, *args) -> None:
        raise OSError("gone")

    with pytest.warns(UserWarning, match="failed with OSError") as said:
        trainer = fit(Toy(), [monitor()], logger=Nothing(), log_every_n_steps=10)
    assert [message.split(" ")[1] for message in failures(said)] == ["`log_metrics`"]
    assert trainer.global_step == 6


def test_what_a_logger_refuses_once_is_not_tried_again():
    class Odd(MemoryLogger):
        tried = 0

    @log_text.register
    def _(logger: Odd, name: str, text: str, step: int) -> None:
        logger.tried += 1
        raise ValueError(name)

    logger = Odd()
    with pytest.warns(UserWarning, match="`Odd`: `log_text` failed with ValueError"):
        log_text(logger, "a", "b", 0)
    log_text(logger, "a", "b", 1)
    assert logger.tried == 1


def test_a_reader_that_raises_is_left_out_with_one_warning():
    broken, keeper = Broken(), PointKeeper()
    with pytest.warns(UserWarning, match="`Broken`: `on_points` failed with RuntimeError") as said:
        fit(Toy(), [monitor(), broken, keeper])
    assert len(failures(said)) == 1
    assert broken.calls == 1
    assert len(keeper.curve("collapse/encoder/effective_rank")) == 6


def test_a_logger_need_not_be_hashable_and_is_not_kept_alive():
    gc.collect()
    before = len(containments._CONTAINMENTS)
    logger = Unhashable()
    fit(Toy(), [monitor()], logger=logger)
    assert logger.curve("collapse/encoder/effective_rank")
    del logger
    gc.collect()
    assert len(containments._CONTAINMENTS) <= before + 1


def test_an_interrupt_is_not_contained():
    class Interrupting(Callback):
        def on_points(self, trainer, pl_module, points):
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Toy(), [monitor(), Interrupting()])


def test_curves_of_terms_survive_a_logger_that_takes_no_folders():
    """No curve's name is a folder of another's."""
    keeper = PointKeeper()
    fit(Toy(), [WeightPenalty(L2Init()), monitor(), keeper], log_every_n_steps=1)
    keys = {point.key for point in keeper.points}
    assert not {key for key in keys if any(other.startswith(f"{key}/") for other in keys)}


def test_no_point_is_no_row():
    class Empty(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            publish(trainer, pl_module, [])

    assert fit(Toy(), [Empty()]).logger.rows == []
    assert Point("a", "b", "c", 0, 1.0).key == "a/b/c"
