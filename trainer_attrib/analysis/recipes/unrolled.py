"""The exact derivative of the trained model's behavior with respect to the weight of every example's loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer_attrib.analysis.influence_results import InfluenceExamples
from trainer_attrib.analysis.recipes.recipe import Question, StageScores
from trainer_attrib.errors import ConfigurationError, MissingProgramError

if TYPE_CHECKING:
    from trainer_attrib.analysis.unrolled.unroll import StageDerivatives

NOTICED = 1e-3  # shares of what is not as it should be that are told


@dataclass(frozen=True)
class Unrolled:
    """d(behavior at the end) / d(weight of the example's loss), through every recorded step: by how much the example,
    as part of this very training, increased the behavior, in its unit, to first order.

    The scored stages and all later ones are run again step by step by their programs, and the queries' gradients are
    carried back through the steps (Engstrom et al. 2025, "Optimizing ML training with metagradient descent"; Ilyas and
    Engstrom 2025, "MAGIC"). Order, schedule, momentum, clipping and later stages are in it; examples come from the
    ledger and need not be given.

    Args:
        check: replays with slightly other weights of the examples, at least 2, that tell whether training is smooth
            enough for the scores to be trusted; 0 for none.
        spacing: steps between the states of training that are kept in memory; None for all that fit into a gigabyte,
            else the root of the number of steps. Scores do not depend on it.
        at_once: queries that share a backward pass: memory against time.
        seed: of the check.

    Raises:
        ConfigurationError: settings below these.
    """

    check: int = 5
    spacing: int | None = None
    at_once: int = 32
    seed: int = 0

    name = "unrolled"
    caveat = ""

    def __post_init__(self) -> None:
        if self.check < 0 or self.check == 1 or self.at_once < 1 or (self.spacing is not None and self.spacing < 1):
            raise ConfigurationError(
                f"Unrolled got check={self.check}, spacing={self.spacing}, at_once={self.at_once}.",
                fix="use check=0 or at least 2, and at least 1 for the others.",
            )

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`.

        Raises:
            MissingProgramError: a stage that has to run again has no program, or one that cannot be run step by step.
            ConfigurationError: gradients were carried back.
            NotComparableError: the ledger does not tell which examples were in which step, the model lacks weights that
                were trained, or the optimizer is not torch's SGD, Adam or AdamW.
            AnalysisError: a loss cannot be differentiated twice.
        """
        self._refuse(question)
        from trainer_attrib.analysis.unrolled.unroll import Effort, unroll  # of all recipes, this one needs most code

        found = unroll(question.lineage, question.stages, Effort(self.spacing, self.at_once))
        return [
            StageScores(_described(part), part.scores.astype(np.float32), tuple(self._said(question, part)))
            for part in found
        ]

    def _refuse(self, question: Question) -> None:
        if question.carried is not None:
            raise ConfigurationError(
                f"Recipe '{self.name}' cannot use gradients carried back through later stages.",
                cause="it carries the behaviors' gradients back itself, step by step.",
                fix="leave out `carry`.",
            )
        names = [stage.name for stage in question.lineage.stages]
        through = names[min(names.index(stage.name) for stage in question.stages) :]
        programs = question.lineage.programs
        if missing := [name for name in through if name not in programs]:
            raise MissingProgramError(
                f"Recipe '{self.name}' runs the scored stages and all later ones again and needs programs for "
                f"{missing}; given are those of {sorted(programs)}.",
                cause="the ledger records what training did, not the code and data that did it.",
                fix="pass programs={stage: lambda model: Trainer(model=model, ...)}, each building the trainer of that "
                "stage with the same arguments, data and seed; or use recipe='gauss_newton', which needs none.",
            )

    def _said(self, question: Question, part: StageDerivatives) -> Iterator[str]:
        name = f"stage '{part.stage.name}'"
        if self.check:
            from trainer_attrib.analysis.unrolled.smoothness import smoothness

            yield str(smoothness(question.lineage, part, self.check, self.seed))
        else:
            yield f"{name}: whether training is smooth enough for these scores was not checked"
        if part.drift > NOTICED:
            yield (
                f"{name}: running it again ended beside the recorded weights, by {part.drift:.1%} of what it changed: "
                "scores are of the training that the program runs"
            )
        if part.outside > NOTICED:
            yield (
                f"{name}: {part.outside:.1%} of what the losses did passes by the outputs (auxiliary losses, "
                "penalties) and belongs to no example"
            )
        if part.functions:
            yield (
                f"{name}: the loss has functions with a backward pass of their own ({', '.join(part.functions)}): "
                "scores are only right if that can be differentiated"
            )
        if part.moved_buffers:
            yield (
                f"{name}: training moved {len(part.moved_buffers)} buffers (such as {part.moved_buffers[0]}), whose "
                "part in the behaviors is not counted"
            )


def _described(part: StageDerivatives) -> InfluenceExamples:
    stage, rows = part.stage, part.rows
    told = stage.examples()
    columns = zip(*(told[name].to_pylist() for name in ("example", "source", "text")), strict=True)
    known = {example: (source, text) for example, source, text in columns}
    sources, texts = zip(*(known.get(example, (None, None)) for example in rows.ids), strict=True)
    ids = np.array(rows.ids, dtype=object)
    return InfluenceExamples(np.array([stage.name] * len(ids), dtype=object), ids, rows.last_step, sources, texts)
