"""What all commands share: how one is declared, how it answers, with which code it ends."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trainer_attrib.errors import MissingExtraError

DONE, PROBLEMS, WRONG, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = "exit codes: 0 done, 1 problems were found (verify), 2 wrong use or an error, 130 interrupted"
Commands = Any
"""What ``argparse`` returns from ``add_subparsers``: a class that it does not name."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps examples as they are written, and gives names of commands and options a wide column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)
        self._action_max_length = 14  # argparse forgets that commands are indented

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        """What kind of value follows, instead of the option's name once more."""
        return "N" if action.type is int else "X" if action.type is float else "TEXT"


def add_command(
    commands: Commands, name: str, what: str, run: Callable[[argparse.Namespace], int], example: str
) -> argparse.ArgumentParser:
    """Declare a command with the options that all have.

    Args:
        commands: of the parser.
        name: as it is typed.
        what: it does, in a line.
        run: answers; returns an exit code.
        example: what one types, without the program's name.
    """
    parser = commands.add_parser(
        name, help=what, description=what, epilog=f"example:\n  trainer-attrib {example}\n\n{EXIT_CODES}",
        formatter_class=Help,
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run)
    return parser


def add_ledger(parser: argparse.ArgumentParser) -> None:
    """The ledger as an argument."""
    parser.add_argument("ledger", help="directory or URL given to the callback")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model as an option."""
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the model and its tokenizer")


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of what an optional extra brings.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        yield
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError(error.name or str(error), name) from None


def print_json(answer: Any) -> None:
    """JSON that every parser reads: numbers that it has no words for (NaN, infinity) are null."""
    from trainer_attrib.ledger.storage import json_ready

    print(json.dumps(json_ready(answer), indent=1, allow_nan=False))
