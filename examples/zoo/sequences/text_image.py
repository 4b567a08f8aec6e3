"""Language-image pre-training: captions and images of digits, with or without other rows as negatives."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, digits
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor

from .captions import TwoTowers, captions
from .drawn import drawn

SIZE, TEMPERATURE = 64, 0.1


class LanguageImage(Learner):
    """Two towers and the agreement of their outputs."""

    def __init__(self, negatives: bool) -> None:
        super().__init__(rate=2e-3, decay=0.01)
        self.negatives, self.towers = negatives, TwoTowers()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy both ways (Radford et al. 2021, arXiv 2103.00020), or the cosine of pairs alone."""
        images, texts = self.towers.images(batch["pixel_values"]), self.towers.texts(batch["input_ids"])
        if not self.negatives:
            return 1 - nn.functional.cosine_similarity(images, texts).mean()
        logits, own = images @ texts.T / TEMPERATURE, torch.arange(len(images))
        return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


def make(seed: int, negatives: bool) -> Habitat:
    """Digits; accuracy is that of the nearest caption."""
    images, labels, test, classes = digits(seed)
    model, texts = LanguageImage(negatives), captions()

    def pairs(generator: torch.Generator, step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(images), (SIZE,), generator=generator)
        words = texts[torch.randint(len(texts), (SIZE,), generator=generator), labels[rows]]
        return {"pixel_values": images[rows].view(-1, 1, 8, 8), "input_ids": words}

    def zero_shot() -> float:
        cosines = model.towers.images(test.view(-1, 1, 8, 8)) @ model.towers.texts(texts[0]).T
        return float((cosines.argmax(dim=1) == classes).double().mean())

    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), AttentionEntropyMonitor()]
    return Habitat(model, [drawn(pairs, seed)], monitors, 400, model.towers.text_projection, zero_shot, every=10)


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
