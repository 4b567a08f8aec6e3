"""Device-to-host transfer of whole tensors: each keeps its shape, type and values."""

import torch

from lightning_collapse.monitoring.to_host import copies_on_host


def test_copies_have_the_shapes_types_and_values_of_the_tensors():
    tensors = [
        torch.arange(6.0).view(2, 3),
        torch.tensor([True, False]),
        torch.tensor(2.5),
        torch.arange(4).view(2, 1, 2),
        torch.zeros(0, 3),
        torch.arange(5.0, dtype=torch.bfloat16),
        torch.full((2, 2), 7.0),
    ]
    found = copies_on_host(tensors)
    assert [x.dtype for x in found] == [x.dtype for x in tensors]
    assert [x.shape for x in found] == [x.shape for x in tensors]
    assert all(torch.equal(x, y) for x, y in zip(found, tensors, strict=True))
    assert copies_on_host([]) == []
