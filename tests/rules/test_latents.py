"""A latent that tells nothing is a failure, on the prior and on a point; one that begins so and takes off is none."""

import pytest

from lightning_collapse.rules import TRAINING, Judge
from lightning_collapse.utilities.points import Point
from tests.toys import HEALTHY

FALLING = [50 * 0.9**step for step in range(80)]
FRESH = [0.004, 0.002, 0.0008, 0.0003]
TOLD = [0.05, 0.02, 0.0008, 0.0003]
"""A latent that has never told anything, and one that has."""


def judged(best, kl=None, at_point=None, loss=FALLING, rules=("posterior_collapse", "point_collapse"), spread=None):
    judge = Judge(list(rules))
    for step, value in enumerate(best):
        of = {
            "largest_ceiling": value,
            "information_ceiling": 3 * value,
            "kl": kl[step] if kl else 3 * value,
            "at_point": at_point[step] if at_point else 0.0,
        }
        points = [Point("latent", "mu", name, step, number, n=128) for name, number in of.items()]
        if spread is not None:
            values = {**HEALTHY, "relative_spread": spread[step], "feature_std": spread[step]}
            points += [Point("collapse", "mu", name, step, number, 128, 30.0) for name, number in values.items()]
        judge.update([*points, Point(TRAINING, "", "loss", step, loss[step])])
    return [verdict.kind for verdict in judge.verdicts], [notice.kind for notice in judge.notices]


def test_a_latent_on_its_prior_is_told_though_the_loss_falls():
    assert judged([*TOLD, *[1e-4] * 20]) == (["posterior_collapse"], [])
    assert judged([*TOLD, *[1e-4] * 3]) == ([], [])


def test_a_latent_that_has_never_told_anything_has_a_while():
    assert judged([*FRESH, *[1e-4] * 36]) == ([], [])
    assert judged([*FRESH, *[1e-4] * 70]) == (["posterior_collapse"], [])
    assert judged([*FRESH, *[1e-4] * 36, *[0.3] * 20]) == ([], [])


def test_a_slow_fall_is_told_once_no_unit_is_active():
    assert judged([0.02 * 0.92**step for step in range(30)])[0] == ["posterior_collapse"]
    assert judged([0.06 * 0.92**step for step in range(24)]) == ([], [])


def test_a_divergence_that_something_holds_up_is_no_information():
    assert judged([*TOLD, *[1e-4] * 20], kl=[4.0] * 24)[0] == ["posterior_collapse"]


@pytest.mark.parametrize(
    "best",
    [
        [*FRESH, *[0.0003 * 1.4**step for step in range(20)]],  # takes off late
        [1.5, 2.0, *[2.5 * 0.8**step for step in range(16)], *[0.07] * 6],  # shrinks as the prior is told, and stays
        [0.004] * 24,  # a trunk of two units that has not begun
        [1.2] * 24,
    ],
)
def test_latents_that_take_off_shrink_or_wait_are_none(best):
    assert judged(best) == ([], [])


def test_a_point_is_told_and_the_prior_is_not_where_the_divergence_is_large():
    collapse = {"kl": [40.0] * 24, "at_point": [1.0] * 24}
    assert judged([1e-5] * 24, **collapse)[0] == ["point_collapse"]
    assert judged([*TOLD, *[1e-5] * 20], kl=[40.0] * 24, at_point=[0.8] * 24)[0] == ["posterior_collapse"]


def test_a_latent_of_small_scale_is_a_notice_until_the_loss_is_harmed():
    small = {"kl": [40.0] * 24, "at_point": [1.0] * 24}
    assert judged([2.0] * 24, **small) == ([], ["point_collapse"])
    assert judged([2.0] * 24, **small, loss=[*FALLING[:12], *[45.0] * 12])[0] == ["point_collapse"]


def test_complete_collapse_of_that_layer_is_not_said_beside_it():
    rules = ("posterior_collapse", "point_collapse", "complete_collapse")
    spread = [1.0] * 6 + [1e-4] * 18
    sick = [*TOLD, *[1e-5] * 20]
    assert judged([2.0] * 24, rules=rules, spread=spread)[0] == ["complete_collapse"]
    late = [1.0] * 12 + [1e-4] * 12
    assert judged(sick, rules=rules, spread=late)[0] == ["posterior_collapse"]
