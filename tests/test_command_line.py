"""The command line and the examples, as a user runs them."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from lightning_collapse.__main__ import main
from lightning_collapse.utilities.registry import MEASURES

FOLDER = Path(__file__).parent.parent / "examples"
PARTS = ("continual", "depth", "dynamics", "heads", "latents")
SCRIPTS = sorted([*FOLDER.glob("*.py"), *(path for name in PARTS for path in FOLDER.glob(f"{name}/*.py"))])
EXAMPLES = [path for path in SCRIPTS if "def main(" in path.read_text(encoding="utf-8")]
"""The others are what these import."""


def test_measures_lists_the_registry(capsys):
    main(["measures", "--width", "200"])
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in MEASURES)


def test_help_names_the_commands(monkeypatch, capsys):
    """As ``python -m lightning_collapse --help``."""
    monkeypatch.setattr(sys, "argv", ["lightning_collapse", "--help"])
    monkeypatch.delitem(sys.modules, "lightning_collapse.__main__")  # or `runpy` warns
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lightning_collapse", run_name="__main__", alter_sys=True)
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "measures" in printed
    assert "demo" in printed


def test_demo_writes_events_and_a_picture_and_says_what_was_seen(tmp_path, capsys):
    main(["demo", "--out", str(tmp_path / "demo"), "--steps", "50"])
    printed = capsys.readouterr().out
    assert "All inputs are mapped to nearly one point in `projector`. Complete collapse since step" in printed
    assert "VICReg: the guard found no collapse." in printed
    assert f"tensorboard --logdir {tmp_path / 'demo'}" in printed
    assert (tmp_path / "demo" / "collapse.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "demo").rglob("events.out.tfevents.*"))) == 2


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_demo_without_its_extra_says_what_to_install(missing, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"needs `{missing}`.*pip install 'lightning-collapse\[examples\]'"):
        main(["demo", "--out", str(tmp_path), "--steps", "1"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_ends_with_what_was_seen(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(path.parent)  # as of a script
    if "from transformers" in path.read_text(encoding="utf-8"):
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    if "--quick" in path.read_text(encoding="utf-8"):
        monkeypatch.setattr(sys, "argv", [str(path), "--quick"])
        runpy.run_path(str(path), run_name="__main__")
    else:
        runpy.run_path(str(path))["main"](steps=60)
    [*_, last] = capsys.readouterr().out.strip().splitlines()
    assert re.match(r"After \d+ steps", last)
