"""What the batteries must know of each registered loss: one file per family, found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from tests.losses.cases.base import Case

CASES: dict[str, Case] = {}
for _module in iter_modules(__path__):
    CASES |= getattr(import_module(f"{__name__}.{_module.name}"), "CASES", {})
