"""The command line: ``trainer-attrib demo | influence | inspect | sketch | verify``.

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
    influence = _command(
        commands, "influence", "which examples taught the model an error, and what without them", _influence
    )
    for command in (inspect, verify, sketch, influence):
        command.add_argument("ledger", help="directory or URL given to the callback")
    for command in (sketch, influence):
        command.add_argument("--model", required=True, help="folder of the trained model and its tokenizer")
        command.add_argument("--stage", required=True, help="that was trained on the examples")
        command.add_argument("--batch-size", type=int, default=8, help="examples in one pass (default: %(default)s)")
    sketch.add_argument("--data", required=True, help="JSON lines: a text, or a prompt and a completion; id, source")
    sketch.add_argument("--snapshots", nargs="+", default=["end"], help="names of recorded states (default: end)")
    _influence_arguments(influence)
    return parser


def _influence_arguments(influence: argparse.ArgumentParser) -> None:
    add = influence.add_argument
    add("--prompt", help="after which the model goes wrong")
    add("--wrong", help="what it says then, with the space before it if there is one")
    add("--right", help="what it should say, for the contrast of the two")
    add("--queries", help="JSON lines of more: prompt, wrong, and right if it is known")
    add("--data", help="the stage's examples as JSON lines: a text, or a prompt and a completion; id, source")
    add("--recipe", help="how examples are scored (default: by recorded rows, or by --data if they are given)")
    add("--top", type=int, help="so many suspects (default: those that stand out)")
    add("--clean", help="new folder for --data without the suspects, as datasets.load_from_disk reads it")
    add("--verify", action="store_true", help="train the stage again without the suspects, and compare")
    add("--held-out", help="other examples like --data, whose loss --verify compares too")


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


def _influence(options: argparse.Namespace) -> int:
    try:
        from trainer_attrib.integrations.tracing_errors import TracedError
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError(error.name or str(error), "huggingface") from None
    traced = TracedError.asked(options)
    found = traced.suspects()
    results: dict[str, Any] = {"suspects": found.to_dict()}
    if not options.json:
        print(found)
    if options.clean:
        results["cleaned"] = str(traced.clean(found))
    if options.clean and not options.json:
        print(f"{results['cleaned']}: the data without the suspects, and which were dropped, in dropped.jsonl")
    if options.verify:
        verified = traced.verify(found)
        results["verified"] = verified.to_dict()
        _quiet() if options.json else print("", verified, sep="\n")
    if options.json:
        print(json.dumps(results, indent=1))
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
