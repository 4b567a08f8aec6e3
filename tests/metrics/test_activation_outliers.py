"""The streaming form reads what the function does of all rows."""

import pytest
import torch

from lightning_collapse.functional import activation_outliers
from lightning_collapse.metrics import ActivationOutliers


def rows():
    x = torch.randn(90, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 4
    x[37, 2] = 500.0
    return x


def test_batches_read_what_all_rows_do():
    metric, expected = ActivationOutliers(5), activation_outliers(rows())._asdict()
    for batch in rows().split([10, 0, 50, 30]):
        metric.update(batch)
    found = metric.compute()
    assert found.pop("n") == 90
    assert {k: v.item() for k, v in found.items()} == pytest.approx({k: v.item() for k, v in expected.items()})


def test_a_mask_and_merged_streams():
    mask = torch.arange(90) < 60
    metric, other = ActivationOutliers(5), ActivationOutliers(5)
    metric.update(rows(), mask)
    other.update(rows(), ~mask)
    metric.merge_state(other)
    expected = activation_outliers(rows())
    found = metric.compute()
    for name in expected._fields:
        assert found[name].item() == pytest.approx(getattr(expected, name).item()), name


def test_bad_arguments():
    with pytest.raises(ValueError, match="`dim` is the number of neurons and must be positive, got 0"):
        ActivationOutliers(0)
    with pytest.raises(ValueError, match=r"`features` must have shape \(N, 5\)"):
        ActivationOutliers(5).update(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="`incoming_state` must be an `ActivationOutliers` metric"):
        ActivationOutliers(5).merge_state(ActivationOutliers(4))
