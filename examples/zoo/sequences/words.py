"""Words and sentences of the documentation of Python's language."""

import re
from collections import Counter
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor

VOCABULARY, LONGEST, SHORTEST, FEWEST = 400, 20, 6, 40
UNKNOWN, PADDING = 1, 0


@cache
def words() -> dict[str, int]:
    """The most frequent words and their numbers, from 2."""
    counts = Counter(_words(" ".join(topics[name] for name in sorted(topics))))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 2]
    return {word: number for number, word in enumerate(frequent, start=2)}


@cache
def sentences() -> tuple[Tensor, Tensor]:
    """Sentences ``(S, L)``, padded with 0, and the numbers of their topics, those that have forty or more."""
    known, rows, labels = words(), list[list[int]](), list[int]()
    for name in sorted(topics):
        own = [[known.get(word, UNKNOWN) for word in _words(part)] for part in re.split(r"[.:]\s", topics[name])]
        own = [numbers[:LONGEST] for numbers in own if len(numbers) >= SHORTEST]
        if len(own) >= FEWEST:
            labels += [len(set(labels))] * len(own)
            rows += own
    padded = [numbers + [PADDING] * (LONGEST - len(numbers)) for numbers in rows]
    return torch.tensor(padded), torch.tensor(labels)


def _words(passage: str) -> list[str]:
    return re.findall(r"[a-z_]+", passage.lower())
