"""Words and passages of the documentation of Python's language."""

import re
from collections import Counter
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor

VOCABULARY, LONGEST, SHORTEST, FEWEST = 400, 32, 8, 8
UNKNOWN, PADDING = 1, 0


@cache
def words() -> dict[str, int]:
    """The most frequent words and their numbers, from 2."""
    counts = Counter(_words(" ".join(topics[name] for name in sorted(topics))))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 2]
    return {word: number for number, word in enumerate(frequent, start=2)}


@cache
def passages() -> tuple[Tensor, Tensor]:
    """Passages ``(S, L)`` of a topic, the last one padded, and the numbers of topics, those that have eight or more."""
    known, rows, labels = words(), list[list[int]](), list[int]()
    for name in sorted(topics):
        own = [known.get(word, UNKNOWN) for word in _words(topics[name])]
        cut = [own[i : i + LONGEST] for i in range(0, len(own), LONGEST)]
        cut = [numbers for numbers in cut if len(numbers) >= SHORTEST]
        if len(cut) >= FEWEST:
            labels += [len(set(labels))] * len(cut)
            rows += cut
    return torch.tensor([numbers + [PADDING] * (LONGEST - len(numbers)) for numbers in rows]), torch.tensor(labels)


def _words(passage: str) -> list[str]:
    return re.findall(r"[a-z_]+", passage.lower())
