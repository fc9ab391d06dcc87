"""Options of commands that ask about behaviors; ``integrations/.../given_behaviors.py`` reads them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_behaviors(parser: argparse.ArgumentParser) -> None:
    """What the model says: given completions, or patterns in its own ones."""
    add = parser.add_argument_group("behaviors, by completions or by rates").add_argument
    add("--prompt", help="after which something is said")
    add("--completion", help="what is said, with the space before it if there is one")
    add("--alternative", help="what could be said instead, for the contrast of the two")
    add("--queries", metavar="FILE", help="JSON lines of more: prompt, completion; alternative, behavior (its name)")
    add("--rate", metavar="NAME=REGEX", action="append", help="share of sampled completions that match; repeatable")
    add("--prompts", metavar="FILE", help="JSON lines for --rate: prompt, a text or the messages of a conversation")
    add("--samples", type=int, default=4, help="completions of each prompt (default: %(default)s)")
    add("--max-new-tokens", type=int, default=32, help="of each completion (default: %(default)s)")


def asked_behaviors(options: argparse.Namespace) -> dict[str, Any]:
    """What is asked, JSON-ready: of files, the checksum."""
    from trainer_attrib.ledger.storage import digest

    names = ("prompt", "completion", "alternative", "rate", "samples", "max_new_tokens")
    files = {
        name: digest(Path(file).read_bytes()) for name in ("queries", "prompts") if (file := getattr(options, name))
    }
    return {name: getattr(options, name) for name in names} | files


def title_of(options: argparse.Namespace) -> str:
    """What is asked, for people."""
    if options.prompt is not None:
        other = f" rather than{options.alternative}" if options.alternative else ""
        return f"{options.prompt}{options.completion or ''}{other}"
    return ", ".join([*([Path(options.queries).name] if options.queries else []), *(options.rate or [])])
