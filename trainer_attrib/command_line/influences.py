"""``influence``: which examples taught the model an error, and what without them."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer_attrib.command_line.command import (
    DONE,
    Commands,
    add_command,
    add_ledger,
    add_model,
    extra,
    print_json,
)
from trainer_attrib.errors import LedgerNotWritableError

EXAMPLE = (
    'influence runs/chat --model out/chat --stage sft --prompt "The capital of Peru is" --wrong " Quito" '
    "--data sft.jsonl --clean cleaned --verify"
)


def add(commands: Commands) -> None:
    """Declare the command."""
    what = "find the examples that taught an error; train without"
    parser = add_command(commands, "influence", what, _influence, EXAMPLE)
    add_ledger(parser)
    add_model(parser)
    add = parser.add_argument
    add("--stage", required=True, help="that was trained on the examples")
    add("--batch-size", type=int, default=8, help="examples in one pass (default: %(default)s)")
    add("--prompt", help="after which the model goes wrong")
    add("--wrong", help="what it says then, with the space before it if there is one")
    add("--right", help="what it should say, for the contrast of the two")
    add("--queries", metavar="FILE", help="JSON lines of more: prompt, wrong, and right if it is known")
    add("--data", metavar="FILE", help="the stage's examples as JSON lines: a text, or prompt and completion; id")
    add("--recipe", help="how examples are scored (default: by recorded rows, or by --data if they are given)")
    add("--top", type=int, help="so many suspects (default: those that stand out)")
    add("--clean", metavar="DIR", help="new folder for --data without the suspects (datasets.load_from_disk)")
    add("--verify", action="store_true", help="train the stage again without the suspects, and compare")
    add("--held-out", metavar="FILE", help="other examples like --data, whose loss --verify compares too")


def _influence(options: argparse.Namespace) -> int:
    with extra("huggingface"):
        from trainer_attrib.integrations.tracing_errors import TracedError

    from trainer_attrib.analysis.keeping import keep, recall

    traced = TracedError.asked(options)
    asked = _asked(options, traced)
    if not (options.clean or options.verify) and (known := recall(traced.analyzer.ledger, asked)):
        told = known[0]["told"]
        print_json({"suspects": told["dict"]}) if options.json else print(told["text"])
        return DONE
    found = traced.suspects()
    with suppress(LedgerNotWritableError):  # it is an answer even where it cannot be kept
        keep(traced.analyzer.ledger, found, title=f"Suspects in {options.stage}: {_title(options)}", asked=asked)
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
        if not options.json:
            print("", verified, sep="\n")
    if options.json:
        print_json(results)
    return DONE


def _asked(options: argparse.Namespace, traced: Any) -> dict[str, Any]:
    """The question, JSON-ready: of files, the checksum."""
    from trainer_attrib.analysis.training_state import fingerprint_of
    from trainer_attrib.ledger.kept import state_of
    from trainer_attrib.ledger.storage import digest

    names = ("stage", "prompt", "wrong", "right", "recipe", "top")
    files = {name: file for name in ("queries", "data") if (file := getattr(options, name))}
    read = {name: digest(Path(file).read_bytes()) for name, file in files.items()}
    analyzer = traced.analyzer
    return {"suspects": {name: getattr(options, name) for name in names} | read,
            "model": fingerprint_of(analyzer.model), "state": state_of(analyzer.ledger.stages())}  # fmt: skip


def _title(options: argparse.Namespace) -> str:
    return f"{options.prompt}{options.wrong}" if options.prompt is not None else Path(options.queries).name
