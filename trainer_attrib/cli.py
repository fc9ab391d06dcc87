"""The command line: record in Python, ask here. Every command answers ``--help`` and ``--json``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from trainer_attrib.command_line import completion, effects, exploring, forecasts, influences, ledgers, showing
from trainer_attrib.command_line.command import DONE, EXIT_CODES, INTERRUPTED, WRONG, Help
from trainer_attrib.errors import TrainerAttribError
from trainer_attrib.version import __version__

GROUPS = (showing, ledgers, effects, influences, forecasts, exploring, completion)
"""Modules of commands, in the order of the help."""
DESCRIPTION = "Which stage made the model behave like this, and which training examples made it say that?"
EPILOG = f"""first:
  trainer-attrib demo                 # trains a small model in three recorded stages, then asks
  trainer-attrib inspect demo-run/ledger

of a command: trainer-attrib COMMAND --help
{EXIT_CODES}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. Errors are printed without a traceback unless ``--debug``.

    Raises:
        SystemExit: ``--help``, ``--version``, or options that do not exist.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return WRONG
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output had enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return _told(options, "interrupted", INTERRUPTED)
    except Exception as error:
        if options.debug:
            raise
        return _told(options, _message(error), WRONG)


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="trainer-attrib", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=Help,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for group in GROUPS:
        group.add(commands)
    return parser


def _message(error: Exception) -> str:
    """What is said instead of a traceback."""
    if isinstance(error, TrainerAttribError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}.\nNext step: check the name and who may read or write it."
    said = str(error) or "without a message"
    return f"{type(error).__name__}: {said}\nNext step: run it again with --debug to see where."


def _told(options: argparse.Namespace, message: str, code: int) -> int:
    print(f"trainer-attrib {options.command}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
