"""Language-image pre-training: captions and images of digits, with or without other rows as negatives."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, digits, mlp
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor

from .material import Block, drawn

WORDS = [
    "a",
    "the",
    "photo",
    "picture",
    "of",
    "digit",
    "number",
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
]
TEMPLATES = ("a photo of the {}", "the picture of a {}", "a digit the number {}", "photo of the digit {}")
WIDTH, SIZE, TEMPERATURE = 32, 64, 0.1


def captions() -> Tensor:
    """Words of every template for every digit, ``(4, 10, 5)``."""
    texts = [[template.format(WORDS[7 + digit]).split() for digit in range(10)] for template in TEMPLATES]
    return torch.tensor([[[WORDS.index(word) for word in words] for words in row] for row in texts])


class TwoTowers(Learner):
    """A convolutional network for images, a transformer for captions, and a projection of each."""

    def __init__(self, negatives: bool) -> None:
        super().__init__(rate=2e-3, decay=0.01)
        self.negatives = negatives
        self.vision = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
        )
        self.tokens, self.places = nn.Embedding(len(WORDS), WIDTH), nn.Embedding(5, WIDTH)
        self.text = nn.Sequential(Block(WIDTH), nn.LayerNorm(WIDTH))
        self.image_projection, self.text_projection = mlp(512, 64, WIDTH), nn.Linear(WIDTH, WIDTH)

    def image_features(self, pixels: Tensor) -> Tensor:
        """``(N, D)``."""
        return nn.functional.normalize(self.image_projection(self.vision(pixels)), dim=1)

    def text_features(self, words: Tensor) -> Tensor:
        """``(N, D)``."""
        tokens = self.text(self.tokens(words) + self.places.weight)
        return nn.functional.normalize(self.text_projection(tokens.mean(dim=1)), dim=1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy both ways (Radford et al. 2021, arXiv 2103.00020), or the cosine of pairs alone."""
        images, texts = self.image_features(batch["pixel_values"]), self.text_features(batch["input_ids"])
        if not self.negatives:
            return 1 - (images * texts).sum(dim=1).mean()
        logits, own = images @ texts.T / TEMPERATURE, torch.arange(len(images))
        return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


def make(seed: int, negatives: bool) -> Habitat:
    """Digits; accuracy is that of the nearest caption."""
    images, labels, test, classes = digits(seed)
    model, texts = TwoTowers(negatives), captions()

    def pairs(generator: torch.Generator, step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(images), (SIZE,), generator=generator)
        words = texts[torch.randint(len(TEMPLATES), (SIZE,), generator=generator), labels[rows]]
        return {"pixel_values": images[rows].view(-1, 1, 8, 8), "input_ids": words}

    def zero_shot() -> float:
        cosines = model.image_features(test.view(-1, 1, 8, 8)) @ model.text_features(texts[0]).T
        return float((cosines.argmax(dim=1) == classes).double().mean())

    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), AttentionEntropyMonitor()]
    return Habitat(model, [drawn(pairs, seed)], monitors, 400, model.text_projection, zero_shot, every=10)


SPECIMENS = (
    Specimen(
        "captions without negatives",
        make,
        "that an image and its caption agree is the whole loss",
        kind="complete_collapse",
        setting="negatives",
        healthy=True,
        sick=False,
        claims=("dimensional_collapse",),
        family="language-image",
    ),
)
