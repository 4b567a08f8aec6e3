"""Command-line interface: ``python -m lightning_collapse``."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

_TABLES = {
    "measures": "measure and curve: what it reads, its range, what collapsed looks like, source",
    "monitors": "monitor: what it is for, and its curves",
    "rules": "verdict of the guard: what it says, reads and advises, source",
    "losses": "anti-collapse loss: views, terms, what it reads at both ends, source",
    "penalties": "penalty against forgetting: what it remembers, source",
    "layers": "layer that modules are converted into: which, against what, cost, source",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands; ``--help`` lists them.

    Args:
        arguments: What stands behind the program's name; from the command line if left out.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_collapse", description="See and stop representation collapse in PyTorch Lightning."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in _TABLES.items():
        command = commands.add_parser(name, help=f"list every {what}")
        command.add_argument("--markdown", action="store_true", help="print a Markdown table")
        command.add_argument("--width", type=int, default=None, help="characters per line; the terminal's by default")
    demo = commands.add_parser(
        "demo", help="train an encoder twice on real images, once so that it collapses, and show what is seen"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for events and picture (%(default)s)")
    demo.add_argument("--steps", type=int, default=200, help="optimizer steps of each training (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of both trainings (%(default)s)")
    page = commands.add_parser("report", help="make one HTML file that shows the runs in TensorBoard event files")
    page.add_argument("logdir", type=Path, help="folder with event files, as for tensorboard --logdir")
    page.add_argument("--out", type=Path, default=Path("collapse.html"), help="the page (%(default)s)")
    page.add_argument("--open", action="store_true", help="show the page in the browser")
    chosen = parser.parse_args(arguments)
    if chosen.command in _TABLES:
        _print_table(chosen.command, chosen.markdown, chosen.width)
    elif chosen.command == "report":
        from lightning_collapse.reporting import report

        try:
            written = report(chosen.logdir, chosen.out)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        print(f"Page: {written}")
        if chosen.open and not webbrowser.open(written.resolve().as_uri()):
            print("There is no browser to open it with.")
    else:
        _demo(chosen.out, chosen.steps, chosen.seed)


def _print_table(name: str, markdown: bool, width: int | None) -> None:
    import lightning_collapse.callbacks  # noqa: F401  registers the monitors
    from lightning_collapse.reporting import TABLES

    table = TABLES[name]()
    try:
        print(table.markdown() if markdown else table.text(width), flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _demo(out: Path, steps: int, seed: int) -> None:
    from lightning_collapse.demo import run_demo, summary

    print("Training twice on real digits, about a minute in all ...", flush=True)
    try:
        runs = run_demo(out, steps, seed)
    except ModuleNotFoundError as error:
        raise SystemExit(str(error)) from error
    print(f"\n{summary(runs)}\n\nPicture: {out / 'collapse.png'}")
    print(f"Curves:  tensorboard --logdir {out}   (then open the address that it prints)")


if __name__ == "__main__":
    main()
