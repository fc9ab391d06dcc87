"""An error of a model on the command line: its suspects, the data without them, the stage trained without them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_attrib.analysis.analyzer import Analyzer
from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.suspects import Suspects
from trainer_attrib.analysis.verification import Removed, Verification, loss_of
from trainer_attrib.errors import ConfigurationError
from trainer_attrib_integrations.given_data import WrongAnswer, load_model, read_examples, read_queries, read_rows

CONTRAST, WRONG = "prefers the wrong answer", "says the wrong answer"


@dataclass(frozen=True)
class TracedError:
    """A model, where it was recorded, and wrong answers of it.

    Args:
        analyzer: of the model.
        stage: that may have taught them.
        errors: behaviors that increase with the error.
        data: the stage's examples, if they are given.
        rows: the same as they are in their file.
        others: behaviors that are to stay.
        options: of the command.
    """

    analyzer: Analyzer
    stage: str
    errors: Sequence[Behavior]
    data: Examples | None
    rows: Sequence[dict[str, Any]]
    others: Sequence[Behavior]
    options: argparse.Namespace

    @staticmethod
    def asked(options: argparse.Namespace) -> TracedError:
        """Read what the command's options name.

        Raises:
            ConfigurationError: no query, options that need ``--data`` without it, a folder that exists, or files that
                do not hold what they should.
        """
        answers = _answers(options)
        for option in ("clean", "verify"):
            if getattr(options, option) and not options.data:
                raise ConfigurationError(f"--{option} needs the stage's examples.", fix="pass them as --data FILE.")
        if options.clean:
            from trainer_attrib_integrations.cleaned_data import refuse_existing

            refuse_existing(options.clean)  # now, not after the scoring
        model, tokenizer = load_model(options.model)
        data, held_out = (
            read_examples(file, tokenizer, options.batch_size) if file else None
            for file in (options.data, options.held_out)
        )
        others = [loss_of("loss of the held-out examples", held_out)] if held_out else []
        rows = read_rows(options.data) if options.data else []
        analyzer = Analyzer(options.ledger, model)
        errors = errors_of(analyzer, options.stage, answers, tokenizer)
        return TracedError(analyzer, options.stage, errors, data, rows, others, options)

    def suspects(self) -> Suspects:
        """Of the stage."""
        data = {self.stage: self.data} if self.data else None
        return self.analyzer.suspects(self.errors, [self.stage], self.options.recipe, data=data, k=self.options.top)

    def clean(self, found: Suspects) -> Path:
        """Write the data without the suspects; returns the folder."""
        return found.write_cleaned(self.options.clean, list(self.rows))

    def verify(self, found: Suspects) -> Verification:
        """Train the stage again without the suspects."""
        assert self.data is not None
        return self.analyzer.verify_removal(self.stage, Removed(found, self.data, self.errors, self.others))


def errors_of(analyzer: Analyzer, stage: str, answers: Sequence[WrongAnswer], tokenizer: Any) -> list[Behavior]:
    """Behaviors that increase with the error: the wrong minus the right answer where that is known, else the tokens of
    the wrong answer that the stage made likelier."""
    both = [answer for answer in answers if answer.right is not None]
    alone = [answer for answer in answers if answer.right is None]
    found = []
    for name, some in ((CONTRAST, both), (WRONG, alone)):
        if some:
            prompts, wrongs = [answer.prompt for answer in some], [answer.wrong for answer in some]
            rights = [answer.right or "" for answer in both] if some is both else ()
            found.append(analyzer.error_behavior(name, prompts, wrongs, rights, tokenizer=tokenizer, stage=stage))
    return found


def _answers(options: argparse.Namespace) -> list[WrongAnswer]:
    if (options.prompt is None) != (options.wrong is None) or (options.right is not None and options.wrong is None):
        raise ConfigurationError(
            "--prompt and --wrong belong together.",
            fix='--prompt "The capital of Peru is" --wrong " Quito" --right " Lima"',
        )
    found = [] if options.prompt is None else [WrongAnswer(options.prompt, options.wrong, options.right)]
    found += read_queries(options.queries) if options.queries else []
    if not found:
        raise ConfigurationError("No wrong answer was given.", fix="pass --prompt and --wrong, or --queries FILE.")
    return found
