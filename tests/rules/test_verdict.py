"""A verdict in words: what is wrong, since when, on which numbers, and what to do."""

from dataclasses import replace

import pytest

from lightning_collapse.rules import RULES, Judge, Rule, Verdict, register_rule
from lightning_collapse.utilities.points import Point

VERDICT = Verdict("too_low", "Encoder.0", 40, 60, "it is 0.1", advice="Raise `weight`.")


def test_words_begin_with_the_sentence_and_end_with_what_to_do():
    said = str(replace(VERDICT, says="All is low in `Encoder.0`.", also=("in `b`",)))
    assert said == (
        "All is low in `Encoder.0`. Too low since step 40, noticed at step 60: it is 0.1; also in `b`. Raise `weight`."
    )


def test_without_a_sentence_the_name_stands_for_it():
    assert str(VERDICT) == "Too low in `Encoder.0` since step 40, noticed at step 60: it is 0.1. Raise `weight`."


def test_what_was_noticed_at_once_has_one_step():
    assert " since step 60: it is" in str(replace(VERDICT, since=60))


@pytest.mark.parametrize("says", ["", "All is low in `Encoder.0`."])
def test_all_of_it_comes_back_from_a_checkpoint_also_from_one_that_knew_no_sentence(says):
    verdict = replace(VERDICT, says=says)
    assert Verdict.from_dict(verdict.as_dict()) == verdict
    older = {name: value for name, value in verdict.as_dict().items() if name != "says"}
    assert Verdict.from_dict(older) == VERDICT


@pytest.mark.parametrize(
    ("template", "said"),
    [("", ""), ("Low in `{layer}`: {}.", "Low in `a{b}`: {}."), ("Low everywhere.", "Low everywhere.")],
)
def test_the_judge_puts_the_layer_into_the_sentence_whatever_else_is_in_it(template, said):
    class TooLow(Rule):
        """Always."""

        kind, family, measures, says, patience = "too_low", "attention", ("entropy_mean",), template, 1

        def severity(self, points, baseline):
            return 2.0

        def evidence(self, points, baseline):
            return "it is low"

    register_rule(TooLow)
    try:
        [verdict] = Judge(["too_low"]).update([Point("attention", "a{b}", "entropy_mean", 3, 0.1)]).new
    finally:
        del RULES["too_low"]
    assert verdict.says == said
