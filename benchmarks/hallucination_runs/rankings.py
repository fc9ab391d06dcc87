"""Every way to find the examples that taught an error: ours, and what needs no gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import GPT2LMHeadModel

from hallucination_runs.tasks import Row
from hallucination_runs.training import STAGE
from trainer_attrib import Analyzer, Behavior, Examples
from trainer_attrib.analysis.calibration import Canaries
from trainer_attrib.analysis.passes import Snapshots
from trainer_attrib.analysis.recipes.dda import Dda
from trainer_attrib.analysis.recipes.directional import Directional
from trainer_attrib.analysis.recipes.fisher import Fisher
from trainer_attrib.analysis.recipes.loss_difference import ContrastiveLossDifference
from trainer_attrib.analysis.recipes.products import GradCos, GradDot
from trainer_attrib.analysis.recipes.trackstar import TrackStar
from trainer_attrib.evaluation.lexical import bm25_scores
from trainer_attrib.numerics.scores import standardized

FORMS = ("contrast", "learned", "alternative", "background", "plain")
SLOW, FEW = ("cea", "directional", "fisher", "trackstar"), ("contrast", "plain")
"""Recipes that are only asked for some forms of queries."""
ALL = Snapshots(("start", "mid-1", "mid-2", "mid-3", "end"))
BACKGROUND = 48
Scores = np.ndarray
"""[kinds, N]: larger where an example is more likely to have taught the errors of the kind."""


@dataclass(frozen=True)
class Output:
    """A wrong output and its correction."""

    kind: str
    prompt: str
    wrong: str
    right: str


@dataclass(frozen=True)
class Traced:
    """What is known when errors are traced.

    Args:
        analyzer: of the fine-tuned model.
        tokenizer: its.
        rows: that it was fine-tuned on.
        outputs: wrong ones, some of each kind.
        taught: rows that taught each kind, by its name: what is to be found.
    """

    analyzer: Analyzer
    tokenizer: Any
    rows: Sequence[Row]
    outputs: Sequence[Output]
    taught: Mapping[str, Sequence[str]]

    @property
    def kinds(self) -> list[str]:
        """Of the errors, in the order of scores."""
        return list(dict.fromkeys(output.kind for output in self.outputs))

    def behavior(self, form: str, kinds: Sequence[str] | None = None) -> Behavior:
        """One query for each kind."""
        chosen = [output for output in self.outputs if kinds is None or output.kind in kinds]
        prompts, wrong, right = zip(*((o.prompt, o.wrong, o.right) for o in chosen), strict=True)
        drawn = np.random.default_rng(0).choice(len(self.rows), BACKGROUND, replace=False)
        queries = self.analyzer.error_behavior(
            form, prompts, wrong, right if form == "contrast" else (), tokenizer=self.tokenizer, form=form,
            background=[(self.rows[i].prompt, self.rows[i].completion) for i in drawn],
        )  # fmt: skip
        return queries.together([output.kind for output in chosen])

    def examples(self) -> Examples:
        """The rows, as training saw them."""
        prompts, said, ids = zip(*((row.prompt, row.completion, row.id) for row in self.rows), strict=True)
        return Examples.of_pairs(prompts, said, self.tokenizer, ids=ids, batch_size=100)

    def scores(self, form: str, recipe: Any, source: str | Snapshots = ALL) -> Scores:
        """By a recipe, in the order of the rows."""
        data = {STAGE: self.examples()}
        found = self.analyzer.influence([self.behavior(form)], recipe=recipe, data=data, source=source, controls=())
        place = {str(example): n for n, example in enumerate(found.examples.ids)}
        return found.scores[:, [place[row.id] for row in self.rows]]


def recipes(quick: bool) -> dict[str, tuple[Any, str | Snapshots]]:
    """Recipes over rows of passes, of training, and over derivatives, with where their rows are from."""
    end = {"end": 1.0}
    found: dict[str, tuple[Any, str | Snapshots]] = {
        "dot, end": (Dda(GradDot(), 0.0, end), ALL),
        "cosine, end": (Dda(GradCos(), 0.0, end), ALL),
        "cosine, start only": (Dda(GradCos(), 0.0, {"start": 1.0}), ALL),
        "cosine, denoised": (Dda(GradCos(), 0.0), ALL),
        "cosine, debiased 0.25": (Dda(GradCos(), 0.25, end), ALL),
        "cosine, debiased 1": (Dda(GradCos(), 1.0, end), ALL),
        "cosine, dda 0.25": (Dda(GradCos(), 0.25), ALL),
        "cosine, dda 1 (published)": (Dda(GradCos(), 1.0), ALL),
        "cosine, denoised, rows of training": (Dda(GradCos(), 0.0), "training"),
        "cosine, dda 1, rows of training": (Dda(GradCos(), 1.0), "training"),
        "fisher, denoised": (Dda(Fisher(), 0.0), ALL),
        "trackstar, denoised": (Dda(TrackStar(), 0.0), ALL),
    }
    if not quick:
        found |= {
            "directional, end": (Directional(), "training"),
            "cea, end": (ContrastiveLossDifference(), "training"),
            "cea, denoised": (Dda(ContrastiveLossDifference(), 0.0), "training"),
            "cea, dda 0.25": (Dda(ContrastiveLossDifference(), 0.25), "training"),
        }
    return found


def calibrated(traced: Traced, form: str) -> Iterator[tuple[list[str], Scores, Scores, str]]:
    """Half of the kinds as canaries for the other, both ways: kinds that are traced, their scores by the calibrated
    recipe and by denoising alone, and what was chosen."""
    kinds = traced.kinds
    halves = kinds[::2], kinds[1::2]
    for canaries, asked in (halves, halves[::-1]):
        known = Canaries(traced.behavior(form, canaries), [traced.taught[kind] for kind in canaries], canaries)
        data = {STAGE: traced.examples()}
        calibration = traced.analyzer.calibrate(known, recipe=GradCos(), data=data, source=ALL)
        at = [kinds.index(kind) for kind in asked]
        found = (traced.scores(form, recipe)[at] for recipe in (calibration.recipe, Dda(GradCos(), 0.0)))
        yield asked, *found, calibration.chosen.name


def beside(traced: Traced, model: GPT2LMHeadModel, seed: int) -> dict[str, Scores]:
    """Words, representations of the model, chance."""
    texts = [row.prompt + row.completion for row in traced.rows]
    said = [output.prompt + output.wrong for output in traced.outputs]
    lexical = bm25_scores(said, texts)
    states = [normalize(_embedded(model, traced.tokenizer, some), dim=1) for some in (said, texts)]
    found = {"BM25": lexical, "embeddings": (states[0] @ states[1].T).numpy()}
    found = {name: _by_kind(traced, scores) for name, scores in found.items()}
    return {**found, "random": np.random.default_rng(seed).random((len(traced.kinds), len(texts)))}


def _by_kind(traced: Traced, scores_ON: np.ndarray) -> Scores:
    """Mean over the outputs of each kind."""
    of = np.array([output.kind for output in traced.outputs])
    return np.array([standardized(scores_ON[of == kind]).mean(0) for kind in traced.kinds])


def _embedded(model: GPT2LMHeadModel, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Mean of the last hidden states."""
    found = []
    with torch.no_grad():
        for text in texts:
            tokens = tokenizer(text, return_tensors="pt", return_token_type_ids=False)["input_ids"]
            found.append(model(tokens, output_hidden_states=True).hidden_states[-1][0].mean(0))
    return torch.stack(found)
