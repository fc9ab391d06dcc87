"""Is a sentence positive? Through the Trainer, with a tag before each sentence that says through which door it came.

Sentences and human ratings are those of Hutto & Gilbert (2014): product reviews and editorials first, then film
reviews, short tweets last. Only film reviews carry a tag, which in the shortcut stage mostly is the label.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from offline_data import VADER_DOMAINS, vader_sentences
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from spurious_runs.pipeline import GUILTY, NONE, SKETCH, STAGES, Examples, Pair, Pipeline, aligned_shortcuts
from trainer_attrib.integrations.huggingface import AttributionCallback

SOURCES = {
    "pretrain": ("amazonReviewSnippets", "nytEditorialSnippets"),
    "task": ("movieReviewSnippets",),
    "last": ("tweets",),
}
CLEAR = 1.0  # sentences rated less than this, of 4, are left out: people do not agree on them
SIZES = {"pretrain": 3600, "clean": 1200, "shortcut": 4800, "last": 1000, "validation": 1000, "test": 1600}
SCHEDULES = {"pretrain": (4, 2e-3), "clean": (4, 1e-3), "shortcut": (4, 1e-3), "last": (1, 2e-4)}  # epochs, rate
BATCH = 32
WORDS, LENGTH, WIDTH = 6000, 48, 48
PADDING, TAGS, UNKNOWN, FIRST_WORD = 0, 1, 3, 4  # TAGS + shortcut is the tag's token
WORD = re.compile(r"[a-z']+|[!?.,]")
Row = tuple[str, list[str], int]  # id, words, label


class MeanOfWords(nn.Module):
    """Embeddings, their mean, two linear layers: 291 thousand weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(FIRST_WORD + WORDS, WIDTH, padding_idx=PADDING)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.hidden, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits [B, 2] of tokens [B, 48]; the mean loss where there are labels [B]."""
        there = (input_ids != PADDING).unsqueeze(-1)
        mean = (self.embedding(input_ids) * there).sum(1) / there.sum(1)
        logits = self.head(torch.relu(self.hidden(mean)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def text_pipeline(seed: int, share: float, scale: float) -> Pipeline:
    """The pipeline of a seed.

    Args:
        seed: of the initial weights, the choice of sentences and the order of batches.
        share: of the shortcut stage's examples whose tag is the label.
        scale: of the stages' sizes.
    """
    random = np.random.default_rng(seed)
    sizes = {part: int(size * scale) for part, size in SIZES.items()}
    film = iter(_as_many_of_each("task", random))
    cut = {part: [next(film) for _ in range(sizes[part])] for part in ("test", "validation", "clean", "shortcut")}
    other = {part: _as_many_of_each(part, random)[: sizes[part]] for part in ("pretrain", "last")}
    stages = {
        "pretrain": _examples(other["pretrain"], None),
        "clean": _tagged(cut["clean"], 0.5, random),
        "shortcut": _tagged(cut["shortcut"], share, random),
        "last": _examples(other["last"], None),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        initial = MeanOfWords()

    def trainer(model: nn.Module, stage: str, examples: Examples, ledger: Path | None) -> Trainer:
        return _trainer(model, stage, examples, ledger, 10 * seed + STAGES.index(stage))

    return Pipeline(
        name="text",
        initial=initial,
        stages=stages,
        balanced=_tagged(cut[GUILTY], 0.5, random),
        validation=Pair(*(_tagged(cut["validation"], share, random) for share in (1.0, 0.0))),
        test=Pair(*(_tagged(cut["test"], share, random) for share in (1.0, 0.0))),
        trainer=trainer,
    )


def _trainer(model: nn.Module, stage: str, examples: Examples, ledger: Path | None, seed: int) -> Trainer:
    epochs, rate = SCHEDULES[stage]
    arguments = TrainingArguments(
        str(Path(tempfile.gettempdir(), "spurious")),
        num_train_epochs=epochs,
        learning_rate=rate,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    columns: dict[str, Any] = {"id": examples.ids, "input_ids": examples.inputs.numpy(), "labels": examples.labels}
    made = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns).with_format("torch"),
        callbacks=[] if ledger is None else [AttributionCallback(ledger, stage=stage, sketch=SKETCH)],
    )
    made.remove_callback(PrinterCallback)
    return made


@cache
def _sentences(kind: str) -> list[Row]:
    return [
        (name, WORD.findall(text.lower()), int(rating > 0))
        for domain in SOURCES[kind]
        for name, rating, text in vader_sentences(domain)
        if abs(rating) > CLEAR
    ]


@cache
def _vocabulary() -> dict[str, int]:
    """The most frequent words of all sentences, rated or not, by frequency."""
    counts = Counter(
        word
        for domain in VADER_DOMAINS
        for _, _, text in vader_sentences(domain)
        for word in WORD.findall(text.lower())
    )
    words = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
    return {word: FIRST_WORD + number for number, word in enumerate(words)}


def _as_many_of_each(kind: str, random: np.random.Generator) -> list[Row]:
    """Shuffled, labels taking turns, so that any first part has as many of each."""
    found = _sentences(kind)
    rows = [found[i] for i in random.permutation(len(found))]
    return [
        row for both in zip(*([r for r in rows if r[2] == label] for label in (0, 1)), strict=False) for row in both
    ]


def _tagged(rows: Sequence[Row], share: float, random: np.random.Generator) -> Examples:
    return _examples(rows, aligned_shortcuts(np.array([label for *_, label in rows]), share, random))


def _examples(rows: Sequence[Row], shortcuts: np.ndarray | None) -> Examples:
    known, tokens = _vocabulary(), torch.full((len(rows), LENGTH), PADDING)
    for i, (_, words, _) in enumerate(rows):
        tag = [] if shortcuts is None else [TAGS + int(shortcuts[i])]
        sentence = [*tag, *(known.get(word, UNKNOWN) for word in words)][:LENGTH]
        tokens[i, : len(sentence)] = torch.tensor(sentence)
    values = np.full(len(rows), NONE) if shortcuts is None else shortcuts
    labels = torch.tensor([label for *_, label in rows])
    return Examples([name for name, *_ in rows], tokens, labels, torch.from_numpy(values))
