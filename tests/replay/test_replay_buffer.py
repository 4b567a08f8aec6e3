"""A bounded memory holds the sample of the stream that its policy promises."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_collapse.replay import ReplayBuffer, beyond_quota, herding_order, replay_buffer
from lightning_collapse.replay.batch_rows import concatenate

POLICIES = ("reservoir", "class_balanced", "ring", "class_ring", "herding")


def stream(n: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numbered rows and labels."""
    return torch.arange(n), torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def filled(buffer: ReplayBuffer, n: int = 40, size: int = 7, **kwargs: Any) -> ReplayBuffer:
    x, y = stream(n, **kwargs)
    for first in range(0, n, size):
        part = slice(first, first + size)
        features = torch.stack([x[part].double().cos(), x[part].double().sin()], dim=1)
        buffer.add({"x": x[part], "y": y[part]}, features=features)
    return buffer


def held(buffer: ReplayBuffer) -> list[int]:
    """Numbers of the rows, sorted."""
    return sorted(row for batch in buffer.loader(100) for row in batch["x"].tolist())


def inclusion(runs: int, hold: Any, n: int) -> Tensor:
    counts = torch.zeros(n)
    for seed in range(runs):
        counts[hold(seed)] += 1
    return counts / runs


def test_a_reservoir_keeps_every_row_with_probability_m_over_n() -> None:
    """First, middle and last rows alike, by 3 standard errors of each tenth of the stream."""
    found = inclusion(300, lambda seed: held(filled(ReplayBuffer(5, seed=seed))), 40)
    error = (0.125 * 0.875 / (300 * 4)) ** 0.5
    assert (found.reshape(10, 4).mean(dim=1) - 0.125).abs().max() < 3 * error
    assert found.sum() == pytest.approx(5)


def test_buffers_of_uneven_parts_merge_into_the_sample_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two synchronizations, by which each process keeps its own rows of the largest keys of both."""

    def merged(seed: int) -> list[int]:
        parts = ReplayBuffer(5, seed=2 * seed), ReplayBuffer(5, seed=2 * seed + 1)
        x, y = stream(40)
        for first in (0, 20):
            for part, (a, b) in zip(parts, ((0, 16), (16, 20)), strict=True):
                part.add({"x": x[first + a : first + b], "y": y[first + a : first + b]})
            every = [(part._keys[: part._used], part._labels[: part._used], part.seen) for part in parts]
            monkeypatch.setattr(replay_buffer, "world_size", lambda: 2)
            monkeypatch.setattr(replay_buffer, "from_all_processes", lambda _: every)  # noqa: B023
            for rank, part in enumerate(parts):
                monkeypatch.setattr(replay_buffer, "process_rank", lambda: rank)  # noqa: B023
                assert len(part.synchronize()) == 5
        return [row for part in parts for row in held(part)]

    found = inclusion(400, merged, 40)
    error = (0.125 * 0.875 / (400 * 4)) ** 0.5
    assert (found.reshape(10, 4).mean(dim=1) - 0.125).abs().max() < 3 * error
    assert found.sum() == pytest.approx(5)


@pytest.mark.parametrize(("size", "shares"), [(8, [3, 3, 2]), (2, [1, 1, 0]), (100, [20, 18, 12])])
def test_classes_share_the_memory(size: int, shares: list[int]) -> None:
    """Places of the first labels are one more where they do not come out even; what one class leaves stays empty."""
    y = torch.tensor([4] * 20 + [7] * 18 + [9] * 12)
    for policy in ("class_balanced", "class_ring"):
        buffer = ReplayBuffer(size, policy=policy)
        for part in torch.arange(50).split(6):
            buffer.add((part, y[part]))
        _, counts = buffer.labels.unique(return_counts=True)
        assert counts.tolist() == [share for share in shares if share]
        if policy == "class_ring" and size == 8:
            assert sorted(next(iter(buffer.loader(9)))[0].tolist()) == [17, 18, 19, 35, 36, 37, 48, 49]


def test_within_a_class_every_row_is_kept_alike() -> None:
    def hold(seed: int) -> list[int]:
        return held(filled(ReplayBuffer(9, policy="class_balanced", seed=seed)))

    counts = stream(40)[1].bincount()
    found = inclusion(250, hold, 40)
    for label, count in enumerate(counts):
        of_class = found[stream(40)[1] == label]
        error = (3 / count * (1 - 3 / count) / 250) ** 0.5
        assert (of_class - 3 / count).abs().max() < 4 * error  # the largest of 40
        assert of_class.sum() == pytest.approx(3)


def rows_of(buffer: ReplayBuffer) -> list[int]:
    return sorted(row for batch in buffer.loader(100) for row in batch[0].tolist())


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced", "ring", "class_ring"])
def test_a_batch_at_a_time_those_stay_whose_keys_are_the_largest_of_all(policy: Any) -> None:
    """Whatever comes: no row, classes beyond the places, classes that come back; and what a loaded one goes on with."""
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        size = int(torch.randint(1, 12, (), generator=draw))
        buffers = [ReplayBuffer(size, policy=policy, storage=storage, seed=seed) for storage in ("host", "device")]
        keys, labels = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
        random = torch.Generator().manual_seed(seed)
        for step in range(9):
            n, classes = (int(torch.randint(high, (), generator=draw)) for high in (9, 20))
            y = 3 * torch.randint(classes + 1, (n,), generator=draw) - 20
            first = len(keys)
            new = torch.arange(first, first + n, dtype=torch.float64)
            if policy in ("reservoir", "class_balanced"):
                new = torch.rand(n, generator=random, dtype=torch.float64)
            keys, labels = torch.cat([keys, new]), torch.cat([labels, y])
            if policy in ("class_balanced", "class_ring"):
                keys = keys.masked_fill(beyond_quota(keys, labels, size), -torch.inf)
            best = keys.argsort(descending=True)[:size]
            wanted = sorted(best[keys[best] > -torch.inf].tolist())
            for buffer in buffers:
                buffer.add((torch.arange(first, first + n), y))
                assert rows_of(buffer) == wanted
            if step == 4:
                loaded = ReplayBuffer(size, policy=policy, seed=7)
                loaded.load_state_dict(buffers[0].state_dict())
                buffers.append(loaded)


def test_quotas_by_counting() -> None:
    keys = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys[::7] = -torch.inf
    labels = stream(30, classes=4)[1] * 5 - 2
    for size in (1, 3, 10, 100):
        kept = set()
        classes = sorted(set(labels[keys > -torch.inf].tolist()))
        for place, label in enumerate(classes):
            quota = size // len(classes) + (place < size % len(classes))
            rows = [i for i in range(30) if labels[i] == label and keys[i] > -torch.inf]
            kept |= set(sorted(rows, key=lambda i: -keys[i])[:quota])
        beyond = beyond_quota(keys, labels, size)
        assert {i for i in range(30) if not beyond[i] and keys[i] > -torch.inf} == kept


def test_a_ring_holds_the_latest() -> None:
    assert held(filled(ReplayBuffer(6, policy="ring"))) == list(range(34, 40))


def test_herding_is_the_greedy_choice() -> None:
    """Against the definition, one candidate after the other; ties go to the first."""
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[7], x[9] = 2 * x[2], 0
    units = [row / row.norm() if row.norm() > 0 else row for row in x]
    mean = sum(units) / 12
    chosen: list[int] = []
    for _ in range(12):
        gaps = {
            i: float((mean - sum([units[j] for j in (*chosen, i)]) / (len(chosen) + 1)).norm())
            for i in range(12)
            if i not in chosen
        }
        chosen.append(min(gaps, key=lambda i: (round(gaps[i], 12), i)))
    assert herding_order(x, 20).tolist() == chosen
    assert herding_order(x.float(), 4).tolist() == chosen[:4]
    assert herding_order(torch.ones(4, 2), 3).tolist() == [0, 1, 2]


def test_exemplars_by_herding_are_the_first_of_each_class_however_many_classes_come() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 4
    buffer = ReplayBuffer(10, policy="herding")
    for task in ((0, 1), (2, 3)):
        rows = (y == task[0]) | (y == task[1])
        buffer.add((torch.arange(40)[rows], y[rows]), features=x[rows])
    wanted = []
    for label, quota in zip(range(4), (3, 3, 2, 2), strict=True):
        of_class = (y == label).nonzero().squeeze(1)
        wanted += of_class[herding_order(x[of_class], quota)].tolist()
    assert sorted(next(iter(buffer.loader(10)))[0].tolist()) == sorted(wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_buffer_is_the_uninterrupted_one(policy: Any) -> None:
    whole = filled(ReplayBuffer(9, policy=policy), 20)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = ReplayBuffer(9, policy=policy, seed=5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied = pickle.loads(pickle.dumps(whole))
    before = torch.get_rng_state()
    for buffer in (whole, resumed, copied):
        filled(buffer, 30, seed=1)
    samples = [[buffer.sample(4)["x"].tolist() for _ in range(3)] for buffer in (whole, resumed, copied)]
    assert samples[0] == samples[1] == samples[2]
    assert samples[0][0] != samples[0][1]
    assert held(whole) == held(resumed)
    assert torch.equal(torch.get_rng_state(), before)
    smaller = ReplayBuffer(4, policy=policy)
    smaller.load_state_dict(whole.state_dict())
    assert set(held(smaller)) <= set(held(whole))
    assert len(smaller) == 4


def test_rows_of_any_form_in_their_own_type() -> None:
    Pair = namedtuple("Pair", "image mask")
    batch = [Pair(torch.full((3, 2, 2), 200, dtype=torch.uint8), torch.ones(3, dtype=torch.bool)), {"t": torch.ones(3)}]
    buffer = ReplayBuffer(2)
    buffer.add(batch)
    (image, mask), rest = buffer.sample(2)
    assert image.dtype == torch.uint8
    assert (image == 200).all()
    assert mask.all()
    assert rest["t"].tolist() == [1, 1]
    assert buffer.nbytes == 2 * (4 + 1 + 4 + 16)
    assert buffer.labels.tolist() == [-1, -1]


def test_sampling_and_passes() -> None:
    buffer = ReplayBuffer(9)
    assert buffer.sample(3) is None
    assert list(buffer.loader(4)) == []
    filled(buffer)
    assert sorted(buffer.sample(20)["x"].tolist()) == held(buffer)
    assert len(set(buffer.sample(5)["x"].tolist())) == 5
    twin = pickle.loads(pickle.dumps(buffer))
    loader = buffer.loader(4)
    passes = [[row for batch in loader for row in batch["x"].tolist()] for _ in range(2)]
    assert [len(batch["x"]) for batch in loader] == [4, 4, 1]
    assert len(loader) == 3
    assert sorted(passes[0]) == sorted(passes[1]) == held(buffer)
    assert passes[0] != passes[1]
    assert [row for batch in ReplayBuffer.loader(buffer, 4) for row in batch["x"].tolist()] not in passes
    assert buffer.sample(5)["x"].tolist() == twin.sample(5)["x"].tolist()  # a pass draws nothing


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
def test_rows_on_their_device_wait_for_nothing(policy: Any) -> None:
    class NoWait(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            of_rows = [a for a in args if isinstance(a, Tensor) and a.dtype != torch.float64 and a.dtype != torch.bool]
            waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            assert not (func in waits and of_rows)
            return func(*args, **(kwargs or {}))

    buffer = filled(ReplayBuffer(5, policy=policy, storage="device"))
    x, y = stream(8)
    with NoWait():
        buffer.add({"x": x, "y": y})


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "kwargs", "match"),
    [
        ((X, torch.zeros(3)), {}, r"as many rows as each other, got .*'batch\[1\]': 3"),
        ((X, "a name"), {}, r"`batch\[1\]` is a str"),
        ({"x": X, "n": torch.tensor(3)}, {}, r"`batch\['n'\]` is a number, which has no rows"),
        ((torch.zeros(4, 2), Y), {}, r"`batch\[0\]` has rows of shape \(2,\).*holds of shape \(3,\) and torch.float32"),
        ((X.double(), Y), {}, r"torch.float64, and the buffer holds .*float32"),
        (X, {}, r"`batch.*` has rows"),
        ((X, Y.float()), {}, r"`labels` must be integers of shape \(4,\), one class per row, got torch.float32"),
        ((X, Y), {"labels": torch.zeros(3, dtype=torch.long)}, r"shape \(4,\), one class per row, got .*\(3,\)"),
        ((), {}, "as many rows"),
    ],
)
def test_what_cannot_be_kept_is_refused(batch: Any, kwargs: Any, match: str) -> None:
    buffer = ReplayBuffer(5, policy="class_balanced")
    buffer.add((X, Y))
    with pytest.raises(ValueError, match=match):
        buffer.add(batch, **kwargs) if not isinstance(batch, Tensor) else buffer.add(batch, labels=Y)
    assert len(buffer) == 4


def test_arguments() -> None:
    for kwargs, match in (
        ({"size": 0}, "`size` must be an integer of at least 1, got 0"),
        ({"size": 5, "policy": "fifo"}, "`policy` must be one of .*'fifo'"),
        ({"size": 5, "storage": "disk"}, "`storage` must be one of .*'disk'"),
    ):
        with pytest.raises(ValueError, match=match):
            ReplayBuffer(**kwargs)
    with pytest.raises(ValueError, match=r"`features` must have shape \(4, D\) for `policy='herding'`, got None"):
        ReplayBuffer(5, policy="herding").add((X, Y))
    with pytest.raises(ValueError, match="`n` must be an integer of at least 0, got -1"):
        ReplayBuffer(5).sample(-1)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        ReplayBuffer(5).loader(0)
    with pytest.raises(MemoryError, match=r"`size=1000000000000` rows of 36 bytes take 3.6e\+04 GB, and cpu has"):
        ReplayBuffer(10**12).add((X, Y))


def test_batches_of_any_kind_become_longer_as_what_they_are() -> None:
    class Encoding(UserDict[str, Any]):
        """As tokenizers return it: made of more than a mapping."""

        def __init__(self, data: Any = None, encodings: Any = None) -> None:
            super().__init__(data)
            self.encodings = encodings

    class Pair(NamedTuple):
        x: Any
        y: Any

    one = {"x": torch.zeros(2, 3), "y": torch.zeros(2, dtype=torch.long)}
    for batch in (
        defaultdict(list, one),
        OrderedDict(one),
        Encoding(one, "kept"),
        MappingProxyType(one),
        Pair(*one.values()),
    ):
        buffer = ReplayBuffer(4)
        buffer.add(batch)
        joined = concatenate(batch, buffer.sample(4))
        assert type(joined) is type(batch)
        assert [len(part) for part in (joined if isinstance(batch, Pair) else joined.values())] == [4, 4]
        assert getattr(joined, "encodings", "kept") == "kept"
    assert len(one["x"]) == 2
    with pytest.raises(ValueError, match=r"`batch\['x'\]` is a list of 1 and what is rehearsed for it a Tensor"):
        concatenate({"x": [one["x"]]}, {"x": one["x"]})
    with pytest.raises(ValueError, match=r"`batch` is a mapping of 'x', 'y', 'id' and .* a mapping of 'x', 'y'"):
        concatenate({**one, "id": ["a"]}, one)


def test_keys_of_another_policy_are_refused() -> None:
    state = filled(ReplayBuffer(5, policy="ring")).state_dict()
    for load in (ReplayBuffer(5).load_state_dict, ReplayBuffer(5).merge):
        with pytest.raises(ValueError, match="has `policy='reservoir'`, and the state is of one with 'ring'"):
            load(state)


def test_rows_whose_features_are_no_numbers_are_the_last_exemplars() -> None:
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    broken = torch.cat([features, torch.full((1, 3), torch.nan), torch.full((1, 3), torch.inf)])[
        [6, 0, 1, 2, 7, 3, 4, 5]
    ]
    places = torch.tensor([1, 2, 3, 5, 6, 7])
    assert herding_order(broken, 8).tolist() == [*places[herding_order(features, 6)].tolist(), 0, 4]
