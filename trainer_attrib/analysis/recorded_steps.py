"""A recorded stage run again from its ledger and its examples, without the code that trained it.

The ledger says which examples each step was trained on, by what each example's loss was divided, to which norm the
gradient was clipped, and what the optimizer used; the examples bring their losses. That is a program for whatever runs
stages again, with one thing more: examples may be left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.matching import places_of
from trainer_attrib.analysis.programs import Loss, Step
from trainer_attrib.analysis.text import IGNORED, TextPair
from trainer_attrib.analysis.unrolled.trained_rows import recorded_visits
from trainer_attrib.errors import ConfigurationError, MissingDataError
from trainer_attrib.ledger.reader import StageReader

_SAME_NORM, _CLIPPED_OFTEN = 1e-4, 3


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass: numbers of their examples, [n], and the weight of each one's loss, float64 [n]."""

    examples: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class RecordedOrder:
    """What a stage's steps were made of.

    Args:
        places: for every recorded example, where it is among the given ones: several places where they have one text.
        steps: micro-batches of each executed step, whose ``examples`` count in ``places``.
        skipped: how many steps had been executed before each one that a gradient scaler skipped.
        thresholds: norm to which each step's gradient was clipped, None for none.
        notes: what to know about how well all of this is known, for people.
    """

    places: Sequence[Sequence[int]]
    steps: Sequence[Sequence[MicroBatch]]
    skipped: Sequence[int]
    thresholds: Sequence[float | None]
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(stage: StageReader, examples: Examples) -> RecordedOrder:
        """Read from a stage's ledger.

        Args:
            stage: as recorded.
            examples: all that it was trained on, by the ids or with the texts that were recorded.

        Raises:
            MissingDataError: some of them are not given.
            NotComparableError: the ledger does not say which examples each step was trained on.
        """
        names, step, micro, tokens, denominators = recorded_visits(
            stage, "example", "step", "micro_batch", "tokens", "denominator"
        )
        ids, index = np.unique(names.astype(str), return_inverse=True)
        places = _places(stage, ids.tolist(), examples)
        tokens = tokens.astype(np.float64)  # nan where unknown
        counted = np.isfinite(tokens) & (examples.tokens is not None)
        weights = np.where(counted, tokens, 1.0) / denominators.astype(np.float64)
        thresholds, inferred = _thresholds(stage)
        steps: list[list[MicroBatch]] = [[] for _ in thresholds]
        borders = np.flatnonzero((np.diff(step) != 0) | (np.diff(micro) != 0)) + 1
        for rows in np.split(np.arange(len(step)), borders):
            steps[int(step[rows[0]]) - 1].append(MicroBatch(index[rows], weights[rows]))
        notes = [*inferred, *_other_lengths(index[counted], tokens[counted], places, examples)]
        return RecordedOrder(places, steps, stage.skipped_steps()["step"].to_pylist(), thresholds, tuple(notes))


@dataclass
class RecordedSteps:
    """The steps of a recorded stage, for :func:`~trainer_attrib.analysis.programs.steps_of`.

    The weights of the examples that stay are what they were. A step of which none is left still takes place, with a
    gradient of zero: momentum and weight decay go on.

    Args:
        model: that the program was given.
        order: of the examples.
        examples: with their losses, the ones that ``order`` was read with.
        left_out: their places among the examples.
    """

    model: nn.Module
    order: RecordedOrder
    examples: Examples
    left_out: Collection[int] = ()
    _threshold: float | None = field(default=None, init=False)

    def steps(self, thin: int = 1) -> Iterator[Step]:
        """The recorded batches; see :class:`~trainer_attrib.analysis.programs.Steps`."""
        for number, batches in enumerate(self.order.steps):
            yield from [Step([])] * self.order.skipped.count(number)
            self._threshold = self.order.thresholds[number]
            yield self._step(batches, thin)

    def clip(self) -> None:
        """Clip to the norm to which the step was clipped."""
        if self._threshold is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._threshold)

    def optimizer(self) -> Optimizer:
        """Unknown.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            "The ledger alone does not say how to make an optimizer of this class.",
            cause="those of torch.optim are made from their recorded settings; of others only the name is known.",
            fix="pass a program that makes the stage's trainer.",
        )

    def _step(self, batches: Sequence[MicroBatch], thin: int) -> Step:
        chosen = [(batch, self._kept(batch)[::thin]) for batch in batches]
        total, taken = sum(len(batch.examples) for batch in batches), sum(len(rows) for _, rows in chosen)
        if not taken:
            return Step([self._loss(batches[0], np.arange(len(batches[0].examples)), 0.0)])
        losses = [self._loss(batch, rows, len(self._kept(batch)) / len(rows)) for batch, rows in chosen if len(rows)]
        return Step(losses, taken / total)

    def _kept(self, batch: MicroBatch) -> np.ndarray:
        places = self.order.places
        kept = [row for row, example in enumerate(batch.examples) if not _any_in(places[example], self.left_out)]
        return np.array(kept, np.int64)

    def _loss(self, batch: MicroBatch, rows: np.ndarray, scale: float) -> Loss:
        items = self.examples.items([self.order.places[example][0] for example in batch.examples[rows]])
        weights = torch.from_numpy(batch.weights[rows] * scale)

        def loss() -> Tensor:
            found = self.examples.loss(self.model, items)
            return (found * weights.to(found)).sum()

        return loss


def _any_in(places: Sequence[int], left_out: Collection[int]) -> bool:
    return any(place in left_out for place in places)


def _places(stage: StageReader, ids: list[str], examples: Examples) -> list[list[int]]:
    recorded = stage.examples()
    texts: dict[Any, str | None] = dict(zip(recorded["example"].to_pylist(), recorded["text"].to_pylist(), strict=True))
    found = places_of(ids, [texts.get(name) for name in ids], examples.ids, examples.texts)
    if missing := [name for name, places in zip(ids, found, strict=True) if not places]:
        raise MissingDataError(
            f"{len(missing)} of the {len(ids)} examples that stage '{stage.name}' was trained on are not among the "
            f"{len(examples)} given ones, by id or text: {missing[:3]}; these are called {examples.ids[:3]}.",
            cause="a file of other data or ids; or texts are not those that were trained on, special tokens left out.",
            fix="pass all examples of the stage with the ids that they were recorded by, or a program that trains it.",
        )
    return found


def _thresholds(stage: StageReader) -> tuple[list[float | None], list[str]]:
    """To which norm each step's gradient was clipped. Where nobody told, a norm that is the largest of all and that
    several steps have exactly, since norms are recorded after clipping."""
    rows = stage.steps().select(["clip_threshold", "gradient_norm"]).to_pylist()
    told = [row["clip_threshold"] for row in rows]
    norms = np.array([np.nan if row["gradient_norm"] is None else row["gradient_norm"] for row in rows], np.float64)
    if any(threshold is not None for threshold in told) or not np.isfinite(norms).any():
        return told, []
    largest = float(np.nanmax(norms))
    if (np.abs(norms - largest) <= _SAME_NORM * largest).sum() < _CLIPPED_OFTEN or largest == 0:
        return told, []
    rounded = float(f"{largest:.4g}")  # torch adds 1e-6 to the norm that it divides by
    threshold = rounded if abs(rounded - largest) <= 2e-6 else largest
    note = (
        f"gradients seem to have been clipped to a norm of {threshold:.4g}, which several steps have: so they are again"
    )
    return [threshold] * len(rows), [note]


def _other_lengths(
    index: np.ndarray, tokens: np.ndarray, places: Sequence[Sequence[int]], examples: Examples
) -> list[str]:
    """A note where the given items have other numbers of target tokens than were trained on."""
    differ, first = 0, ""
    for example, at in {int(e): n for n, e in enumerate(index)}.items():
        item = examples.dataset[places[example][0]]
        if isinstance(item, TextPair):
            given = sum(label != IGNORED for label in item.labels[1:])
            if given != tokens[at]:
                differ += 1
                first = first or f"{tokens[at]:.0f} recorded, {given} given"
    if not differ:
        return []
    return [
        f"{differ} examples have other numbers of target tokens than were trained on (the first: {first}), such as an "
        "end-of-text token or a prompt that counted: their losses are not exactly those of the training"
    ]
