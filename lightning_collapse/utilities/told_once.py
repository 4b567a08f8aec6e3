"""Told once: which warnings say the same thing."""

import re

_NUMBERS = re.compile(r"`[^`]*`|\d+(?:\.\d+)?")
NAMED = 8
"""So many layers one warning names."""


def kind_of(message: str) -> str:
    """A message without its numbers, except those in names: what differs in sizes alone has been said before.

    Example:
        >>> kind_of("`fc.2` returned 21 rows for 64 labels")
        '`fc.2` returned # rows for # labels'
    """
    return _NUMBERS.sub(lambda found: found[0] if found[0][0] == "`" else "#", message)


def listed(names: list[str]) -> str:
    """Names of layers for a warning, of many the first ones and how many more there are.

    Example:
        >>> listed(["a", "b"]), listed([str(i) for i in range(10)])[-14:]
        ('`a`, `b`', '`7` and 2 more')
    """
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"`{name}`" for name in names[:NAMED]) + more
