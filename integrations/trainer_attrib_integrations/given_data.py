"""Models and examples as the command line is given them: a folder of transformers, and a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer_attrib.analysis.examples import Examples
from trainer_attrib.errors import ConfigurationError

_KEYS = 'a "text", or a "prompt" and a "completion"; "id" and "source" if there are'


def load_model(folder: str) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer from a folder that ``save_pretrained`` wrote, in its own precision.
    Nothing is downloaded, no code of the folder is run.

    Raises:
        ConfigurationError: it is not such a folder.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
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
    rows = list(_lines(Path(file)))
    pairs = ["completion" in row for _, row in rows]
    if not rows or any(pairs) != all(pairs):
        raise ConfigurationError(
            f"{file} holds {len(rows)} examples, {sum(pairs)} of them with a completion.", fix=f"give each {_KEYS}."
        )
    about: dict[str, Any] = {
        "ids": [str(row.get("id", number)) for number, row in rows],
        "sources": [row.get("source") for _, row in rows],
        "batch_size": batch_size,
    }
    if all(pairs):
        prompts, completions = ([row[key] for _, row in rows] for key in ("prompt", "completion"))
        return Examples.of_pairs(prompts, completions, tokenizer, **about)
    return Examples.of_texts([row["text"] for _, row in rows], tokenizer, **about)


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigurationError(f"Cannot read {file}: {error.strerror}.", fix="pass a file of JSON lines.") from None
    for number, line in enumerate(line for line in lines if line.strip()):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        wanted = ("text",) if not isinstance(row, dict) or "completion" not in row else ("prompt", "completion")
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in wanted):
            raise ConfigurationError(
                f"Line {number + 1} of {file} is not an example: {line[:60]!r}.", fix=f"give each line {_KEYS}."
            )
        yield number, row
