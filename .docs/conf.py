"""API reference: one page per package, from its ``__all__`` and the docstrings; built by ``make docs``."""

import sys
from importlib import import_module
from typing import Any

from sphinx.ext.napoleon import Config, GoogleDocstring

import lightning_collapse

PACKAGES = [
    "",
    *["callbacks", "functional", "layers", "losses", "metrics", "mixins", "monitoring", "optimizers", "penalties"],
]
PACKAGES += ["reporting", "rules", "spectral", "utilities"]
PACKAGES += ["functional.factors", "functional.manifolds", "functional.tail_learning"]
MODULES = [import_module(f"lightning_collapse.{package}".rstrip(".")) for package in PACKAGES]
HOME: dict[int, str] = {}
for module in MODULES:  # a name that several packages export is described by the first
    for name in module.__all__:
        HOME.setdefault(id(getattr(module, name)), f"{module.__name__}.{name}")
OURS = [name for name in sys.modules if name.startswith("lightning_collapse")]

project = "lightning_collapse"
version = release = lightning_collapse.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax"]
GOOGLE = Config(napoleon_use_ivar=True, napoleon_use_rtype=False)
templates_path = ["_templates"]
exclude_patterns = ["_templates", ".doctrees"]
html_theme = "furo"
html_copy_source = False
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
autosummary_ignore_module_all = False
autosummary_imported_members = True
autosummary_context = {
    "elsewhere": {
        m.__name__: [name for name in m.__all__ if HOME[id(getattr(m, name))] != f"{m.__name__}.{name}"]
        for m in MODULES
    }
}


def setup(app: Any) -> None:
    """Connect what reads docstrings and what finds references."""
    app.connect("autodoc-process-docstring", read)
    app.connect("missing-reference", resolve)


def read(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Google style; the extension itself takes what precedes a colon in the text of an attribute for its type."""
    if what not in ("attribute", "data", "property"):
        lines[:] = GoogleDocstring(lines, GOOGLE, app, what, name, obj, options).lines()


def resolve(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Link a name to where it is described, whatever path it is called by.

    What is not public, or of another package, stays text; a name that nothing has is a broken reference.
    """
    target = node["reftarget"].partition("[")[0]  # Sphinx cuts a signature at commas where it cannot read a default
    module = node.get("py:module")
    places = ["", f"{module}.", f"{module}.{node.get('py:class')}.", *(f"{name}." for name in OURS), "builtins."]
    found = [it for place in places if (it := find(place + target)) is not None]
    if not found:
        return None
    python, home = env.get_domain("py"), HOME.get(id(found[0]), target)
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", home, node, text) or text


def find(path: str) -> Any:
    """The object of a dotted path, ``None`` if there is none."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if (found := sys.modules.get(".".join(parts[:end]))) is not None:
            for part in parts[end:]:
                found = getattr(found, part, None)
            return found
    return None
