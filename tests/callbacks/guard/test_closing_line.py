"""One line at the end of every watched fit: what was judged and found, and what not."""

import pytest
from lightning.pytorch import Callback

from lightning_collapse import CollapseGuard, CollapseMonitor, GradientMonitor, TokenMonitor
from lightning_collapse.reporting import publish
from lightning_collapse.rules import Task
from lightning_collapse.utilities.points import Flag, Point
from tests.toys import HEALTHY, Claims, PointKeeper, Toy, batches, fit


class Planted(Callback):
    """One point of several layers per step; layers may be sick, or not readable."""

    def __init__(self, layers, sick=(), flags=None):
        self.layers, self.sick, self.flags = layers, sick, flags or {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        points = []
        for layer in self.layers:
            values = {**HEALTHY, "feature_std": 1e-4 if layer in self.sick and batch_idx > 2 else 1.0}
            flag = self.flags.get(layer, Flag.OK)
            points += [Point("collapse", layer, name, batch_idx, v, 64, 60.0, flag) for name, v in values.items()]
        publish(trainer, pl_module, points)


def closing(caplog, callbacks, owner="CollapseGuard", n=6, **kwargs):
    caplog.set_level("INFO")
    caplog.clear()
    fit(Toy(), callbacks, batches(n), **kwargs)
    return [record.message for record in caplog.records if "point" in record.message and f"`{owner}`" in record.message]


def test_no_failure(caplog):
    [line] = closing(caplog, [Claims(), CollapseGuard(), Planted(["a", "b"])])
    assert line == "`CollapseGuard`: no failure found in 2 layers over 6 points."


def test_failures_are_counted_and_named(caplog):
    guard = CollapseGuard(action="log")
    [line] = closing(caplog, [Claims(), guard, Planted(["a", "b"], sick=["b"])])
    assert line == "`CollapseGuard`: 1 failure found in 2 layers over 6 points: complete collapse in `b` since step 3."


def test_layers_that_were_not_judged_are_named_with_the_reason(caplog):
    class Knows(CollapseGuard):
        def _infer_task(self, trainer, pl_module):
            self.task = Task(
                "regression",
                outputs=frozenset({"head"}),
                conditioning=frozenset({"time", "gate"}),
                reasons={"time": "it receives one number per sample"},
            )

    layers = ["a", "head", "time", "gate", "idle"]
    [line] = closing(caplog, [Claims(), Knows(), Planted(layers, flags={"idle": Flag.NOT_CALLED})])
    assert line == (
        "`CollapseGuard`: no failure found in 1 layer over 6 points; 4 layers not judged:"
        " `head` (the loss compares its outputs with targets), `time` (it receives one number per sample),"
        " `gate` (it holds few directions by design), `idle` (it did not run, or returned no rows)."
    )


def test_a_line_stays_short_with_many_layers(caplog):
    layers = [f"layer{i}" for i in range(300)]
    flags = dict.fromkeys(layers[1:], Flag.FEW_ROWS)
    [line] = closing(caplog, [Claims(), CollapseGuard(), Planted(layers, flags=flags)])
    assert line.endswith("`layer4` (it has too few rows), and 295 more.")
    assert len(line) < 300


def test_what_cannot_be_read_is_no_health(caplog):
    [line] = closing(caplog, [Claims(), CollapseGuard(), Planted(["a"], flags={"a": Flag.SOLVER})])
    assert "`CollapseGuard`: nothing judged: there was no point that a rule can read; 1 layer not judged: `a`" in line


def test_real_layers_are_counted(caplog):
    lines = closing(caplog, [CollapseMonitor(every_n_steps=2), CollapseGuard()])
    assert [line for line in lines if "no failure found in" in line and "over 4 points" in line]


def test_monitors_alone_say_in_one_line_that_nobody_judges(caplog):
    monitors = [CollapseMonitor(["encoder", "head"], every_n_steps=2), GradientMonitor(every_n_steps=3)]
    [line] = closing(caplog, monitors, "CollapseMonitor")
    assert line.startswith("`CollapseMonitor` (4 points of 2 layers), `GradientMonitor` (3 points")
    assert line.endswith(": nothing is judged; add `CollapseGuard()` to `callbacks` for verdicts.")


@pytest.mark.parametrize("others", [[CollapseGuard()], [PointKeeper()]])
def test_monitors_are_silent_where_someone_reads(caplog, others):
    assert not closing(caplog, [CollapseMonitor(every_n_steps=1), *others], "CollapseMonitor")


def test_a_dry_run_says_nothing(caplog):
    assert not closing(caplog, [CollapseMonitor(every_n_steps=1)], "CollapseMonitor", fast_dev_run=True)
    guard = [CollapseMonitor(every_n_steps=1), CollapseGuard()]
    assert not [line for line in closing(caplog, guard, fast_dev_run=True) if "found" in line or "judged:" in line]


@pytest.mark.filterwarnings("ignore:.*no attention")
def test_curves_that_no_rule_reads_are_no_layers_left_out(caplog):
    class Writers(Callback):
        """A layer that is drawn beside those that are judged, and one whose reading is no number."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            points = [Point("tokens", "proj", "relative_residual", batch_idx, 0.5, 64)]
            points += [Point("collapse", "odd", name, batch_idx, float("nan"), 64) for name in HEALTHY]
            points += [Point("collapse", "early", name, 0, float("nan"), 64) for name in HEALTHY if not batch_idx]
            publish(
                trainer,
                pl_module,
                [*points, *(Point("collapse", "a", k, batch_idx, v, 64) for k, v in HEALTHY.items())],
            )

    [line] = closing(caplog, [Claims(), CollapseGuard(), TokenMonitor(every_n_steps=2), Writers()])
    assert "1 layer not judged: `odd` (`" in line
    assert line.endswith("` is no number).")
