"""``inspect``, ``verify`` and ``sketch``: what is in a ledger, whether it is sound, more rows for it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from trainer_attrib.command_line.command import (
    DONE,
    PROBLEMS,
    Commands,
    add_command,
    add_ledger,
    add_model,
    extra,
    print_json,
)


def add(commands: Commands) -> None:
    """Declare the commands."""
    what = "print the tree of stages with steps, examples and sizes"
    add_ledger(add_command(commands, "inspect", what, _inspect, "inspect runs/chat"))
    what = "check every sealed file against its length and checksum"
    add_ledger(add_command(commands, "verify", what, _verify, "verify runs/chat"))
    example = "sketch runs/chat --model out/chat --stage sft --data texts.jsonl"
    what = "store rows of given examples at recorded snapshots"
    sketch = add_command(commands, "sketch", what, _sketch, example)
    add_ledger(sketch)
    add_model(sketch)
    sketch.add_argument("--stage", required=True, help="that was trained on the examples")
    sketch.add_argument("--batch-size", type=int, default=8, help="examples in one pass (default: %(default)s)")
    sketch.add_argument(
        "--data", required=True, metavar="FILE", help="JSON lines: a text, or a prompt and a completion; id, source"
    )
    sketch.add_argument("--snapshots", nargs="+", default=["end"], help="names of recorded states (default: end)")


def _inspect(options: argparse.Namespace) -> int:
    from trainer_attrib.ledger.overview import overview, tree_lines
    from trainer_attrib.ledger.reader import Ledger

    found = overview(Ledger(options.ledger))
    print_json(found) if options.json else print("\n".join(tree_lines(found)))
    return DONE


def _verify(options: argparse.Namespace) -> int:
    from trainer_attrib.ledger.reader import Ledger

    stages = Ledger(options.ledger).stages()
    problems = [problem for stage in stages for problem in stage.problems()]
    if options.json:
        print_json({"stages": [stage.name for stage in stages], "problems": problems})
    else:
        print("\n".join(problems) or f"{options.ledger}: {len(stages)} stages, every sealed file is sound")
    return PROBLEMS if problems else DONE


def _sketch(options: argparse.Namespace) -> int:
    with extra("huggingface"):
        from trainer_attrib.integrations.given_data import load_model, read_examples
    from trainer_attrib.analysis.analyzer import Analyzer

    model, tokenizer = load_model(options.model)
    data = {options.stage: read_examples(options.data, tokenizer, options.batch_size)}
    made = Analyzer(options.ledger, model).sketch(data, options.snapshots)
    if options.json:
        print_json([asdict(one) for one in made])
    for one in () if options.json else made:
        print(f"{one.stage} at {one.snapshot}: rows of {one.examples:,} examples, {one.bytes_per_example:,} bytes each")
    return DONE
