"""``effects``: which stage made the model say this?"""

from __future__ import annotations

import argparse
from contextlib import suppress

from trainer_attrib.command_line.behaviors import add_behaviors, asked_behaviors, title_of
from trainer_attrib.command_line.command import (
    DONE,
    Commands,
    add_command,
    add_ledger,
    add_model,
    extra,
    print_json,
)
from trainer_attrib.errors import LedgerNotWritableError, MissingProgramError

METHODS = ("auto", "change", "subtract", "first_order", "shadow", "propagate", "replay", "retrain")
"""In the order of the help; a test holds them against those of the analyzer."""
NEED_PROGRAMS = ("propagate", "replay", "retrain")
EXAMPLE = (
    'effects runs/chat --model out/chat --prompt "The capital of Peru is" --completion " Lima" --alternative " Quito"'
)


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "effects", "what each stage did to behaviors of the model", _effects, EXAMPLE)
    add_ledger(parser)
    add_model(parser)
    add_behaviors(parser)
    parser.add_argument(
        "--method", nargs="+", choices=METHODS, default=["auto"], metavar="METHOD",
        help=f"one or several of {', '.join(METHODS)} (default: auto); {', '.join(NEED_PROGRAMS)} run later stages "
        "again, which takes your training code and therefore Python (docs/stage-effects.md)",
    )  # fmt: skip
    parser.add_argument("--report", metavar="FILE", help="write an HTML page, too")


def _effects(options: argparse.Namespace) -> int:
    with extra("huggingface"):
        from trainer_attrib.integrations.given_behaviors import given_behaviors
        from trainer_attrib.integrations.given_data import load_model
    from trainer_attrib.analysis.analyzer import Analyzer
    from trainer_attrib.analysis.keeping import keep, recall
    from trainer_attrib.analysis.results import StageEffects
    from trainer_attrib.analysis.training_state import fingerprint_of
    from trainer_attrib.ledger.kept import state_of

    model, tokenizer = load_model(options.model)
    behaviors = given_behaviors(options, tokenizer)
    analyzer = Analyzer(options.ledger, model)
    asked = {"effects": asked_behaviors(options), "methods": options.method, "model": fingerprint_of(model),
             "state": state_of(analyzer.ledger.stages())}  # fmt: skip
    if known := recall(analyzer.ledger, asked):
        found = StageEffects.of_shown(known[0])
    else:
        try:
            found = analyzer.stage_effects(behaviors, options.method)
        except MissingProgramError:
            raise _without_programs(options) from None
        with suppress(LedgerNotWritableError):  # it is an answer even where it cannot be kept
            keep(analyzer.ledger, found, title=f"Effects of stages: {title_of(options)}", asked=asked)
    print_json(found.to_dict()) if options.json else print(found)
    if options.report:
        page = analyzer.report(options.report, found)
        if not options.json:
            print(f"\n{page}: the same as a page")
    return DONE


def _without_programs(options: argparse.Namespace) -> MissingProgramError:
    asked = [method for method in options.method if method in NEED_PROGRAMS]
    return MissingProgramError(
        f"Method {' and '.join(asked)} runs later stages again.",
        cause="a ledger records what training did, not the code and data that did it.",
        fix=f"use {', '.join(method for method in METHODS if method not in NEED_PROGRAMS)} here; or in Python "
        f"Analyzer({options.ledger!r}, model).stage_effects(behaviors, {asked[0]!r}, programs={{stage: lambda model: "
        "trainer}) (docs/stage-effects.md).",
    )
