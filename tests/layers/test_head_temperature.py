"""A temperature of each head: the identity at 1, more even above, sharper below."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lightning_collapse.functional import attention_entropy
from lightning_collapse.layers import HeadTemperature


def test_it_divides_the_logits_of_each_head() -> None:
    query, key, value = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64).unbind()
    layer = HeadTemperature(heads=3).double()
    assert torch.equal(layer(query), query)
    layer.temperature.data = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    logits = query @ key.mT / 2 / layer.temperature.view(3, 1, 1)
    fused = F.scaled_dot_product_attention(layer(query), key, value)
    torch.testing.assert_close(fused, logits.softmax(dim=-1) @ value)
    entropy = [attention_entropy(q, key).entropy for q in (query, layer(query).detach())]
    difference = entropy[1] - entropy[0]
    assert difference[0] < -0.05
    assert difference[2] > 0.05
    fused.square().sum().backward()
    assert (layer.temperature.grad != 0).all()
    assert layer.bfloat16()(query.bfloat16()).dtype == torch.bfloat16


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        HeadTemperature(2, temperature=0)
    with pytest.raises(ValueError, match="`heads` must be an integer of at least 1, got 0"):
        HeadTemperature(0)
