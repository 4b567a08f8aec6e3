"""The judge alone: points in, verdicts out, without a trainer."""

import io

import pytest
import torch

from lightning_collapse.rules import RULES, Detector, Judge, Judgement, Rule, Task, register_rule
from lightning_collapse.utilities.points import Point


def dormant(step, **of_layers):
    return [Point("plasticity", layer, "dormant_fraction", step, value, 64) for layer, value in of_layers.items()]


def judge_all(judge, *readings):
    return [judge.update(dormant(step, **of_layers)) for step, of_layers in enumerate(readings)]


WELL, ILL = {"a": 0.1, "b": 0.1}, {"a": 0.9, "b": 0.1}


def test_a_judgement_says_what_is_new_active_and_over():
    judge = Judge(["plasticity_loss"], calibration=2)
    found = judge_all(judge, WELL, WELL, ILL, ILL, WELL, WELL)
    [verdict] = found[3].new
    assert (verdict.layer, verdict.since, verdict.step) == ("a", 2, 3)
    assert judge.verdicts == [verdict]
    assert [judgement.counts for judgement in found] == [{"plasticity_loss": n} for n in (0, 0, 0, 1, 1, 0)]
    assert [judgement.is_active("plasticity_loss") for judgement in found] == [False] * 3 + [True] * 2 + [False]
    assert [judgement.recovered for judgement in found] == [()] * 5 + [(("plasticity_loss", "a"),)]
    assert [judgement.healthy for judgement in found] == [True, True, False, False, False, True]


def test_points_that_no_rule_reads_are_not_judged():
    assert Judge().update([Point("mine", "a", "value", 0, 1.0)]) == Judgement()
    assert Judge().update([]) == Judgement()


def test_patience_and_calibration():
    judge = Judge(["plasticity_loss"], patience=1, calibration=1)
    assert len(judge_all(judge, {"a": 0.5}, {"a": 0.74}, {"a": 0.75})[2].new) == 1
    judge = Judge(["plasticity_loss"], patience=3, calibration=5)
    assert [len(found.new) for found in judge_all(judge, *[{"a": 0.1}] * 5, *[{"a": 0.9}] * 3)] == [0] * 7 + [1]


def test_what_the_task_leads_to_is_a_notice():
    task = Task("classification", directions=1, last=frozenset({"z"}))
    judge = Judge(["dimensional_collapse"])

    def points(step, rank):
        return [Point("collapse", "z", name, step, rank, 64, 60.0) for name in RULES["dimensional_collapse"].measures]

    found = [judge.update(points(step, rank), task) for step, rank in enumerate([30.0] * 3 + [1.0] * 2)]
    assert [len(judgement.notices) for judgement in found] == [0, 0, 0, 0, 1]
    assert judge.verdicts == []
    assert found[-1].healthy
    assert found[-1].counts == {"dimensional_collapse": 0}
    assert judge.rules_for(Task("regression")) == {"dimensional_collapse": RULES["dimensional_collapse"]}
    assert "minority_collapse" not in Judge().rules_for(Task("regression"))


def test_after_a_restart_what_fails_is_new_and_the_baseline_stays():
    judge = Judge(["plasticity_loss"], calibration=2)
    judge_all(judge, WELL, WELL, ILL, ILL)
    judge.restart()
    found = judge_all(judge, ILL, ILL)
    assert [len(judgement.new) for judgement in found] == [0, 1]
    assert len(judge.verdicts) == 2
    judge.reset()
    assert judge.verdicts == []
    assert [len(judgement.new) for judgement in judge_all(judge, ILL, ILL)] == [0, 0]  # its own baseline


def test_a_restored_judge_goes_on():
    readings = [WELL, WELL, WELL, ILL, ILL, WELL, WELL, ILL, ILL]
    whole = judge_all(Judge(["plasticity_loss"]), *readings)
    for cut in range(len(readings)):
        judge = Judge(["plasticity_loss"])
        judge_all(judge, *readings[:cut])
        file = io.BytesIO()
        torch.save(judge.state_dict(), file)
        file.seek(0)
        again = Judge(["plasticity_loss"])
        again.load_state_dict(torch.load(file, weights_only=True))
        rest = [again.update(dormant(step, **readings[step])) for step in range(cut, len(readings))]
        assert rest == whole[cut:]


class Detecting(Rule):
    """Has a detector of its own."""

    kind, family, measures = "detecting", "plasticity", ("dormant_fraction",)

    def severity(self, points, baseline):
        return 0.0

    def evidence(self, points, baseline):
        return ""

    def detectors(self, layer, planned):
        return {"dormant_fraction": Detector(planned)}


class Changed(Detecting):
    """Has another one now."""

    def detectors(self, layer, planned):
        return {"another": Detector(planned)}


@pytest.mark.parametrize("now", [None, Changed])
def test_a_judge_goes_on_where_a_rule_of_then_is_gone_or_has_changed(now):
    register_rule(Detecting)
    try:
        judge = Judge(["detecting", "plasticity_loss"], calibration=2)
        judge_all(judge, WELL, WELL, ILL)
        state = judge.state_dict()
        assert state["detectors"]
        del RULES["detecting"]
        if now is not None:
            register_rule(now)
        again = Judge(["plasticity_loss"], calibration=2)
        again.load_state_dict(state)
        assert [verdict.layer for verdict in again.update(dormant(3, **ILL)).new] == ["a"]
    finally:
        RULES.pop("detecting", None)


def test_a_rule_that_raises_is_left_out_with_one_warning():
    class Broken(Rule):
        """Divides by zero in ill layers."""

        kind, family, measures = "broken", "plasticity", ("dormant_fraction",)

        def severity(self, points, baseline):
            return 1 / 0 if points["dormant_fraction"].value > 0.5 else 0.9

        def evidence(self, points, baseline):
            return ""

    register_rule(Broken)
    try:
        judge = Judge(["broken", "plasticity_loss"], calibration=2)
        judge_all(judge, WELL, WELL)
        with pytest.warns(UserWarning, match="rule `broken` failed with ZeroDivisionError") as said:
            found = judge_all(judge, ILL, ILL, WELL, WELL)
    finally:
        del RULES["broken"]
    assert len(said) == 1
    assert [judgement.judged for judgement in found] == [("plasticity_loss",)] * 4
    assert len(found[1].new) == 1
    assert found[3].healthy


@pytest.mark.parametrize(
    ("fraction", "nonfinite", "failure"),
    [(0.2, 0.0, False), (0.2, 1.0, True), (0.2, None, True), (1.0, 0.0, True), (0.0, 1.0, False)],
)
def test_rows_that_the_model_masks_are_no_failure_while_training_is_finite(fraction, nonfinite, failure):
    judge = Judge(["non_finite"])
    for step in range(2):
        points = [Point("collapse", "z", "nonfinite_fraction", step, fraction, 64)]
        if nonfinite is not None:
            points.append(Point("training", "", "nonfinite", step, nonfinite))
        judgement = judge.update(points)
    assert bool(judgement.new) == failure


def test_of_many_layers_words_name_eight_and_data_all():
    judge = Judge(["plasticity_loss"], calibration=1)
    names = [f"block.{i}" for i in range(300)]
    judge_all(judge, dict.fromkeys(names, 0.1), *[dict.fromkeys(names, 0.9)] * 2)
    [verdict] = judge.verdicts
    assert len(verdict.also) == 299
    words = str(verdict)
    assert "; also in `block.1`, in `block.2`" in words
    assert ", in `block.8`, and 291 more. Bring units back" in words
    assert "block.9`" not in words
    assert len(judge.state_dict()["verdicts"][0]["also"]) == 299


def test_severities_are_told_by_kind_and_layer():
    judge = Judge(["plasticity_loss"], calibration=2)
    found = judge_all(judge, WELL, WELL, ILL)
    assert found[0].severities == {("plasticity_loss", "a"): 0.0, ("plasticity_loss", "b"): 0.0}
    assert found[2].severities == {
        ("plasticity_loss", "a"): pytest.approx(0.8 / 0.9 / RULES["plasticity_loss"].share),
        ("plasticity_loss", "b"): 0.0,
    }
    assert Judge().update([]).severities == {}


def test_what_is_no_failure_has_no_severity():
    task = Task("classification", directions=1, last=frozenset({"z"}))
    judge = Judge(["dimensional_collapse", "neural_collapse_reached"])
    for step, rank in enumerate([30.0] * 3 + [1.0] * 2):
        names = RULES["dimensional_collapse"].measures
        points = [Point("collapse", layer, name, step, rank, 64, 60.0) for name in names for layer in ("y", "z")]
        values = {"nc1": 1e-6, "nc2_equinorm": 0.0, "nc3": 0.0, "classes": 2.0}
        points += [Point("neural_collapse", "head", name, step, value, 64) for name, value in values.items()]
        judgement = judge.update(points, task)
    assert set(judgement.severities) == {("dimensional_collapse", "y"), ("dimensional_collapse", "z")}
    assert judgement.severities["dimensional_collapse", "z"] == 0.0
    assert judgement.severities["dimensional_collapse", "y"] >= 1


def test_a_rule_reads_the_curves_of_other_families_of_the_same_layer():
    seen = []

    class Beside(Rule):
        """Reads a curve of another family, and follows it and the loss."""

        kind, family, measures = "beside", "plasticity", ("dormant_fraction",)
        optional = ("views/recall_at_1",)
        follows = ("views/recall_at_1", "dormant_fraction", "training/loss")

        def severity(self, points, baseline):
            raise AssertionError

        def evidence(self, points, baseline):
            raise AssertionError

        def weigh(self, evidence):
            seen.append(evidence)
            return 1.0

        def tell(self, evidence):
            return f"the history of {', '.join(evidence.history)}"

    register_rule(Beside)
    try:
        judge = Judge(["beside"], patience=1)
        points = dormant(0, a=0.1, b=0.2)
        points += [Point("views", "a", "recall_at_1", 0, 0.7), Point("training", "", "loss", 0, 2.0)]
        judge.update(points)
    finally:
        del RULES["beside"]
    of_a, of_b = seen
    assert {name: point.value for name, point in of_a.points.items()} == {
        "dormant_fraction": 0.1,
        "views/recall_at_1": 0.7,
        "loss": 2.0,
    }
    assert of_a.baseline == {"dormant_fraction": 0.1, "views/recall_at_1": 0.7}
    assert {name: curve.first for name, curve in of_a.history.items()} == {
        "views/recall_at_1": 0.7,
        "dormant_fraction": 0.1,
        "training/loss": 2.0,
    }
    assert set(of_b.points) == {"dormant_fraction", "loss"}
    assert set(of_b.history) == {"dormant_fraction", "training/loss"}
    assert judge.verdicts[0].evidence == "the history of views/recall_at_1, dormant_fraction, training/loss"
