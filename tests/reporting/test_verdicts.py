"""Verdicts in an event file: data that are read back whole, and words of older runs."""

import json
import re
from math import inf, isnan

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_collapse import CollapseGuard
from lightning_collapse.reporting import log_data, publish, report, verdict_records
from lightning_collapse.reporting.events import Run, read_runs
from lightning_collapse.reporting.verdicts import find_verdicts
from lightning_collapse.rules import Verdict
from lightning_collapse.utilities.points import Point
from tests.toys import HEALTHY, Claims, Toy, batches, fit

LAYERS = [f"block.{i}, of `many`; also: é." for i in range(300)]


class Planted(Callback):
    """All layers shrink to nothing at once."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        values = {**HEALTHY, "feature_std": 1.0 if batch_idx < 3 else 1e-4}
        points = [
            Point("collapse", layer, name, batch_idx, value, 64, 60.0)
            for layer in LAYERS
            for name, value in values.items()
        ]
        publish(trainer, pl_module, points)


def logged(logger):
    guard = CollapseGuard(action="log")
    fit(Toy(), [Claims(), guard, Planted()], batches(6), logger=logger)
    return guard.verdicts


def test_all_of_a_verdict_comes_back(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    [verdict] = logged(logger)
    logger.experiment.close()
    [run] = read_runs(tmp_path)
    [finding] = find_verdicts(run)
    assert (finding.kind, finding.layer, finding.evidence) == (verdict.kind, verdict.layer, verdict.evidence)
    assert (finding.since, finding.step, finding.until) == (3, 4, 5)
    assert finding.severity == verdict.severity
    assert finding.says == verdict.says == f"All inputs are mapped to nearly one point in `{LAYERS[0]}`."
    assert finding.also == verdict.also
    assert len(finding.also) == 299
    assert "and 291 more." in run.texts["guard/verdict"][4]
    page = report(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    page = re.sub("</?code>", "`", page)
    assert ", and 291 more.</p>" in page
    assert "<b>All inputs are mapped to nearly one point in `block.0, of `many`" in page
    assert "in `block.8, of" in page
    assert "in `block.9, of `many`; also: é.`, " not in page


def test_a_csv_logger_keeps_them_as_lines_of_json(tmp_path):
    [verdict] = logged(CSVLogger(tmp_path))
    [record] = map(json.loads, next(tmp_path.rglob("verdict_json.jsonl")).read_text().splitlines())
    assert record.pop("schema") == 1
    assert Verdict.from_dict(record) == verdict


def test_the_page_advises_what_the_verdict_did(tmp_path):
    """Which depends on the run, and is not always the rule's own."""
    logger = TensorBoardLogger(tmp_path)
    verdict = Verdict("complete_collapse", "z", 3, 4, "it is 0", 2.0, "Look at the initialization.")
    log_data(logger, "guard/verdict_json", verdict_records([verdict]), 4)
    logger.log_metrics({"guard/complete_collapse": 1.0}, 4)
    logger.experiment.close()
    page = report(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>What helps:</b> Look at the initialization.</p>" in page


def a_run(*records, words=""):
    return Run("a", texts={"guard/verdict_json": dict(enumerate(records)), "guard/verdict": {0: words}})


VERDICT = Verdict("non_finite", "z", 29, 39, "all is lost", inf, "Help.", ("in `y`",))


def test_numbers_that_json_does_not_know():
    [record] = verdict_records([VERDICT])
    json.loads(record, parse_constant=pytest.fail)
    [finding] = find_verdicts(a_run(record))
    assert finding.severity == inf
    assert finding.told == "all is lost; also in `y`"


def test_data_without_a_sentence_are_read_too():
    record = json.loads(verdict_records([VERDICT])[0])
    assert record.pop("says") == ""
    [finding] = find_verdicts(a_run(json.dumps(record)))
    assert (finding.kind, finding.says) == ("non_finite", "")


def test_what_was_written_twice_is_one_and_what_cannot_be_read_is_left_out():
    [record] = verdict_records([VERDICT])
    later = json.dumps({**json.loads(record), "schema": 2})
    odd = ["{}", "[]", "null", "no json", json.dumps({**json.loads(record), "since": None}), later, ""]
    words = "- non finite in `z` since step 29: all is lost."
    assert len(find_verdicts(a_run(record, *odd, record, words=words))) == 1


def test_several_at_one_step_are_all_read(tmp_path):
    writer = SummaryWriter(tmp_path)
    for layer in "abb":
        [record] = verdict_records([Verdict("non_finite", layer, 1, 2, "lost")])
        writer.add_text("guard/verdict_json", record, 2)
    writer.close()
    assert [finding.layer for finding in find_verdicts(*read_runs(tmp_path))] == ["a", "b"]


def test_words_of_older_runs_are_read_where_there_are_no_data():
    words = (
        "- non finite in `z` since step 29: all is lost; also in `y`, in `x`. Return with `Rollback()`, which lowers"
    )
    run = Run("a", texts={"guard/verdict": {39: f"{words} the learning rate."}})
    [finding] = find_verdicts(run)
    assert (finding.layer, finding.since, finding.step, finding.also) == ("z", 29, 39, ("in `y`", "in `x`"))
    assert finding.evidence == "all is lost"
    assert isnan(finding.severity)
