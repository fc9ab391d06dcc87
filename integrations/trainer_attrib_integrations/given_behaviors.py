"""Behaviors as the command line is given them: completions after prompts, and rates of what the model says itself."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.rates import Generations, Prompt
from trainer_attrib.errors import ConfigurationError
from trainer_attrib_integrations.given_data import is_text_or_chat, read_objects

SAYS, PREFERS = "says the completion", "prefers the completion"
_QUERY = 'a "prompt" and a "completion"; an "alternative" to it and the name of a "behavior" if there are'
_PROMPT = 'a "prompt": a text, or the messages of a conversation'


@dataclass(frozen=True)
class Query:
    """A completion whose log-probability after a prompt is the behavior; minus that of the alternative, if any."""

    prompt: str
    completion: str
    alternative: str | None = None
    behavior: str | None = None

    @property
    def name(self) -> str:
        """Of the behavior that it belongs to."""
        return self.behavior or (SAYS if self.alternative is None else PREFERS)


def given_behaviors(options: argparse.Namespace, tokenizer: Any) -> list[Behavior]:
    """Read what the command's options name.

    Raises:
        ConfigurationError: nothing is asked, options that belong together are apart, or files or patterns that do not
            hold what they should.
    """
    queries = _queries(options)
    rates = [_rate(given) for given in options.rate or ()]
    if bool(rates) != bool(options.prompts):
        raise ConfigurationError(
            "--rate and --prompts belong together.", fix="--rate 'flattery=(?i)great question' --prompts prompts.jsonl"
        )
    if not queries and not rates:
        raise ConfigurationError(
            "No behavior was given.",
            fix="pass --prompt and --completion, --queries FILE, or --rate NAME=REGEX with --prompts FILE.",
        )
    found = [_behavior(name, queries, tokenizer) for name in dict.fromkeys(query.name for query in queries)]
    if rates:
        said = Generations(
            read_prompts(options.prompts), tokenizer, per_prompt=options.samples, max_new_tokens=options.max_new_tokens
        )
        found += [Behavior.rate(name, said, pattern) for name, pattern in rates]
    names = [behavior.name for behavior in found]
    if len({*names}) < len(names):
        raise ConfigurationError(f"Behaviors {names}.", fix="give each --rate a name of its own.")
    return found


def read_text_queries(file: str) -> list[Query]:
    """Queries from a file, one JSON object a line.

    Raises:
        ConfigurationError: there is no such file, it is empty, or a line is not such an object.
    """

    def holds(row: dict[str, Any]) -> bool:
        optional = all(isinstance(row.get(key), str | None) for key in ("alternative", "behavior"))
        return optional and all(isinstance(row.get(key), str) for key in ("prompt", "completion"))

    return [
        Query(row["prompt"], row["completion"], row.get("alternative"), row.get("behavior"))
        for row in read_objects(file, "query", _QUERY, holds)
    ]


def read_prompts(file: str) -> list[Prompt]:
    """Prompts from a file, one JSON object a line.

    Raises:
        ConfigurationError: there is no such file, it is empty, or a line is not such an object.
    """
    rows = read_objects(file, "prompt", _PROMPT, lambda row: is_text_or_chat(row.get("prompt")))
    return [row["prompt"] for row in rows]


def _queries(options: argparse.Namespace) -> list[Query]:
    if (options.prompt is None) != (options.completion is None) or (options.alternative and options.prompt is None):
        raise ConfigurationError(
            "--prompt and --completion belong together.",
            fix='--prompt "The capital of Peru is" --completion " Lima" --alternative " Quito"',
        )
    asked = [] if options.prompt is None else [Query(options.prompt, options.completion, options.alternative)]
    return asked + (read_text_queries(options.queries) if options.queries else [])


def _behavior(name: str, queries: Sequence[Query], tokenizer: Any) -> Behavior:
    own = [query for query in queries if query.name == name]
    prompts, completions = [query.prompt for query in own], [query.completion for query in own]
    alternatives = [query.alternative for query in own if query.alternative is not None]
    if not alternatives:
        return Behavior.completion(name, prompts, completions, tokenizer)
    if len(alternatives) < len(own):
        raise ConfigurationError(
            f"{len(alternatives)} of the {len(own)} queries of behavior '{name}' have an alternative.",
            cause="log-probabilities and differences of two of them are not on one scale.",
            fix="give all of them one, or those without it another name of the behavior.",
        )
    return Behavior.contrast(name, prompts, completions, alternatives, tokenizer)


def _rate(given: str) -> tuple[str, str]:
    name, equals, pattern = given.partition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigurationError(f"'{pattern}' is not a regular expression: {error}.", fix="correct it.") from None
    if not name or not equals or not pattern:
        raise ConfigurationError(f"'{given}' is not NAME=REGEX.", fix="--rate 'flattery=(?i)great question'")
    return name, pattern
