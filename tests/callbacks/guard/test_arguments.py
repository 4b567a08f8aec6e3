"""What a guard refuses, and the line it asks for."""

import re

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_collapse import CollapseGuard, CollapseMonitor, Monitor, PlasticityMonitor, Rollback, SwitchOn
from lightning_collapse.rules import RULES
from tests.toys import Toy, fit


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rules": ["collapse"]}, r"`rules` takes a list out of .*complete_collapse, .*got \['collapse'\]"),
        ({"rules": "complete_collapse"}, "got 'complete_collapse'"),
        ({"rules": []}, r"got \[\]"),
        ({"task": "segmentation"}, "`task` must be one of classification, .*, or None to infer it, got 'segmentation'"),
        (
            {"rules": ["regression_over_compression"], "task": "classification"},
            "is about regression, and `task` is 'classification'",
        ),
        ({"action": [Rollback(), Rollback(0.1)]}, "has 2 `Rollback`s, which would undo each other"),
        ({"action": ["stop", Rollback()]}, "both 'stop', which ends the fit, and `Rollback`"),
        ({"action": [SwitchOn("vicreg"), "stop"]}, "both 'stop', which ends the fit, and `SwitchOn`"),
        ({"action": [SwitchOn("vicreg"), SwitchOn("vicreg", 5)]}, r"several `SwitchOn\('vicreg'\)`"),
        (
            {"action": SwitchOn("vicreg"), "rules": ["plasticity_loss"]},
            "waits for complete_collapse, dimensional_collapse, and the guard judges plasticity_loss",
        ),
    ],
)
def test_what_is_refused_at_once(arguments, match):
    with pytest.raises(ValueError, match=match):
        CollapseGuard(**arguments)


def test_actions_that_get_along():
    CollapseGuard(action=["warn", "log", "checkpoint", Rollback(), SwitchOn("vicreg"), SwitchOn("koleo")])


@pytest.mark.parametrize("kind", sorted(set(RULES) - {"outcome_drop"}))  # the guard itself draws an outcome
def test_a_rule_that_nobody_feeds_says_which_line_to_add(kind):
    guard = CollapseGuard(rules=[kind])
    with pytest.raises(MisconfigurationException, match=re.escape(f"`CollapseGuard(rules=[{kind!r}])` reads")) as error:
        fit(Toy(), [guard])
    lines = re.findall(r"`(\w+)\(\)`(?= or| to its `callbacks`)", str(error.value).partition("Add ")[2])
    import lightning_collapse

    assert lines
    for line in lines:
        assert getattr(lightning_collapse, line).family == RULES[kind].family
    if kind == "attention_overload":  # the other monitor of the family does not draw it
        assert lines == ["AttentionEntropyMonitor"]


def test_every_rule_that_was_asked_for_must_be_fed():
    guard = CollapseGuard(rules=["complete_collapse", "plasticity_loss"])
    with pytest.raises(MisconfigurationException, match=r"dormant_fraction of plasticity.*Add `PlasticityMonitor\(\)`"):
        fit(Toy(), [CollapseMonitor(), guard])
    fit(Toy(), [CollapseMonitor(), PlasticityMonitor(), guard], log_every_n_steps=2)


def test_only_what_was_asked_for_is_judged():
    guard = CollapseGuard(rules=["complete_collapse"])
    trainer = fit(Toy(), [CollapseMonitor(), guard], log_every_n_steps=2)
    assert {name for name in trainer.callback_metrics if name.startswith("guard/")} == {"guard/complete_collapse"}


def test_finiteness_may_be_all_that_is_asked_for():
    fit(Toy(), [CollapseMonitor(), CollapseGuard(rules=["non_finite"])], log_every_n_steps=2)


def test_monitors_of_ones_own_are_not_advised():
    class Mine(Monitor):
        family = "plasticity"

    with pytest.raises(MisconfigurationException, match=r"Add `PlasticityMonitor\(\)` to its"):
        fit(Toy(), [CollapseGuard(rules=["plasticity_loss"])])
