"""Tokens that become one vector are a failure where nothing is learned, and a notice where the loss is low."""

import pytest

from lightning_collapse.rules import TRAINING, Judge, Task
from lightning_collapse.utilities.points import Point

UNKNOWN = Task()


def judged(residuals, losses, cosine=None, null=0.98, received=None, recall=None, task=UNKNOWN):
    judge = Judge(["token_collapse"])
    for step, (residual, loss) in enumerate(zip(residuals, losses, strict=True)):
        values = {"relative_residual": residual, "token_cosine": 1 - residual**2 if cosine is None else cosine}
        if received is not None:
            values["received"] = received[step]
        points = [Point("tokens", "blocks.5", name, step, v, n=32, null=null) for name, v in values.items()]
        if recall is not None:
            points.append(Point("views", "blocks.5", "recall_at_1", step, recall[step], n=32, null=1 / 32))
        judge.update([*points, Point(TRAINING, "", "loss", step, loss)], task)
    return [(v.kind, v.layer) for v in judge.verdicts], len(judge.notices)


FALLING, FLAT = [2.0 * 0.8**step for step in range(20)], [2.0, 1.99] * 10
COLLAPSE = [("token_collapse", "blocks.5")]


def test_one_vector_from_the_first_step_is_told_as_soon_as_nothing_is_learned():
    assert judged([1e-4] * 20, FLAT)[0] == COLLAPSE
    assert judged([1e-4] * 5, FLAT[:5]) == ([], 1)


def test_that_the_loss_falls_to_what_needs_no_tokens_is_no_excuse():
    losses = [1.6, 1.5, 1.42, *[1.39, 1.38] * 10]
    assert judged([1e-3] * 23, losses)[0] == COLLAPSE
    assert judged([1e-3] * 23, [loss - 1.3 for loss in losses])[0] == []


def test_a_stack_that_begins_so_and_a_classifier_that_ends_so_learn_and_are_none():
    assert judged([0.005] * 20, FALLING)[0] == []
    assert judged([0.9, 0.9, 0.9, *[0.9 * 0.7**step for step in range(17)]], FALLING) == ([], 1)


def test_takeover_by_the_mean_with_a_loss_that_returns_to_its_beginning():
    losses = [*FALLING[:12], *[2.0] * 8]
    assert judged([0.9] * 12 + [0.06] * 8, losses)[0] == COLLAPSE
    assert judged([0.9] * 12 + [0.3] * 8, losses) == ([], 0)


def test_tokens_of_one_direction_are_one_behind_a_norm_whatever_their_lengths():
    assert judged([0.6] * 20, FLAT, cosine=0.99995)[0] == COLLAPSE
    assert judged([0.6] * 20, FLAT, cosine=0.95) == ([], 0)


@pytest.mark.parametrize("null", [0.71, float("nan")])
def test_few_tokens_are_judged_by_what_few_independent_ones_read(null):
    assert judged([0.65] * 20, FLAT, cosine=0.0, null=null) == ([], 0)


def test_blocks_that_receive_one_vector_from_the_first_points_on_are_not_to_blame():
    assert judged([1e-4] * 20, FLAT, received=[0.0] * 20) == ([], 0)
    assert judged([1e-4] * 20, FLAT, received=[0.07] * 20)[0] == COLLAPSE
    assert judged([0.9] * 12 + [1e-4] * 8, FLAT, received=[0.9] * 12 + [0.0] * 8)[0] == COLLAPSE


def test_a_joint_embedding_has_eight_points_and_then_its_recall_to_show_that_it_learns():
    embeds, rising = Task("self-supervised"), [0.05 + 0.04 * step for step in range(20)]
    narrow, short = [0.4, *[0.07] * 19], [0.4, *[0.07] * 5, *[0.4] * 14]
    assert judged(short, FALLING, task=embeds) == ([], 1)  # as a text tower of CLIP on its first plateau
    assert judged(narrow, FALLING, task=embeds)[0] == COLLAPSE  # its loss falls as it collapses
    assert judged(narrow, FALLING, task=embeds, recall=rising) == ([], 1)
    assert judged(narrow, FALLING, task=embeds, recall=[0.05] * 20)[0] == COLLAPSE
