"""Train, record, ask, check: what ``trainer-attrib demo`` does, in the order in which a user would."""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, no telemetry is sent

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from trainer_attrib.analysis.analyzer import Analyzer
from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.influence_results import Influence
from trainer_attrib.analysis.keeping import keep
from trainer_attrib.analysis.results import StageEffects
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.evaluation.lexical import bm25_scores
from trainer_attrib.evaluation.retrieval import TopShare, random_share, share_in_top
from trainer_attrib.ledger.overview import overview, tree_lines
from trainer_attrib_integrations.demo.facts import (
    DemoData,
    Query,
    build_data,
    knowledge_queries,
    planted_queries,
    style_queries,
)
from trainer_attrib_integrations.demo.stages import build_tokenizer, initial_model, programs
from trainer_attrib_integrations.forecast_huggingface import forecast
from trainer_attrib_integrations.huggingface import AttributionCallback

Say = Callable[[str], Any]
METHODS = ("change", "subtract", "replay", "retrain")
TOP = 10


def run_demo(out: str | os.PathLike[str], *, seed: int = 0, say: Say = print) -> dict[str, Any]:
    """Run the whole demo into a new directory; returns the printed figures.

    Raises:
        ConfigurationError: the directory holds something already.
    """
    folder, began = Path(out), time.monotonic()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(
            f"{folder} is not empty.", cause="the demo ran before.", fix="pass another directory with --out."
        )
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # the trainers' own, about the trainers' own arguments
    data = build_data(seed)
    tokenizer = build_tokenizer(data)
    model = initial_model(tokenizer, seed)
    say(f"Data: {len(data.pretrain)} texts, {len(data.sft)} questions and answers, {len(data.dpo)} preference pairs.")
    say(f"{len(data.planted)} of {len(data.planted) + len(data.true)} countries get a wrong capital in stage 'sft'.\n")
    _train(folder, data, tokenizer, model, say)
    _leave(folder, data, tokenizer, model)
    analyzer = Analyzer(folder / "ledger", model)
    say("\n" + "\n".join(tree_lines(overview(analyzer.ledger))))
    effects, exact = _account(analyzer, data, tokenizer, folder, say)
    influence, shares = _trace(analyzer, data, tokenizer, say)
    keep(analyzer.ledger, effects, title="What each stage did")
    report = analyzer.report(folder / "report.html", effects, influence, title="Three stages, accounted for")
    say(f"\nReport: {report}\nTo look around: trainer-attrib explore {folder / 'ledger'} --model {folder / 'model'}")
    say(f"The demo took {time.monotonic() - began:.0f} seconds.")
    return {
        "closure_exact": exact,
        "effects": effects.to_dict(),
        "influence": influence.to_dict(TOP),
        "shares": shares,
        "report": str(report),
    }


class Progress(TrainerCallback):
    """A bar over a stage's steps."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self._bar = tqdm(total=state.max_steps, desc=self._name, leave=False, disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance it."""
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it away."""
        self._bar.close()


def behaviors_of(data: DemoData, tokenizer: PreTrainedTokenizerFast) -> list[Behavior]:
    """What the demo asks about the model: two kinds of knowledge, the planted errors, the style."""
    asked = {
        "knows true capitals": knowledge_queries(data.true[:40]),
        "knows capitals never asked about": knowledge_queries(data.held_out),
        "asserts planted wrong capitals": planted_queries(data.planted),
        "answers in full sentences": style_queries(data.true[:40]),
    }
    return [_contrast(name, queries, tokenizer) for name, queries in asked.items()]


def _contrast(name: str, queries: list[Query], tokenizer: PreTrainedTokenizerFast) -> Behavior:
    end = str(tokenizer.eos_token)  # an answer is over where the model says so, as in training
    right, wrong = [q.completion + end for q in queries], [q.contrast + end for q in queries]
    return Behavior.contrast(name, [q.prompt for q in queries], right, wrong, tokenizer)


def _train(folder: Path, data: DemoData, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, say: Say) -> None:
    """Three trainers, one callback each: the only line that recording adds."""
    recorded = programs(
        data,
        tokenizer,
        folder / "trainers",
        lambda stage: [AttributionCallback(folder / "ledger", stage=stage), Progress(stage)],
    )
    for stage, program in recorded.items():
        trainer = program(model)
        if stage == "dpo":
            _foresee(folder, trainer, behaviors_of(data, tokenizer), say)
        say(f"Training stage '{stage}' ...")
        trainer.train()


def _foresee(folder: Path, trainer: Any, behaviors: list[Behavior], say: Say) -> None:
    """What the preferences will do, before they do it: the trainer is left as it is."""
    outlook = forecast(trainer, behaviors)
    say(f"\nForecast of stage 'dpo', before it is trained:\n\n{outlook}\n")
    keep(folder / "ledger", outlook, outlook.contributions(), title="What the preferences will do (before stage dpo)")


def _leave(folder: Path, data: DemoData, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    """The model and the data of stage 'sft', as ``trainer-attrib influence`` reads them."""
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    end = str(tokenizer.eos_token)
    rows = [{**row, "completion": row["completion"] + end} for row in data.sft]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _account(
    analyzer: Analyzer, data: DemoData, tokenizer: PreTrainedTokenizerFast, folder: Path, say: Say
) -> tuple[StageEffects, bool]:
    """Stage effects by every method, beside really retraining without the stage; and whether that can be trusted."""
    again = programs(data, tokenizer, folder / "trainers", lambda stage: [Progress(f"{stage} again")])
    say("\nRunning all three stages again with nothing removed, to check that retraining can be trusted ...")
    closure = analyzer.closure(again)
    say(f"  {closure}")
    say("Effect of each stage by each method; 'retrain' really trains the later stages again without it ...\n")
    effects = analyzer.stage_effects(behaviors_of(data, tokenizer), METHODS, again)
    say(repr(effects))
    for line in _agreement(effects):
        say(line)
    return effects, closure.exact


def _agreement(effects: StageEffects) -> list[str]:
    """How far the cheap methods agree with retraining, on the stages where they are estimates."""
    means = {(e.behavior, e.stage, e.method): e for e in effects.summary()}
    last = effects.rows[-1].stage
    lines = []
    for method in METHODS[:-1]:
        pairs = [(means[b, s, method], e) for (b, s, m), e in means.items() if m == "retrain" and s != last]
        errors = [abs(cheap.effect - true.effect) / abs(true.effect) for cheap, true in pairs]
        signs = sum(cheap.effect * true.effect > 0 for cheap, true in pairs)
        covered = sum(abs(cheap.effect - true.effect) <= cheap.error_bar for cheap, true in pairs)
        line = f"'{method}' against retraining, earlier stages: {signs} of {len(pairs)} signs agree, "
        line += f"median relative error {float(np.median(errors)):.0%}"
        lines.append(line + (f", {covered} of {len(pairs)} within the error bar" if method != "change" else ""))
    return lines


def _trace(
    analyzer: Analyzer, data: DemoData, tokenizer: PreTrainedTokenizerFast, say: Say
) -> tuple[Influence, dict[str, dict[str, float]]]:
    """Top training examples for the wrong answers: how many of them are planted ones, beside two controls."""
    queries = planted_queries(data.planted)
    behavior = _contrast("asserts planted wrong capitals", queries, tokenizer)
    everywhere = analyzer.influence([behavior])
    within = {
        recipe: analyzer.influence([behavior], stages=["sft"], recipe=recipe) for recipe in ("grad_cos", "grad_dot")
    }
    for name, found in {"trackstar": everywhere, **within}.items():
        keep(analyzer.ledger, found, title=f"Who taught the planted wrong capitals ({name})")
    say(f"\nAmong the top {TOP} examples of stage 'sft' for each of {len(queries)} planted wrong answers:")
    shares = {}
    for name, (planted, own) in _shares(within, queries).items():
        say(f"  {name:<9} planted {planted}   about the same country {own}")
        shares[name] = {"planted": planted.share, "planted_se": planted.standard_error, "own": own.share}
    say("\nTop examples of all stages for three of the wrong answers:\n")
    say(repr(_first(everywhere, 3)))
    return everywhere, shares


def _shares(within: dict[str, Influence], queries: list[Query]) -> dict[str, tuple[TopShare, TopShare]]:
    """Share of planted examples, and of planted examples about the query's own country, per method."""
    examples = next(iter(within.values())).examples
    planted = np.array([source == "planted" for source in examples.sources])
    own = np.array([[q.country in (text or "") for text in examples.texts] for q in queries]) & planted
    scores = {name: influence.scores for name, influence in within.items()}
    texts = [text or "" for text in examples.texts]
    scores["bm25"] = bm25_scores([q.prompt + q.completion for q in queries], texts)
    found = {name: (share_in_top(s, planted, TOP), share_in_top(s, own, TOP)) for name, s in scores.items()}
    found["random"] = (random_share(planted, TOP, len(queries)), random_share(own, TOP, len(queries)))
    return found


def _first(influence: Influence, queries: int) -> Influence:
    return Influence(
        influence.behaviors[:queries],
        influence.queries[:queries],
        influence.scores[:queries],
        influence.examples,
        influence.recipe,
        influence.caveats,
    )
