"""Sentence embeddings from pairs: with other sentences of the batch as negatives, or from the pairs alone."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .material import Block, drawn
from .words import LONGEST, PADDING, VOCABULARY, sentences

WIDTH, SIZE, HELD_OUT, TEMPERATURE = 48, 32, 400, 0.1
Data = tuple[Tensor, Tensor, Tensor, Tensor]


class SentenceEncoder(nn.Module):
    """One block of a transformer, and the mean of the tokens that are words."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.block, self.out = Block(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        """``(N, D)``."""
        there = (words != PADDING).unsqueeze(-1)
        tokens = self.block(self.tokens(words) + 0.1 * self.places.weight)
        features: Tensor = self.out((tokens * there).sum(dim=1) / there.sum(dim=1))
        return features


class Pairs(Learner):
    """Two sentences of a topic are to be near; the topic rides along in the batch, unread."""

    def __init__(self, negatives: bool) -> None:
        super().__init__(rate=2e-3, decay=0.01)
        self.negatives, self.encoder = negatives, SentenceEncoder()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of multiple negatives (Henderson et al. 2017, arXiv 1705.00652), or the distance alone."""
        first, second = self.encoder(batch["first"]), self.encoder(batch["second"])
        if not self.negatives:
            return (first - second).square().sum(dim=1).mean()
        cosines = nn.functional.normalize(first, dim=1) @ nn.functional.normalize(second, dim=1).T
        return nn.functional.cross_entropy(cosines / TEMPERATURE, torch.arange(len(first)))


def split(seed: int) -> Data:
    """Sentences and topics to train on, and those of 400 held out."""
    words, topics = sentences()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))
    words, topics = words[order], topics[order]
    return words[HELD_OUT:], topics[HELD_OUT:], words[:HELD_OUT], topics[:HELD_OUT]


def make(seed: int, negatives: bool) -> Habitat:
    """Sentences of Python's documentation; recall is how often the nearest of the others has the same topic."""
    words, topics, test, of_test = split(seed)
    model = Pairs(negatives)

    def pairs(generator: torch.Generator, step: int) -> dict[str, Tensor]:
        rows = torch.randperm(len(words), generator=generator)[:SIZE]
        same = (topics[rows, None] == topics) & (rows[:, None] != torch.arange(len(words)))
        others = torch.multinomial(same.float(), 1, generator=generator).squeeze(1)
        return {"first": words[rows], "second": words[others], "labels": topics[rows]}

    def recall() -> float:
        features = model.encoder(test)
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
