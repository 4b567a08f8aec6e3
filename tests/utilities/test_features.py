"""From what layers return to rows."""

from collections import OrderedDict
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.utilities.channel_axis import ChannelAxis
from lightning_collapse.utilities.features import PREFERRED_KEYS, as_row_mask, as_rows, evenly, sample_count, token_at


class ModelOutput(OrderedDict):
    """What Hugging Face returns: an ordered mapping whose integer keys are positions."""

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class Named(NamedTuple):
    loss: float
    features: Tensor


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape).to(dtype)


X = tensor(4, 3)


def test_vectors_are_themselves() -> None:
    assert as_rows(X) is X
    assert as_rows(X, channels_first=True) is X


def test_numbers_are_one_feature_each() -> None:
    assert torch.equal(as_rows(tensor(5)), tensor(5, 1))


def test_tokens_are_rows_without_a_copy() -> None:
    tokens = tensor(2, 5, 3)
    rows = as_rows(tokens)
    assert torch.equal(rows, tensor(10, 3))
    assert rows.data_ptr() == tokens.data_ptr()


@pytest.mark.parametrize("spatial", [(2, 4), (7, 1), (2, 3, 4)])
def test_maps_are_their_spatial_mean(spatial: tuple[int, ...]) -> None:
    maps = tensor(4, 3, *spatial)
    expected = torch.stack([torch.stack([channel.mean() for channel in sample]) for sample in maps])
    torch.testing.assert_close(as_rows(maps), expected)


def test_channels_first_sequences_are_maps() -> None:
    maps = tensor(4, 3, 5)
    torch.testing.assert_close(as_rows(maps, channels_first=True), maps.mean(dim=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_averaged_in_float32(dtype: torch.dtype) -> None:
    maps = (tensor(2, 3, 4, 4) / 100).to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            rows = as_rows(maps)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, maps.float().mean(dim=(2, 3)))
    assert as_rows(maps[:, :, 0, 0]).dtype == dtype  # only what is computed is promoted


def test_double_maps_stay_double() -> None:
    assert as_rows(tensor(2, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64


def test_channels_last_memory_is_still_channels_first() -> None:
    maps = tensor(2, 3, 4, 5)
    torch.testing.assert_close(as_rows(maps.to(memory_format=torch.channels_last)), maps.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "output",
    [
        (X, tensor(9, 9)),
        [X],
        (torch.tensor([1, 2]), X),
        (None, X, tensor(2, 2)),
        ((torch.tensor(True), (X, None)), tensor(2, 2)),
        ([], {}, X),
        ("words", 3, 2.5, X),
        Named(0.5, X),
        {"features": X},
        {"logits": X},
        {"logits": tensor(2, 2), "features": X},
        {"features": None, "x": None, "logits": X},
        {"ids": torch.tensor([1]), "logits": X},
        {"hidden_states": (tensor(2, 2), tensor(3, 3), X)},
        {"hidden_states": (), "logits": X},
        {"hidden_state": [tensor(2, 2), X]},
        {"outputs": {"deep": (None, X)}},
        {"name": "abc", "embedding": X},
        ModelOutput(last_hidden_state=X, pooler_output=tensor(2, 2)),
        ModelOutput(logits=tensor(2, 2), hidden_states=(tensor(3, 3), X)),
        ModelOutput(logits=X, past_key_values=None),
    ],
    ids=lambda output: type(output).__name__,
)
def test_where_the_features_are(output: Any) -> None:
    assert as_rows(output) is X


@pytest.mark.parametrize("output", [{"loss": torch.tensor(0.5), "logits": X}, (torch.tensor(0.5), X)])
def test_a_loss_is_not_features(output: Any) -> None:
    # what a Hugging Face model returns when it is given labels
    assert as_rows(output) is X


def test_preferred_keys_in_their_order() -> None:
    for i, key in enumerate(PREFERRED_KEYS):
        later = {other: tensor(2, 2) for other in reversed(PREFERRED_KEYS[i + 1 :])}
        assert as_rows({"logits": tensor(3, 3), **later, key: X}) is X


def test_what_recurrent_and_attention_layers_return() -> None:
    x = torch.randn(2, 5, 8)
    output, _ = lstm_output = nn.LSTM(8, 6, batch_first=True)(x)
    assert torch.equal(as_rows(lstm_output), output.reshape(10, 6))
    output, weights = attention_output = nn.MultiheadAttention(8, 2, batch_first=True)(x, x, x)
    assert weights.shape == (2, 5, 5)
    assert torch.equal(as_rows(attention_output), output.reshape(10, 8))
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2]), batch_first=True)
    packed_output = nn.LSTM(8, 6, batch_first=True)(packed)
    assert torch.equal(as_rows(packed_output), packed_output[0].data)


@pytest.mark.parametrize(
    "output",
    [
        None,
        3,
        2.5,
        "words",
        b"bytes",
        [],
        (),
        {},
        object(),
        torch.tensor(1.0),
        torch.tensor([1, 2]),
        torch.ones(2, 3, dtype=torch.bool),
        torch.eye(3).to_sparse(),
        [1, "a", None],
        {"hidden_states": ()},
        {"loss": 0.5, "n": 3},
    ],
    ids=lambda output: type(output).__name__,
)
def test_no_features(output: Any) -> None:
    assert as_rows(output) is None
    assert as_row_mask(output, torch.ones(2, 3)) is None


@pytest.mark.parametrize("shape", [(0, 3), (0, 5, 3), (2, 0, 3), (0, 3, 4, 4)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    assert as_rows(torch.zeros(shape)).shape == (0, 3)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 5, 3), (2, 3, 4, 4)])
def test_the_graph_is_kept(shape: tuple[int, ...]) -> None:
    x = tensor(*shape).requires_grad_()
    as_rows(x).sum().backward()
    spatial = shape[2] * shape[3] if len(shape) == 4 else 1
    torch.testing.assert_close(x.grad, torch.full(shape, 1 / spatial))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_masks_follow_tokens(dtype: torch.dtype) -> None:
    tokens, mask = tensor(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).to(dtype)
    for output in (tokens, (tokens, None), {"last_hidden_state": tokens}):
        flat = as_row_mask(output, mask)
        assert flat.dtype == torch.bool
        assert torch.equal(as_rows(output)[flat], torch.cat([tokens[0, :3], tokens[1, :1]]))


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 3), (3, 5, 3), (2, 5, 3, 3), (10,)])
def test_masks_of_other_shapes_do_not_apply(shape: tuple[int, ...]) -> None:
    assert as_row_mask(tensor(*shape), torch.ones(2, 5)) is None


def test_no_mask() -> None:
    assert as_row_mask(tensor(2, 5, 3), None) is None


@pytest.mark.parametrize(("count", "limit"), [(10, 3), (10, 9), (1000, 7), (7, 1)])
def test_evenly(count: int, limit: int) -> None:
    rows = tensor(count, 2)
    picked = evenly(rows, limit)
    positions = (picked[:, 0] / 2).tolist()
    assert len(positions) == limit
    bounds = [i * count // limit for i in range(limit + 1)]
    assert all(low <= position < high for position, (low, high) in zip(positions, pairwise(bounds), strict=True))
    mask = torch.arange(count) % 3 == 0
    assert torch.equal(evenly(mask, limit), mask[(picked[:, 0] / 2).long()])


@pytest.mark.parametrize(("sequences", "length", "limit"), [(64, 128, 64), (64, 128, 512), (16, 64, 256), (32, 8, 16)])
def test_evenly_does_not_fall_in_step_with_sequences(sequences: int, length: int, limit: int) -> None:
    positions = (evenly(tensor(sequences * length, 2), limit)[:, 0] / 2) % length
    quarters = torch.bincount((positions * 4 / length).long(), minlength=4) / limit
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.07, rtol=0)


@pytest.mark.parametrize("limit", [4, 100])
def test_evenly_copies(limit: int) -> None:
    picked = evenly(X, limit)
    assert torch.equal(picked, X)
    assert picked.untyped_storage().data_ptr() != X.untyped_storage().data_ptr()


def test_evenly_of_nothing() -> None:
    assert evenly(torch.zeros(0, 3), 5).shape == (0, 3)


def test_sequences_without_tokens_have_no_last_one():
    assert token_at(torch.zeros(4, 0, 3), None, -1) is None


def test_complex_features_are_twice_as_many_real_ones():
    x = torch.complex(X, 2 * X)
    rows = as_rows(x)
    assert rows.shape == (4, 6)
    assert torch.equal(rows.view(4, 3, 2), torch.stack([X, 2 * X], dim=2))
    assert torch.equal(as_rows(x.conj())[:, 1], -rows[:, 1])
    assert as_rows((x, X)) is X  # rotary frequencies stand beside what they turn
    assert as_rows(torch.zeros(2, 3, 4, 4, dtype=torch.complex64)).shape == (2, 6)


def test_eight_bits_are_made_float32():
    assert torch.equal(as_rows(X.to(torch.float8_e4m3fn)), X)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_their_tokens(layout):
    parts = [tensor(3, 2), tensor(1, 2)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    assert torch.equal(as_rows(nested), torch.cat(parts))
    assert as_row_mask(nested, torch.ones(2, 3)) is None
    assert sample_count(nested) == 2
    assert token_at(nested, None, -1) is None
    x = tensor(4, 2).requires_grad_()
    as_rows(torch.nested.as_nested_tensor([x[:3], x[3:]], layout=layout)).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 2))


def test_other_nested_tensors_are_refused():
    with pytest.raises(ValueError, match=r"only \(N, \*, D\)"):
        as_rows(torch.nested.nested_tensor([tensor(3, 2, 4), tensor(1, 2, 4)], layout=torch.jagged))


def test_channels_last_maps_are_averaged_over_what_is_not_channels():
    maps = tensor(2, 7, 5, 3)
    torch.testing.assert_close(as_rows(maps, ChannelAxis(nn.LayerNorm(3))), maps.mean(dim=(1, 2)))
    torch.testing.assert_close(as_rows(maps, ChannelAxis(nn.Conv2d(1, 7, 1))), maps.mean(dim=(2, 3)))
