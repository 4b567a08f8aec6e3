"""The folder listing is the architecture: imports point one way, files stay small, the package keeps to itself."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import pytest

import lightning_collapse

ROOT = Path(lightning_collapse.__file__).parent
LEVEL = {
    "utilities": 0,
    "spectral": 1,
    "functional": 2,
    "metrics": 3,
    "losses": 3,
    "penalties": 3,
    "replay": 3,
    "layers": 3,
    "optimizers": 3,
    "rules": 3,
    "projections": 4,
    "monitoring": 4,
    "reporting": 5,
    "callbacks": 6,
    "mixins": 7,
}
MAY_IMPORT_LIGHTNING = {"reporting", "mixins", "callbacks", "utilities/trainer.py", "utilities/training_step.py"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)
ALLOWED = {"torch", "lightning", "lightning_utilities", "torchmetrics", "numpy", "tensorboard", "typing_extensions"}
ALLOWED |= {"fsspec", "PIL"}  # what Lightning and TensorBoard themselves write files and pictures with


@cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path):
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    here = path.relative_to(ROOT).parts[0]
    for module in imports(path):
        top, _, rest = module.partition(".")
        there = rest.partition(".")[0]
        if top == "lightning_collapse" and there != here:
            assert LEVEL[there] < LEVEL[here], f"{here} must not import {there}"
        if top in {"lightning", "pytorch_lightning"}:
            assert {here, f"{here}/{path.name}"} & MAY_IMPORT_LIGHTNING, f"{path} must not import Lightning"
        if top not in {"lightning_collapse", *sys.stdlib_module_names}:
            assert top in ALLOWED, f"{path} imports {top}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


PRIVATE = {"utilities/trainer.py", "utilities/private_torch.py"}
"""The files that know private API of Lightning and of torch."""
KNOWN = {
    "_replace": "public, of named tuples",
    "_generate_state_key": "of callbacks: what Lightning's own make their `state_key` with",
    "_apply": "of modules and metrics, which is there to be extended",
    "_parameters": "of modules: what `register_parameter` fills",
    "_buffers": "of modules: what `register_buffer` fills",
    "_modules": "of modules: what `add_module` fills",
    "_reset_parameters": "of modules, where `reset_parameters` is missing",
}
"""Names with an underscore that are others', and why they may stand anywhere."""


@cache
def own_names():
    found = set()
    for node in (node for path in ROOT.rglob("*.py") for node in nodes(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_two_files_know_private_api(path):
    if str(path.relative_to(ROOT)) in PRIVATE:
        return
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_collapse"):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)} - {"__future__"}
    private = {name for name in found if name.startswith("_") and not name.startswith("__")}
    unknown = private - own_names() - KNOWN.keys()
    assert not unknown, f"{path} uses {unknown}"


@pytest.mark.parametrize("package", ["", *sorted(LEVEL)])
def test_public_names_are_there_and_documented(package):
    module = importlib.import_module(f"lightning_collapse.{package}".rstrip("."))
    names = getattr(module, "__all__", [])
    assert names
    for name in names:
        assert getattr(module, name).__doc__ or not callable(getattr(module, name)), name


def test_import_changes_nothing_and_brings_nothing_new():
    """In a process of its own: warning filters, log levels, default dtype and third-party modules are as before."""
    script = """
import logging, sys, warnings
import torch, torchmetrics, lightning.pytorch.callbacks, lightning.pytorch.loggers
def facts():
    return (list(warnings.filters), logging.root.level, list(logging.root.handlers), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.get_num_threads(), torch.random.initial_seed())
before, modules = facts(), {name.partition(".")[0] for name in sys.modules}
import lightning_collapse
assert facts() == before, "a side effect"
new = {name.partition(".")[0] for name in sys.modules} - modules - {"lightning_collapse"} - set(sys.stdlib_module_names)
assert not new, new
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_entry_point_adds_callbacks_to_every_trainer():
    groups = {e.group for e in distribution("lightning-collapse").entry_points}
    assert groups <= {"console_scripts"}
