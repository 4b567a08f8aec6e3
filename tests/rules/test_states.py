"""State collapse: an explosion beyond the training length is a failure whatever the loss says, a death is not."""

import pytest

from lightning_collapse.rules import Judge
from lightning_collapse.utilities.points import Point


def judged(steps, growth=0.1, smallest=1.0, loss=None):
    """What is said of a layer whose readings are functions of the step."""
    judge = Judge(["state_collapse"])
    for step in range(steps):
        values = {"growth": growth, "smallest_rms": smallest, "rms": 2.0}
        values = {name: value(step) if callable(value) else value for name, value in values.items()}
        points = [Point("state", "rnn", name, step, value, n=8) for name, value in values.items()]
        if loss is not None:
            points.append(Point("training", "", "loss", step, loss(step)))
        judge.update(points)
    return judge


def falling(step):
    return 3 * 0.9**step


@pytest.mark.parametrize("growth", [0.0, 0.69, 1.39, -5.0])
def test_walks_sums_and_states_that_fade_are_no_explosion(growth):
    assert not judged(20, growth=growth, loss=falling).verdicts


def test_an_explosion_is_a_failure_though_the_loss_falls():
    judge = judged(12, growth=lambda step: 0.5 * step, loss=falling)
    [verdict] = judge.verdicts
    assert verdict.layer == "rnn"
    assert "+2.4 powers of ten" in verdict.evidence


def test_a_head_that_dies_is_a_notice_until_the_loss_is_harmed():
    def dies(step):
        return 1e-5 if step > 8 else 1.0

    assert not judged(20, smallest=dies, loss=falling).verdicts
    harmed = judged(20, smallest=dies, loss=lambda step: falling(step) if step < 9 else 3.0)
    assert [verdict.kind for verdict in harmed.verdicts] == ["state_collapse"]
