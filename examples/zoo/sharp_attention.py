"""Attention entropy collapse: queries and keys grow until every query looks at one key."""

from .gpt import gpt
from .specimen import Specimen

SPECIMEN = Specimen(
    "growing attention logits",
    gpt,
    "the learning rate of queries, keys and values grows",
    kind="attention_entropy_collapse",
    setting="growth_of_logits",
    healthy=1.0,
    sick=1.06,
    layers=("blocks.*",),
    family="language model",
)
