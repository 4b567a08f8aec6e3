"""Closed forms of CW-RGP and Shuffled-DBN, and what they must bear."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.losses import CWRGP, TooFewRowsError, cw_rgp_loss
from lightning_collapse.losses import cw_rgp as module
from lightning_collapse.losses.support.shuffle import permutation
from tests.losses.cases.base import correlated
from tests.losses.cases.cw_rgp import naive_channel_whitening, naive_group_zca
from tests.losses.cases.whitening import naive_distance, well_conditioned

CPU = torch.device("cpu")
SETTINGS = {"samples": {"sub_batch": 5, "groups": 2}, "features": {"sub_batch": 8, "groups": 3, "axis": "features"}}
each_axis = pytest.mark.parametrize("axis", SETTINGS)


def groups_of(dim: int, groups: int, step: int, stream: int) -> list[np.ndarray]:
    return np.split(permutation(dim, torch.tensor(step), stream, CPU).numpy(), groups)


@each_axis
def test_each_group_is_white(axis: str) -> None:
    views = torch.stack(well_conditioned((6, 24) if axis == "samples" else (40, 12), 2))
    orders = [permutation(views.shape[2], torch.tensor(0), stream, CPU) for stream in range(2)]
    white = module._whitened(views, 3, 0.0, axis, orders)
    for view, order in zip(white, orders, strict=True):
        for group in order.tensor_split(3):
            rows = view[:, group] if axis == "samples" else view[:, group].mT
            eye = torch.eye(len(rows), dtype=torch.float64)
            torch.testing.assert_close(rows @ rows.mT / (rows.shape[1] - 1), eye)
    if axis == "samples":  # of equal length already
        torch.testing.assert_close(white.norm(dim=2), torch.full((2, 6), 21**0.5, dtype=torch.float64))


def test_samples_are_divided_and_grouped_by_the_step() -> None:
    first, second = correlated((23, 16), 2)
    expected, streams = 0.0, iter(range(3, 100))
    for division in range(3):
        order = permutation(23, torch.tensor(7), division, CPU).numpy()
        for part in (order[:5], order[5:10], order[10:15], order[15:19], order[19:]):  # no sub-batch above five
            white = [
                naive_group_zca(z.numpy()[part], groups_of(16, 2, 7, next(streams)), "samples", eps=0.1)
                for z in (first, second)
            ]
            expected += len(part) * naive_distance(*white) / 23 / 3
    found = cw_rgp_loss(first, second, sub_batch=5, groups=2, iterations=3, eps=0.1, step=7)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_shuffled_dbn() -> None:
    first, second = well_conditioned((30, 12), 2)
    expected = 0.0
    for division in range(2):
        white = [
            naive_group_zca(z.numpy(), groups_of(12, 3, 4, 2 + 2 * division + view), "features")
            for view, z in enumerate((first, second))
        ]
        expected += naive_distance(*white) / 2
    found = cw_rgp_loss(first, second, sub_batch=30, groups=3, iterations=2, axis="features", step=4)
    assert found.item() == pytest.approx(expected, rel=1e-10)
    # ten rows too many for a third sub-batch enlarge the others
    order = permutation(30, torch.tensor(4), 0, CPU).numpy()
    expected = 0.0
    for part, streams in ((order[:15], (1, 2)), (order[15:], (3, 4))):
        grouped = [groups_of(12, 3, 4, stream) for stream in streams]
        white = [naive_group_zca(z.numpy()[part], g, "features") for z, g in zip((first, second), grouped, strict=True)]
        expected += naive_distance(*white) / 2
    found = cw_rgp_loss(first, second, sub_batch=11, groups=3, axis="features", step=4)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_every_view_and_sub_batch_has_groups_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, ...]] = []

    def spy(length: int, *arguments: object) -> Tensor:
        order = permutation(length, *arguments)
        if length == 16:
            drawn.append(tuple(order.tolist()))
        return order

    monkeypatch.setattr(module, "permutation", spy)
    loss = CWRGP(5, 2, 2)
    for _ in range(2):
        loss(*torch.randn(2, 10, 16))
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 2 * 2


def test_published_defaults() -> None:
    first, second = torch.randn(2, 128, 512, dtype=torch.float64)
    assert CWRGP()(first, second).item() == pytest.approx(2, abs=0.05)  # nothing in common
    assert CWRGP()(first, -first).item() > 3
    same = [CWRGP()(rows, rows).item() for rows in (first, torch.randn(128, 4096, dtype=torch.float64))]
    assert 0 < same[1] < same[0] / 4 < 0.1  # the groups of both views differ; the wider, the whiter in themselves


def test_rotations_of_features_and_maps_of_samples_are_undone() -> None:
    first, second = correlated((6, 24), 2)
    expected = naive_channel_whitening(first.numpy(), second.numpy())
    # rotations that keep the mean over features, the same for both views
    basis = torch.linalg.qr(torch.cat([torch.ones(24, 1), torch.randn(24, 23)], dim=1).double()).Q
    turn, _ = torch.linalg.qr(torch.randn(23, 23, dtype=torch.float64))
    turn = basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), turn) @ basis.mT
    for a, b in ((first, second), (first @ turn, second @ turn), (7 * first + 3, 0.1 * second - 2)):
        assert CWRGP(6, 1)(a, b).item() == pytest.approx(expected, rel=1e-10)


def test_ends() -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    for groups in (1, 2, 4):
        loss = CWRGP(3, groups)
        for row in (signs, 5 * signs + 100, -0.01 * signs):
            assert loss(*[row.expand(8, 16)] * 2).item() == pytest.approx(loss.value_at_collapse, abs=1e-4)
        assert loss(*[torch.ones(8, 16)] * 2).item() == pytest.approx(2)
        assert loss(*[torch.full((8, 16), 0.1)] * 2).item() == pytest.approx(2)
    loss = CWRGP(8, 4, axis="features")
    assert loss(*[torch.randn(16).expand(9, 16)] * 2).item() == pytest.approx(loss.value_at_collapse) == 2
    (rows,) = well_conditioned((40, 6), 1)
    white = torch.linalg.qr(rows - rows.mean(dim=0)).Q  # in every group
    assert CWRGP(40, 3, 4, axis="features")(white, 3 * white).item() == pytest.approx(0, abs=1e-12)


def test_small_noise_on_equal_samples_is_no_agreement() -> None:
    """Of 16 white directions, one is what they have in common."""
    row = torch.randn(512, dtype=torch.float64)
    views = [row + 1e-3 * torch.randn(16, 512, dtype=torch.float64) for _ in range(2)]
    assert CWRGP(16, 1)(*views).item() == pytest.approx(2 - 2 / 16, abs=0.1)


@each_axis
def test_gradient_with_groups(axis: str) -> None:
    shape = (7, 12) if axis == "samples" else (18, 6)
    views = [z.requires_grad_() for z in well_conditioned(shape, 2)]
    assert torch.autograd.gradcheck(CWRGP(**SETTINGS[axis]).eval(), views)


@each_axis
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_covariances_stay_finite(axis: str, dtype: torch.dtype, rank: int) -> None:
    if (axis, dtype, rank) == ("features", torch.float16, 0):
        pytest.skip("1e8 is the slope of a whitened row that is zero beside one that is not")
    rows = torch.randn(16, rank, dtype=dtype) @ torch.randn(rank, 12, dtype=dtype)
    for scale in (1e-3, 1.0, 16.0):
        views = [(scale * rows).requires_grad_(), (scale * torch.randn(16, 12, dtype=dtype)).requires_grad_()]
        loss = CWRGP(**SETTINGS[axis])(*views)
        loss.backward()
        assert 0 <= loss.item() <= 4
        assert all(view.grad.isfinite().all() for view in views)


@each_axis
def test_duplicated_rows(axis: str) -> None:
    rows = torch.randn(3, 12).repeat(6, 1).requires_grad_()
    loss = CWRGP(**SETTINGS[axis])(rows, torch.randn(18, 12))
    loss.backward()
    assert loss.isfinite()
    assert rows.grad.isfinite().all()


@each_axis
def test_features_that_are_not_finite_raise_nothing(axis: str) -> None:
    rows = torch.randn(16, 12)
    rows[3, 2] = torch.nan
    assert CWRGP(**SETTINGS[axis])(rows, rows).isnan()


@each_axis
def test_compiles_with_groups_and_sub_batches(axis: str) -> None:
    plain, compiled = (CWRGP(**SETTINGS[axis], iterations=2) for _ in range(2))
    rows = {"samples": 9, "features": 18}[axis]  # two sub-batches
    views = torch.randn(2, rows, 12, dtype=torch.float64)
    compiled = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(*views), plain(*views))


def test_one_process_has_one_scope() -> None:
    views = correlated((23, 16), 2)
    for setting in SETTINGS.values():
        setting = {**setting, "groups": 4, "sub_batch": 3 if len(setting) == 2 else 7}
        rank, everything = (CWRGP(**setting, scope=scope)(*views) for scope in ("rank", "global"))
        assert torch.equal(rank, everything)


def test_one_sample_is_enough() -> None:
    first, second = torch.randn(2, 1, 12)
    expected = naive_distance((first - first.mean()).numpy(), (second - second.mean()).numpy())
    assert CWRGP(3, 1)(first, second).item() == pytest.approx(expected, rel=1e-5)


def test_shapes_it_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"below the number of features in a group, got 64 for 64 \(256 features in 4"):
        CWRGP()(*torch.randn(2, 8, 256))
    with pytest.raises(ValueError, match="or project to at least 260 features"):
        CWRGP()(*torch.randn(2, 8, 256))
    with pytest.raises(ValueError, match=r"above the number of features in a group, got 8 for 8 \(16 features in"):
        CWRGP(8, 2, axis="features")(*torch.randn(2, 20, 16))
    with pytest.raises(ValueError, match="`groups` must divide the number of features, got 4 groups for 270 features"):
        CWRGP()(*torch.randn(2, 8, 270))
    for scope in ("rank", "global"):
        with pytest.raises(TooFewRowsError, match=r"at least 5 rows over all processes, got 4 \(4 here\)"):
            CWRGP(8, 3, axis="features", scope=scope)(*torch.randn(2, 4, 12))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`scope` must be one of \('rank', 'global'\), got 'node'"):
        CWRGP(scope="node")
    with pytest.raises(ValueError, match=r"`axis` must be one of \('features', 'samples'\), got 'channels'"):
        CWRGP(axis="channels")
    with pytest.raises(ValueError, match="`eps` must be at least 0 and below 1, got 1"):
        CWRGP(eps=1)
    for argument in ("sub_batch", "groups", "iterations"):
        with pytest.raises(ValueError, match=f"`{argument}` must be an integer of at least 1, got 0"):
            CWRGP(**{argument: 0})
    assert repr(CWRGP()) == "CWRGP(sub_batch=64, groups=4, iterations=1, eps=0.0, axis='samples', scope='rank')"


def test_views_disagree_less_where_they_are_compared_in_place() -> None:
    """Whitened features go back to where they were: without, views of different order would have nothing in common."""
    first = torch.randn(32, 512)
    pairs = [CWRGP(32, 4)(first, second).item() for second in (first, first.roll(1, 1))]
    assert pairs[0] < 0.2 < 1.8 < pairs[1]
