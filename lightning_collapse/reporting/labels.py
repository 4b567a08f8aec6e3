"""Labels: names of layers or runs without what all of them begin with."""

import re
from collections.abc import Sequence

_VALIDATION = re.compile(r"(?:.*-)?val/")


def labels(names: Sequence[str]) -> dict[str, str]:
    """What tells names apart: whole parts that all of them begin with are left out, numbers keep the part before them.

    Args:
        names: Of layers, with or without ``val/`` in front, or of runs.

    Returns:
        The label of every name; different names have different ones.

    Example:
        >>> list(labels(["model.net.blocks.0.mlp", "model.net.blocks.11.mlp", "val/model.net.blocks.0.mlp"]).values())
        ['blocks.0.mlp', 'blocks.11.mlp', 'val/blocks.0.mlp']
        >>> labels(["encoder", "head"])
        {'encoder': 'encoder', 'head': 'head'}
    """
    parts = {}
    for name in names:
        front = match[0] if (match := _VALIDATION.match(name)) else ""
        parts[name] = front, re.findall(r"[^./]*[./]*", name.removeprefix(front))[:-1]
    layers = {tuple(rest) for name, (_, rest) in parts.items() if name.rpartition("/")[2] != "all"}
    shared = 0
    while len(layers) > 1 and all(len(rest) > shared + 1 for rest in layers) and len({r[shared] for r in layers}) == 1:
        shared += 1
    while shared and any(rest[shared][:1].isdigit() for rest in layers):
        shared -= 1
    found = {
        name: front + "".join(rest[shared:] if tuple(rest) in layers else rest) for name, (front, rest) in parts.items()
    }
    return found if len(set(found.values())) == len(found) else {name: name for name in names}
