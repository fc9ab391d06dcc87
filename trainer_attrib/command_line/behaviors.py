"""Options of commands that ask about behaviors; ``integrations/.../given_behaviors.py`` reads them."""

from __future__ import annotations

import argparse


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
