"""Whoever reads a loader in mid-epoch goes on as if nobody else had."""

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler

from lightning_collapse.utilities.loaders import batches_of, rewound


class Noisy(Dataset):
    """Draws from generators of its own."""

    def __init__(self):
        self.own = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(1)

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index + torch.rand((), generator=self.own) + self.numpy.random()


class Counting(Sampler):
    """Goes on where it stopped, as samplers that can be resumed do."""

    def __init__(self, dataset):
        self.dataset, self.at = dataset, 0

    def __iter__(self):
        while self.at < len(self.dataset):
            self.at += 1
            yield self.at - 1
        self.at = 0


def drawing(data):
    return RandomSampler(data, replacement=True, num_samples=80, generator=torch.Generator().manual_seed(2))


LOADERS = {
    "shuffled": lambda data: DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "drawn in mid-epoch": lambda data: DataLoader(data, 2, sampler=drawing([0] * 12)),
    "stateful sampler": lambda data: DataLoader(data, 2, sampler=Counting(data)),
    "stateful batches": lambda data: DataLoader(data, batch_sampler=BatchSampler(Counting(data), 2, False)),
    "workers that stay": lambda data: DataLoader(data, 2, num_workers=1, persistent_workers=True),
    "combined": lambda data: CombinedLoader([DataLoader(data, 2, num_workers=1, persistent_workers=True)], "min_size"),
}


@pytest.mark.filterwarnings("ignore:`isinstance")
@pytest.mark.parametrize("kind", LOADERS)
def test_reading_in_mid_epoch_is_not_noticed(kind):
    def epochs(read):
        torch.manual_seed(0)
        loader, found = LOADERS[kind](Noisy()), []
        for _ in range(2):
            for i, batch in enumerate(loader):
                found.append(torch.as_tensor(batch[0][0] if kind == "combined" else batch))
                if read and i in (1, 3):
                    with torch.random.fork_rng():
                        batches = batches_of(loader)
                        with rewound(batches):
                            assert any(True for _ in zip(batches, range(3 + i), strict=False))
        return found

    torch.testing.assert_close(epochs(True), epochs(False), rtol=0, atol=0)


def test_what_cannot_be_copied_is_shared():
    class Locked(Counting):
        def __deepcopy__(self, memo):
            raise TypeError("locked")

    loader = DataLoader(Noisy(), 2, sampler=Locked(Noisy()))
    assert batches_of(loader).sampler is loader.sampler
    assert len(list(batches_of(loader))) == 6
