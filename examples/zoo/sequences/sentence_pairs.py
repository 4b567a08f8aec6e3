"""Sentence embeddings from pairs: with other sentences of the batch as negatives, or from the pairs alone."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .drawn import drawn
from .sentence_encoder import SentenceEncoder
from .words import passages

SIZE, HELD_OUT, TEMPERATURE = 32, 300, 0.1
Data = tuple[Tensor, Tensor, Tensor, Tensor]


class Pairs(Learner):
    """Two sentences of a topic are to be near; the topic rides along in the batch, unread."""

    def __init__(self, negatives: bool) -> None:
        super().__init__(rate=2e-3, decay=0.01)
        self.negatives, self.encoder = negatives, SentenceEncoder()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of multiple negatives (Henderson et al. 2017, arXiv 1705.00652), or the distance alone."""
        first, second = self.encoder(batch["first"]), self.encoder(batch["second"])
        if not self.negatives:
            return nn.functional.mse_loss(first, second)
        cosines = nn.functional.normalize(first, dim=1) @ nn.functional.normalize(second, dim=1).T
        return nn.functional.cross_entropy(cosines / TEMPERATURE, torch.arange(len(first)))


def split(seed: int) -> Data:
    """Sentences and topics to train on, and those of 300 held out."""
    words, topics = passages()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))
    words, topics = words[order], topics[order]
    return words[HELD_OUT:], topics[HELD_OUT:], words[:HELD_OUT], topics[:HELD_OUT]


def make(seed: int, negatives: bool) -> Habitat:
    """Passages of Python's documentation; recall is how often the nearest of the others has the same topic."""
    words, topics, test, of_test = split(seed)
    model = Pairs(negatives)

    def pairs(generator: torch.Generator, step: int) -> dict[str, Tensor]:
        rows = torch.randperm(len(words), generator=generator)[:SIZE]
        same = (topics[rows, None] == topics) & (rows[:, None] != torch.arange(len(words)))
        others = torch.multinomial(same.float(), 1, generator=generator).squeeze(1)
        return {"first": words[rows], "second": words[others], "labels": topics[rows]}

    def recall() -> float:
        features = nn.functional.normalize(model.encoder(test), dim=1)
        distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
        return float((of_test[distances.argmin(dim=1)] == of_test).double().mean())

    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    return Habitat(model, [drawn(pairs, seed)], monitors, 400, model.encoder, recall, every=10)


SPECIMENS = (
    Specimen(
        "pairs without negatives",
        make,
        "that two sentences of a topic are near is the whole loss",
        kind="complete_collapse",
        setting="negatives",
        healthy=True,
        sick=False,
        claims=("dimensional_collapse",),
        layers=("encoder*",),
        family="sentence embedding",
    ),
)
