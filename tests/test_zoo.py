"""The zoo: twins differ in one setting, runs can be repeated, and the score counts what was seen."""

import inspect
import math
import pickle
from dataclasses import replace
from functools import cache

import pytest
import torch

from examples.zoo import SPECIMENS
from examples.zoo.__main__ import main
from examples.zoo.opponents import OPPONENTS, excess, out_of_patience, six_sigma
from examples.zoo.score import Run, normalized_std, replay, run
from examples.zoo.specimen import KINDS, Specimen
from examples.zoo.table import cases_of, failure, report, share
from lightning_collapse.rules import RULES, Judge
from tests.toys import PointKeeper

BY_NAME = {specimen.name: specimen for specimen in SPECIMENS}
FAILURES = [specimen for specimen in SPECIMENS if specimen.kind is not None]
CHEAP = ("invariance alone",)
SHORT = 60
"""Steps in which the failure shows."""
pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, on short runs


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def a_run(name, sick, seed=0, verdicts=(), outcome=0.9, loss=1.0, steps=100):
    """One whose held-out score goes from 0.5 to ``outcome`` in the middle of the run."""
    curve = tuple((step, 0.5 if step < 50 else outcome) for step in range(10, steps + 1, 10))
    return Run(
        name, seed, sick, steps, tuple(verdicts), (), (loss,) * steps, (1.0,) * steps, ((5, 1.0),), curve, outcome
    )


def test_there_are_eight_kinds_of_failure_and_eight_runs_that_only_look_like_one():
    assert len(BY_NAME) == len(SPECIMENS)
    assert len({specimen.kind for specimen in FAILURES}) >= 8
    failures = {kind for kind, rule in RULES.items() if not rule.informative}
    assert failures - {"outcome_drop", "skipped_steps"} <= KINDS
    assert len(SPECIMENS) - len(FAILURES) >= 7


def test_processes_can_be_handed_every_specimen():
    assert [pickle.loads(pickle.dumps(specimen)).name for specimen in SPECIMENS] == [one.name for one in SPECIMENS]


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


@cache
def ill(name):
    """A run that fails, of seed 0."""
    return run(BY_NAME[name], 0, True)


def shorter(specimen):
    """The same run, as far as ``SHORT`` steps."""
    return replace(specimen, make=lambda seed, **setting: replace(specimen.make(seed, **setting), steps=SHORT))


@pytest.mark.parametrize("name", CHEAP)
def test_same_seed_gives_the_same_verdicts_and_the_twin_none(name):
    specimen = BY_NAME[name]
    first, again = ill(name), run(shorter(specimen), 0, True)
    assert again.verdicts == tuple(verdict for verdict in first.verdicts if verdict[2] <= SHORT) != ()
    assert (again.loss, again.gradient) == (first.loss[:SHORT], first.gradient[:SHORT])
    for curve, whole in ((again.std, first.std), (again.outcome, first.outcome)):
        assert curve == tuple(point for point in whole if point[0] <= SHORT) != ()
    assert specimen.kind in {kind for kind, _, _ in first.verdicts}
    assert specimen.kind not in {kind for kind, _, _ in run(specimen, 0, False).verdicts}


def test_the_score_is_no_training_data():
    specimen = shorter(BY_NAME[CHEAP[0]])

    def points(scored):
        keeper = PointKeeper()

        def make(seed):
            habitat = specimen.build(seed, False)
            held_out = habitat.held_out if scored else lambda: 1.0
            return replace(habitat, monitors=[*habitat.monitors, keeper], held_out=held_out)

        run(Specimen(specimen.name, make, "like its healthy twin"), 0, False)
        return [(point.key, point.step, point.n, str(point.value)) for point in keeper.points]

    assert points(True) == points(False) != []


def test_another_judge_says_the_same_of_what_was_recorded():
    recorded = ill(CHEAP[0])
    again = [(v.kind, v.layer, step) for step, of in replay(recorded, Judge()) if of is not None for v in of.new]
    assert tuple(again) == recorded.verdicts != ()


def test_opponents_score_what_they_read():
    assert excess([1.0] * 30 + [2.5])[-1] == (31, pytest.approx(1.5))
    assert excess([1.0] * 5 + [9.0] + [1.0] * 30)[0] == (21, pytest.approx(0.0))  # too early to say
    assert excess([1.0] * 25 + [math.nan, 1.0])[-1] == (26, math.inf)
    noise = [1.0, -1.0] * 64
    assert six_sigma([*noise, 7.0]) == [(129, pytest.approx(7.0))]
    assert out_of_patience(a_run("x", True, outcome=0.1))[-1] == (100, 9.0)
    assert all(
        math.isfinite(score) for scores in OPPONENTS.values() for _, score in scores(a_run("x", True, steps=300))
    )


def test_a_run_fails_by_its_outcome_or_its_loss_and_else_it_has_not_failed():
    twins = [a_run("x", False, outcome=outcome) for outcome in (0.8, 0.9)]
    assert failure(a_run("x", True, outcome=0.7), twins) == 50
    assert failure(a_run("x", True, outcome=0.8), twins) is None
    exploded = replace(a_run("x", True, outcome=0.8), loss=(1.0,) * 60 + (5.0,) * 40)
    assert failure(exploded, twins) == pytest.approx(60 - 15, abs=1)
    assert failure(exploded, [*twins, exploded]) is None  # healthy ones do that too
    assert failure(replace(exploded, loss=(1.0, math.nan)), twins) == 2


def test_normalized_std_is_one_on_the_sphere_and_zero_on_a_point():
    rows = torch.randn(5000, 32)
    assert normalized_std(rows) == pytest.approx(1.0, abs=0.02)
    assert normalized_std(rows + 1e4) == pytest.approx(0.0, abs=1e-3)
    assert normalized_std(rows[:, :, None, None].expand(-1, -1, 2, 3)) == pytest.approx(normalized_std(rows))


def test_report_says_what_is_met_and_what_is_not():
    seen = a_run("invariance alone", True, 0, [("complete_collapse", "encoder.0", 30)], outcome=0.1)
    missed, twin = a_run("invariance alone", True, 1, outcome=0.1), a_run("invariance alone", False)
    wrong = a_run("bfloat16", False, 0, [("loss_explosion", "body", 50)])
    printed = report(SPECIMENS, [seen, missed, twin, wrong])
    assert (
        "| joint embedding | invariance alone | complete collapse | 2 of 2 | 1 | 1 | 1 | 50 | 30 | 0 of 1 |" in printed
    )
    assert "1 of 1 (loss explosion)" in printed
    assert "| recall | at least 90% | 1 of 2 (50 %, 1 to 99) | not met |" in printed
    assert "| guard | 1 of 2 (50 %, 1 to 99) | 1 of 2 (50 %, 1 to 99) |" in printed


def test_an_alarm_before_the_fault_is_false_and_what_is_missed_has_no_lead():
    early = a_run("learning rate that grows", True, 0, [("loss_explosion", "x", 200)], outcome=0.1, steps=600)
    [case] = cases_of(SPECIMENS, [early])
    assert case.specimen.onset > 200
    assert "0 of 1" in report(SPECIMENS, [early, a_run("learning rate that grows", False, steps=600)])


def test_intervals_are_exact():
    assert share(0, 10) == "0 of 10 (0 %, 0 to 31)"
    assert share(19, 20) == "19 of 20 (95 %, 75 to 100)"
    assert share(0, 0) == "0 of 0"


def test_command_prints_the_tables(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zoo", "--quick", "--only", "no rehearsal", "--workers", "1"])
    main()
    printed = capsys.readouterr().out
    assert "| no rehearsal | catastrophic forgetting |" in printed
    assert "guard, lines chosen on the other families" in printed
