"""Method resolution order: where a mixin stands among the bases of a module."""

from typing import Any

LIGHTNING = ("lightning", "pytorch_lightning")


def check_order(cls: type, mixin: type[Any]) -> None:
    """Refuse a class whose mixin comes after ``LightningModule``, which would hide it.

    Raises:
        TypeError: If it does.
    """
    # by name: `lightning.pytorch` and `pytorch_lightning` each have their own class
    before = cls.__mro__[: cls.__mro__.index(mixin)]
    if any(b.__name__ == "LightningModule" and b.__module__.split(".")[0] in LIGHTNING for b in before):
        raise TypeError(f"Write `class {cls.__name__}({mixin.__name__}, LightningModule)`: the mixin goes first.")
