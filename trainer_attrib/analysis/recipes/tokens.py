"""Which tokens of the examples at both ends of a ranking carry their influence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from trainer_attrib.analysis.examples import Examples, TokenLosses
from trainer_attrib.analysis.forward_mode import Slopes
from trainer_attrib.analysis.influence_results import Influence, TokenScores
from trainer_attrib.analysis.recipes.directional import Directional, ways
from trainer_attrib.analysis.recipes.recipe import Question
from trainer_attrib.analysis.training_state import random_states_kept
from trainer_attrib.errors import ConfigurationError, MissingDataError
from trainer_attrib.ledger.reader import StageReader

TOKENS = "token scores are those of recipe 'directional', and add up to its scores of the examples"


def token_scores(question: Question, influence: Influence, top: int, recipe: Directional) -> Influence:
    """The influence with scores of the tokens of each query's ``top`` first and last examples.

    A token's score is that of its own part of the example's loss: what predicting this token trained, not what having
    it in the context did.

    Raises:
        ConfigurationError: the influence is of other queries, or of examples that are not among the given ones.
        MissingDataError: no examples are given for a stage, or they have no losses by token.
    """
    if influence.queries != tuple(q for b in question.behaviors for q in b.queries):
        raise ConfigurationError(
            f"The influence has {len(influence.queries)} queries that are not the {question.queries} of the behaviors.",
            fix="pass the behaviors for which the influence was asked, in the same order.",
        )
    found: dict[tuple[int, int], TokenScores] = {}
    with random_states_kept():
        for stage in question.stages:
            found.update(_of_stage(question, influence, stage, top, recipe))
    caveats = influence.caveats if TOKENS in influence.caveats else (*influence.caveats, TOKENS)
    return replace(influence, tokens={**influence.tokens, **found}, caveats=caveats)


def _of_stage(
    question: Question, influence: Influence, stage: StageReader, top: int, recipe: Directional
) -> dict[tuple[int, int], TokenScores]:
    wanted = {query: _ends(influence, stage.name, query, top) for query in range(question.queries)}
    if not any(wanted.values()):
        return {}
    examples = question.examples_of(stage, recipe.name)
    tokens = _tokens_of(examples, stage)
    place = _places(examples, influence, [column for columns in wanted.values() for column in columns])
    sums: dict[tuple[int, int], np.ndarray] = {}
    for way in ways(question, stage, recipe.snapshots):
        slopes = Slopes(way.model, way.direction)
        for columns in _batched(wanted[way.query], examples.batch_size):
            items = examples.items([place[column] for column in columns])
            parts_BS = -slopes(lambda model, items=items: tokens.losses(model, items)).numpy()
            for column, parts_S in zip(columns, parts_BS, strict=True):
                before = sums.get((way.query, column), np.zeros_like(parts_S))
                sums[way.query, column] = before + parts_S
    shown = {key: tokens.pieces(examples.dataset[place[key[1]]]) for key in sums}
    return {key: TokenScores(tuple(shown[key]), sums[key][: len(shown[key])].astype(np.float32)) for key in sums}


def _ends(influence: Influence, stage: str, query: int, top: int) -> list[int]:
    """Columns of the examples of a stage among the first and last ones of a query."""
    columns = [*influence.order(query, top, largest=True), *influence.order(query, top, largest=False)]
    return [int(c) for c in dict.fromkeys(columns) if influence.examples.stages[c] == stage]


def _tokens_of(examples: Examples, stage: StageReader) -> TokenLosses:
    if examples.tokens is None:
        raise MissingDataError(
            f"The examples given for stage '{stage.name}' have no losses by token.",
            cause="their loss is one number.",
            fix="make them by Examples.of_texts or Examples.of_pairs, or pass Examples(tokens=TokenLosses(...)).",
        )
    return examples.tokens


def _places(examples: Examples, influence: Influence, columns: list[int]) -> dict[int, int]:
    """Column of the influence -> position among the examples."""
    index = {example: position for position, example in enumerate(examples.ids)}
    names = {column: str(influence.examples.ids[column]) for column in columns}
    if unknown := sorted({*names.values()} - index.keys()):
        raise ConfigurationError(
            f"{len(unknown)} scored examples are not among the given ones ({', '.join(unknown[:3])}).",
            cause="the given examples have other ids than the recorded or scored ones.",
            fix="pass `ids` that are those of the training set.",
        )
    return {column: index[name] for column, name in names.items()}


def _batched(columns: list[int], size: int) -> Iterator[list[int]]:
    yield from (columns[i : i + size] for i in range(0, len(columns), size))
