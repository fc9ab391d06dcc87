"""What is traced: training texts, questions, and which texts are relevant to which question."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from offline_data import boolq
from transformers import PreTrainedModel

from fact_runs import facts
from fact_runs.models import FromScratch, SmolLM2, Subject
from fact_runs.training import Training, train
from trainer_attrib import Behavior
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.errors import TrainerAttribError

CORRECTIONS = ("none", "factored")
PASSAGE = 64  # words


@dataclass(frozen=True)
class Case:
    """Texts, questions and the truth.

    Args:
        name: of the data.
        texts: by id, N.
        prompts: of the questions, Q.
        answers: what follows each prompt; its log-probability is the behavior.
        relevant: bool [Q, N].
        keywords: of each question, what a reader who knew which words matter would search for; none where nobody does.
        subject: that is trained.
        training: how.
    """

    name: str
    texts: dict[str, str]
    prompts: Sequence[str]
    answers: Sequence[str]
    relevant: np.ndarray
    keywords: Sequence[str]
    subject: Subject
    training: Training


QUESTION = " Question:"


@dataclass(frozen=True)
class Trained:
    """A case's model, and its recordings by correction."""

    case: Case
    model: PreTrainedModel
    ledgers: dict[str, Path]
    behavior: Behavior
    examples: Examples


def country_facts(seed: int, quick: bool) -> Case:
    """Facts about countries in passages that state several of them."""
    known = facts.facts_of_countries(20 if quick else 240, seed)
    passages = facts.passages(known, seed)
    queries = facts.queries(known, 20 if quick else 100, seed)
    return Case(
        name="country facts",
        texts={passage.id: passage.text for passage in passages},
        prompts=[query.prompt for query in queries],
        answers=[query.completion for query in queries],
        relevant=np.array([[query.fact in passage.facts for passage in passages] for query in queries]),
        keywords=[f"{query.fact.country} {query.fact.value}" for query in queries],
        subject=FromScratch(width=96, layers=3),
        training=Training(epochs=12 if quick else 24, batch=16, rate=3e-3),
    )


def natural_questions(name: str, passages: int, subject: Subject, training: Training, seed: int, quick: bool) -> Case:
    """BoolQ: people's questions, to which the one Wikipedia passage that each was asked about is relevant.

    Every second passage carries its question, from which the model learns what a question is; 100 questions about the
    others are asked. Their words are people's own, not always the passage's.
    """
    rows = random.Random(seed).sample(boolq(), 40 if quick else passages)
    texts, asked = {}, []
    for number, (title, passage, question) in enumerate(rows):
        words = f"{title}: {passage}".split()[:PASSAGE]
        texts[f"boolq-{number:03}"] = " ".join(words) + (f"{QUESTION} {question}?" if number % 2 else "")
        asked += [] if number % 2 else [(number, f" {question}?")]
    asked = asked[:100]
    return Case(
        name=name,
        texts=texts,
        prompts=[QUESTION] * len(asked),
        answers=[question for _, question in asked],
        relevant=np.array([[number == at for at in range(len(rows))] for number, _ in asked]),
        keywords=(),
        subject=subject,
        training=training,
    )


def trained(case: Case, seed: int, folder: Path) -> Trained:
    """Train the same model twice, as rows are either corrected or not.

    Raises:
        TrainerAttribError: the two models differ, so that recording is not what it promises to be.
    """
    said = [p + a for p, a in zip(case.prompts, case.answers, strict=True)]
    tokenizer = case.subject.tokenizer([*case.texts.values(), *said])
    rows = [{"id": name, "text": text} for name, text in case.texts.items()]
    models, ledgers = [], {}
    for correction in CORRECTIONS:
        models.append(case.subject.model(tokenizer, seed))
        ledgers[correction] = train(models[-1], tokenizer, rows, folder, case.subject, case.training, seed, correction)
    if any(not torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)):
        raise TrainerAttribError("The same training recorded in two ways gave two models.")
    behavior = Behavior.completion("answers", case.prompts, case.answers, tokenizer)
    examples = Examples.of_texts(list(case.texts.values()), tokenizer, ids=list(case.texts))
    return Trained(case, models[-1], ledgers, behavior, examples)


@dataclass(frozen=True)
class Maker:
    """How a case is made, and for how many seeds at most."""

    make: Callable[[int, bool], Case]
    seeds: int = 100


_SCRATCH = FromScratch(width=96, layers=3, vocabulary=4000), Training(epochs=40, batch=16, rate=3e-3)
_READ_BEFORE = SmolLM2(layers=10), Training(epochs=2, batch=8, rate=5e-5, warmup=5)
_FINER = _READ_BEFORE[0], replace(_READ_BEFORE[1], rank=32)  # rows of 71,680 numbers; the paper's have 65,536
CASES = {
    "country facts": Maker(country_facts),
    "BoolQ": Maker(partial(natural_questions, "BoolQ", 400, *_SCRATCH)),
    "BoolQ (SmolLM2)": Maker(partial(natural_questions, "BoolQ (SmolLM2)", 200, *_READ_BEFORE), seeds=2),
    "BoolQ (SmolLM2) rank 32": Maker(partial(natural_questions, "BoolQ (SmolLM2) rank 32", 200, *_FINER), seeds=2),
}
