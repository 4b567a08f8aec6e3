"""Twin packages: ``pytorch_lightning`` has the classes of ``lightning.pytorch`` once more.

A trainer may be of either. Callbacks and mixins are called by their methods and serve both; only what asks for a class
must know of the other.
"""

from typing import Any

TWINS = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}


def path_of(thing: Any) -> str:
    """Module and name of a class or a function, the same for both packages.

    Example:
        >>> class Trainer: ...
        >>> Trainer.__module__ = "pytorch_lightning.trainer.trainer"
        >>> path_of(Trainer)
        'lightning.pytorch.trainer.trainer.Trainer'
    """
    package, dot, rest = thing.__module__.partition(".")
    return f"{TWINS.get(package, package)}{dot}{rest}.{thing.__qualname__}"


def is_kind(thing: object, *kinds: type) -> bool:
    """``isinstance`` that takes a class of Lightning and its twin for one.

    Example:
        >>> is_kind(2, int, str), is_kind(2.0, int)
        (True, False)
    """
    wanted = {path_of(kind) for kind in kinds}
    return any(path_of(base) in wanted for base in type(thing).__mro__)
