"""Loss explosion: the learning rate grows by a few percent a step."""

from .gpt import gpt
from .specimen import Specimen

SPECIMEN = Specimen(
    "growing learning rate",
    gpt,
    "inputs align with the weights before the loss explodes",
    kind="loss_explosion",
    setting="growth",
    healthy=1.0,
    sick=1.07,
    layers=("blocks.*",),
    family="language model",
)
