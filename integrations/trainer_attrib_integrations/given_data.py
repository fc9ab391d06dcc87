"""Models and examples as the command line is given them: a folder of transformers, and a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer_attrib.analysis.examples import Examples
from trainer_attrib.errors import ConfigurationError

_KEYS = 'a "text", or a "prompt" and a "completion"; "id" and "source" if there are'
_QUERY_KEYS = 'a "prompt" and a "wrong" answer; a "right" one if it is known'


@dataclass(frozen=True)
class WrongAnswer:
    """What the model says after a prompt, and what it should say, if that is known."""

    prompt: str
    wrong: str
    right: str | None = None


def load_model(folder: str, dtype: str = "auto") -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer from a folder that ``save_pretrained`` wrote. Nothing is downloaded, no
    code of the folder is run.

    Args:
        folder: of both.
        dtype: of the weights; their own by default.

    Raises:
        ConfigurationError: it is not such a folder.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"No causal language model with its tokenizer in '{folder}': {str(error).splitlines()[0]}",
            cause="the folder is another one, or holds an adapter or the model without its tokenizer.",
            fix="save both there by save_pretrained, or make the pass in Python by analyzer.sketch.",
        ) from error


def read_examples(file: str, tokenizer: Any, batch_size: int) -> Examples:
    """The examples of a file, one JSON object a line.

    Raises:
        ConfigurationError: there is no such file, a line is not such an object, or there are both texts and pairs.
    """
    rows = list(_examples(Path(file)))
    pairs = ["completion" in row for _, row in rows]
    if not rows or any(pairs) != all(pairs):
        raise ConfigurationError(
            f"{file} holds {len(rows)} examples, {sum(pairs)} of them with a completion.", fix=f"give each {_KEYS}."
        )
    about: dict[str, Any] = {
        "ids": [str(number if row.get("id") is None else row["id"]) for number, row in rows],
        "sources": [row.get("source") for _, row in rows],
        "batch_size": batch_size,
    }
    if all(pairs):
        prompts, completions = ([row[key] for _, row in rows] for key in ("prompt", "completion"))
        return Examples.of_pairs(prompts, completions, tokenizer, **about)
    return Examples.of_texts([row["text"] for _, row in rows], tokenizer, **about)


def read_rows(file: str) -> list[dict[str, Any]]:
    """The same lines as they are. A row without an id is named by its number, as :func:`read_examples` names it.

    Raises:
        ConfigurationError: there is no such file, or a line is not such an object.
    """
    return [row for _, row in _examples(Path(file))]


def read_queries(file: str) -> list[WrongAnswer]:
    """Wrong answers from a file, one JSON object a line.

    Raises:
        ConfigurationError: there is no such file, it is empty, or a line is not such an object.
    """

    def holds(row: dict[str, Any]) -> bool:
        return all(isinstance(row.get(key), str) for key in ("prompt", "wrong")) and isinstance(
            row.get("right"), str | None
        )

    rows = read_objects(file, "query", _QUERY_KEYS, holds)
    return [WrongAnswer(row["prompt"], row["wrong"], row.get("right")) for row in rows]


def read_objects(file: str, what: str, keys: str, holds: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Objects from a file, one a line.

    Args:
        file: of JSON lines.
        what: each is, in the singular.
        keys: that each has, as an error says it.
        holds: whether one has them.

    Raises:
        ConfigurationError: there is no such file, it is empty, or a line is not such an object.
    """
    found = []
    for number, line, row in _lines(Path(file)):
        if not isinstance(row, dict) or not holds(row):
            article = "an" if what[0] in "aeiou" else "a"
            raise ConfigurationError(
                f"Line {number + 1} of {file} is not {article} {what}: {line[:60]!r}.", fix=f"give each line {keys}."
            )
        found.append(row)
    if not found:
        plural = "queries" if what == "query" else f"{what}s"
        raise ConfigurationError(f"{file} holds no {plural}.", fix=f"give each line {keys}.")
    return found


def is_text_or_chat(value: Any) -> bool:
    """Whether it is a text, or the messages of a conversation: a role and a content each."""
    if not isinstance(value, list):
        return isinstance(value, str)
    keys = ("role", "content")
    return bool(value) and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in keys) for m in value)


def _examples(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line, row in _lines(file):
        wanted = ("text",) if not isinstance(row, dict) or "completion" not in row else ("prompt", "completion")
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in wanted):
            raise ConfigurationError(
                f"Line {number + 1} of {file} is not an example: {line[:60]!r}.", fix=f"give each line {_KEYS}."
            )
        yield number, row


def _lines(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Number, line, and what it holds, None where that is not JSON; empty lines do not count."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # other line ends may stand inside a JSON string
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigurationError(f"Cannot read {file}: {why}.", fix="pass a file of JSON lines in UTF-8.") from None
    for number, line in enumerate(line for line in lines if line.strip()):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield number, line, row
