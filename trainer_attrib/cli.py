"""The command line: ``trainer-attrib demo | inspect | sketch | verify``.

Exit codes: 0 done, 1 the ledger has problems (``verify``), 2 wrong use or an error this library raises on purpose.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trainer_attrib.errors import MissingExtraError, TrainerAttribError
from trainer_attrib.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors of this library are printed without a traceback unless ``--debug``."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return options.run(options)
    except TrainerAttribError as error:
        if options.debug:
            raise
        print(f"trainer-attrib {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer-attrib", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = _command(commands, "demo", "train a small model in three recorded stages and account for it", _demo)
    demo.add_argument(
        "--out", default="demo-run", help="new directory for the ledger and the report (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the data and the initial weights (default: %(default)s)")
    inspect = _command(commands, "inspect", "print the tree of stages with steps, examples and sizes", _inspect)
    verify = _command(commands, "verify", "check every sealed file against its length and checksum", _verify)
    sketch = _command(commands, "sketch", "rows of given examples at recorded snapshots, stored in the ledger", _sketch)
    for command in (inspect, verify, sketch):
        command.add_argument("ledger", help="directory or URL given to the callback")
    sketch.add_argument("--model", required=True, help="folder of the trained model and its tokenizer")
    sketch.add_argument("--stage", required=True, help="that was trained on the examples")
    sketch.add_argument("--data", required=True, help="JSON lines: a text, or a prompt and a completion; id, source")
    sketch.add_argument("--snapshots", nargs="+", default=["end"], help="names of recorded states (default: end)")
    sketch.add_argument("--batch-size", type=int, default=8, help="examples in one pass (default: %(default)s)")
    return parser


def _command(commands: Any, name: str, what: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what)
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run)
    return parser


def _demo(options: argparse.Namespace) -> int:
    try:
        from trainer_attrib.integrations.demo import run_demo
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError(error.name or str(error), "demo") from None
    result = run_demo(options.out, seed=options.seed, say=_quiet if options.json else print)
    if options.json:
        print(json.dumps(result, indent=1))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from trainer_attrib.ledger.overview import overview, tree_lines
    from trainer_attrib.ledger.reader import Ledger

    found = overview(Ledger(options.ledger))
    print(json.dumps(found, indent=1) if options.json else "\n".join(tree_lines(found)))
    return 0


def _sketch(options: argparse.Namespace) -> int:
    try:
        from trainer_attrib.integrations.given_data import load_model, read_examples
    except ImportError as error:
        raise MissingExtraError(error.name or str(error), "huggingface") from None
    from trainer_attrib.analysis.analyzer import Analyzer

    model, tokenizer = load_model(options.model)
    data = {options.stage: read_examples(options.data, tokenizer, options.batch_size)}
    made = Analyzer(options.ledger, model).sketch(data, options.snapshots)
    if options.json:
        print(json.dumps([asdict(one) for one in made], indent=1))
    for one in () if options.json else made:
        print(f"{one.stage} at {one.snapshot}: rows of {one.examples:,} examples, {one.bytes_per_example:,} bytes each")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from trainer_attrib.ledger.reader import Ledger

    stages = Ledger(options.ledger).stages()
    problems = [problem for stage in stages for problem in stage.problems()]
    if options.json:
        print(json.dumps({"stages": [stage.name for stage in stages], "problems": problems}, indent=1))
    else:
        print("\n".join(problems) or f"{options.ledger}: {len(stages)} stages, every sealed file is sound")
    return 1 if problems else 0


def _quiet(*text: object) -> None:
    """Swallow progress messages where standard output carries JSON."""


if __name__ == "__main__":
    sys.exit(main())
