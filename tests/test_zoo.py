"""The zoo: twins differ in one setting, runs can be repeated, and the score counts what was seen."""

import inspect
import math
from dataclasses import replace

import pytest
import torch

from examples.zoo import SPECIMENS
from examples.zoo.__main__ import main
from examples.zoo.score import Run, dropped, exceeds, normalized_std, run
from examples.zoo.specimen import KINDS, Specimen
from examples.zoo.table import best_std, report
from lightning_collapse.rules import RULES
from tests.toys import PointKeeper

BY_NAME = {specimen.name: specimen for specimen in SPECIMENS}
FAILURES = [specimen for specimen in SPECIMENS if specimen.kind is not None]
CHEAP = ("invariance alone", "no rehearsal")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, on short runs


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def a_run(name, sick, seed=0, verdicts=(), shown=None, std=1.0):
    return Run(name, seed, sick, 100, tuple(verdicts), shown, None, None, ((5, std),))


def test_there_are_eight_kinds_of_failure_and_eight_runs_that_only_look_like_one():
    assert len(BY_NAME) == len(SPECIMENS)
    assert len({specimen.kind for specimen in FAILURES}) >= 8
    assert set(RULES) - {"neural_collapse_reached"} <= KINDS
    assert len(SPECIMENS) - len(FAILURES) >= 7


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_twins_differ_in_one_setting_only(specimen):
    if specimen.kind is None:
        assert specimen.setting is None
        return
    assert specimen.setting in inspect.signature(specimen.make).parameters
    assert specimen.healthy != specimen.sick
    torch.manual_seed(0)
    sick, healthy = specimen.build(0, True), specimen.build(0, False)
    assert [type(monitor) for monitor in sick.monitors] == [type(monitor) for monitor in healthy.monitors]
    assert (sick.steps, sick.every, sick.trainer) == (healthy.steps, healthy.every, healthy.trainer)
    assert len(sick.tasks) == len(healthy.tasks)
    assert type(sick.model) is type(healthy.model)


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_claims_are_known_kinds_and_healthy_runs_have_none(specimen):
    assert set(specimen.claims) <= KINDS
    assert (specimen.kind in specimen.claims) == (specimen.kind is not None)
    assert specimen.kind is not None or not specimen.claims
    assert specimen.family
    assert specimen.onset >= 0


def test_the_outcome_is_read_in_evaluation_mode_and_is_the_held_out_score_by_default():
    habitat = BY_NAME[CHEAP[0]].build(0, False)
    assert habitat.result() == habitat.held_out()
    assert habitat.model.training
    own = replace(habitat, outcome=lambda model: float(model.training or torch.is_grad_enabled()))
    assert own.result() == 0.0


@pytest.mark.parametrize("name", CHEAP)
def test_same_seed_gives_the_same_verdicts_and_the_twin_none(name):
    specimen = BY_NAME[name]
    first = run(specimen, 0, True)
    assert run(specimen, 0, True) == first
    assert specimen.kind in {kind for kind, _, _ in first.verdicts}
    assert specimen.kind not in {kind for kind, _, _ in run(specimen, 0, False).verdicts}


def test_the_score_is_no_training_data():
    name = CHEAP[0]

    def points(scored):
        keeper = PointKeeper()

        def make(seed):
            habitat = BY_NAME[name].build(seed, False)
            held_out = habitat.held_out if scored else lambda: 1.0
            return replace(habitat, monitors=[*habitat.monitors, keeper], held_out=held_out)

        run(Specimen(name, make, "like its healthy twin"), 0, False)
        return [(point.key, point.step, point.n, str(point.value)) for point in keeper.points]

    assert points(True) == points(False) != []


def test_curves_that_rise_and_scores_that_drop():
    assert exceeds([1.0] * 30 + [2.5], 2.0) == 31
    assert exceeds([1.0] * 30 + [1.5], 2.0) is None
    assert exceeds([1.0, math.nan], 2.0) == 2
    assert exceeds([1.0] * 5 + [9.0] + [1.0] * 30, 2.0) is None  # too early to say
    assert dropped({5: 0.5, 10: 0.9, 15: 0.85, 20: 0.79}) == 20
    assert dropped({5: 0.5, 10: 0.45}) is None


def test_normalized_std_is_one_on_the_sphere_and_zero_on_a_point():
    rows = torch.randn(5000, 32)
    assert normalized_std(rows) == pytest.approx(1.0, abs=0.02)
    assert normalized_std(rows + 1e4) == pytest.approx(0.0, abs=1e-3)
    assert normalized_std(rows[:, :, None, None].expand(-1, -1, 2, 3)) == pytest.approx(normalized_std(rows))


def test_threshold_of_the_baseline_is_the_one_that_separates():
    runs = [a_run("invariance alone", True, std=0.05), a_run("invariance alone", False, std=0.3)]
    assert 0.05 < best_std(runs) <= 0.3


def test_report_says_what_is_met_and_what_is_not():
    seen = a_run("invariance alone", True, 5, [("complete_collapse", "encoder.0", 30)], shown=80)
    missed = a_run("invariance alone", True, 6)
    wrong = a_run("bfloat16", False, 5, [("loss_explosion", "body", 50)])
    printed = report(SPECIMENS, [seen, missed, wrong])
    assert "| invariance alone | complete collapse | 1 of 2 | 1 of 2 | 1 of 2 | 1 of 2 | 30 of 100 | +50% |" in printed
    assert "1 of 1 (loss explosion)" in printed
    assert "| recall | at least 100% | 50% | not met |" in printed
    assert "| median lead | at least 20% | 50% | met |" in printed
    assert "chosen on" not in printed


def test_command_prints_both_groups_of_seeds(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zoo", "--quick", "--only", "no rehearsal", "--workers", "1"])
    main()
    printed = capsys.readouterr().out
    assert "Thresholds chosen on seeds 0:" in printed
    assert "Thresholds reported on seeds 5:" in printed
    assert "| no rehearsal | catastrophic forgetting |" in printed
