"""``demo``: something to look at."""

from __future__ import annotations

import argparse

from trainer_attrib.command_line.command import DONE, Commands, add_command, extra, print_json


def add(commands: Commands) -> None:
    """Declare the command."""
    what = "train a small model in three recorded stages and ask"
    demo = add_command(commands, "demo", what, _demo, "demo --out demo-run")
    demo.add_argument(
        "--out", default="demo-run", metavar="DIR", help="new directory for ledger and report (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the data and the initial weights (default: %(default)s)")


def _demo(options: argparse.Namespace) -> int:
    with extra("demo"):
        from trainer_attrib.integrations.demo import run_demo

    result = run_demo(options.out, seed=options.seed, say=_quiet if options.json else print)
    if options.json:
        print_json(result)
    return DONE


def _quiet(*text: object) -> None:
    """Swallow progress messages where standard output carries JSON."""
