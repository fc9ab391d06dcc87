"""The analyzer: reads a ledger, moves a model through displacements, measures behaviors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer_attrib.analysis import stage_effects as effects
from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.estimate import Method
from trainer_attrib.analysis.effects.first_order import FirstOrder
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.example_questions import ExampleQuestions
from trainer_attrib.analysis.programs import Program, check_programs
from trainer_attrib.analysis.removal import SCALES, Removal, Search, remove
from trainer_attrib.analysis.replaying import Pace
from trainer_attrib.analysis.results import Result, StageEffects
from trainer_attrib.analysis.retraining import Closure, closure
from trainer_attrib.analysis.split import Split, split
from trainer_attrib.analysis.stage_view import ledger_blocks
from trainer_attrib.report.page import write_page


class Analyzer(ExampleQuestions):
    """Answers from a ledger about a model that stands at the end of one of its stages, its adapters merged or not.

    Args:
        ledger: directory or URL that the callbacks recorded to.
        model: the trained model. It is moved while behaviors are measured and is bit-identical afterwards.
        runner: where work runs: ``"serial"``, here; ``"torchrun"``, in all processes that torchrun started, which
            all ask the same; ``"ray"``, in actors (extra ``ray``); or a runner object. Answers are the same.

    Raises:
        ConfigurationError: an unknown runner, or ``"torchrun"`` in a process that torchrun did not start.
        MissingExtraError: ``"ray"`` without the extra.
        LedgerNotFoundError: nothing is recorded there.
        ModelMismatchError: the ledger was recorded from another model.
        StageNotFoundError: no stage ended with the model's weights.
    """

    def stage_effects(
        self,
        behaviors: Sequence[Behavior],
        method: str | Method | Sequence[str | Method] = "auto",
        programs: Mapping[str, Program] | None = None,
    ) -> StageEffects:
        """Effect of each stage: behavior with it minus behavior without it.

        Args:
            behaviors: what to explain.
            method: ``"auto"``, ``"change"``, ``"subtract"``, ``"retrain"``, or several of them.
            programs: for ``retrain``, how each stage after the first is run again: stage name -> function that takes a
                model and returns the trainer that would train it.

        Raises:
            ConfigurationError: an unknown method.
            MissingProgramError: a method needs a program that is not given.
        """
        methods = list(method) if isinstance(method, Sequence) and not isinstance(method, str) else [method]
        return effects.stage_effects(self._view(behaviors, programs), methods)

    def stage_embeddings(self) -> dict[str, Displacement]:
        """One vector per stage, by weight name: what is left of its updates at the end of training. The inner product
        with the gradient of any behavior is the stage's effect on it to first order (method ``"first_order"``)."""
        return {stage.name: FirstOrder().embedding(self._view([]), stage) for stage in self.lineage}

    def shapley(
        self, behaviors: Sequence[Behavior], programs: Mapping[str, Program], merge: int = 2, thin: int = 4
    ) -> StageEffects:
        """Shapley value of each of up to four stages: effects that add up to what all of training changed.

        Args:
            behaviors: what to explain.
            programs: of all stages after the first.
            merge: so many optimizer steps are run again as one.
            thin: one in so many examples of a batch is used.

        Raises:
            ConfigurationError: more than four stages.
            MissingProgramError: a stage after the first has no program.
        """
        return effects.shapley_values(self._view(behaviors, programs), Pace(merge, thin))

    def remove(
        self,
        stage: str,
        improve: Sequence[Behavior],
        keep: Sequence[Behavior] = (),
        *,
        method: str | Method = "replay",
        programs: Mapping[str, Program] | None = None,
        tolerance: float = 0.02,
        scales: Sequence[float] = SCALES,
    ) -> Removal:
        """Find how far to move the weights towards where they would be without a stage. Nothing is changed until
        ``removal.apply(model)``.

        Args:
            stage: to be taken out.
            improve: behaviors that the stage spoils, larger meaning better. The smallest of their means is to become as
                large as possible: pass one behavior per group to improve the worst group.
            keep: behaviors whose means may fall by no more than ``tolerance``, in their units.
            method: that predicts the weights without the stage.
            programs: of the stages after it, for methods that run them again.
            tolerance: for ``keep``.
            scales: of the displacement that are tried.

        Raises:
            ConfigurationError: no such stage led to this model, nothing to improve, or a method without weights.
            AnalysisError: something is missing that the method needs, such as a program.
        """
        chosen = effects.method_of(method)
        search = Search(list(improve), list(keep), tolerance, scales)
        return remove(self._view([*improve, *keep], programs), self._stage(stage), chosen, search)

    def split(
        self,
        stage: str,
        behaviors: Sequence[Behavior],
        *,
        method: str | Method = "replay",
        programs: Mapping[str, Program] | None = None,
        carry: Propagate | None = None,
    ) -> list[Split]:
        """Split a stage's mean effect on each behavior over the stage's steps, examples and data sources.

        Args:
            stage: whose effect.
            behaviors: differentiable behaviors.
            method: that measures the effect, to which the parts are scaled.
            programs: of the stages after it.
            carry: carries the behaviors' gradients back through these stages.

        Raises:
            ConfigurationError: no such stage led to this model.
            AnalysisError: something is missing that a method needs, such as a program.
        """
        view = self._view(behaviors, programs)
        return split(view, self._stage(stage), effects.method_of(method), carry or Propagate())

    def closure(self, programs: Mapping[str, Program]) -> Closure:
        """Run all stages again with nothing removed and compare with the recorded weights.

        Raises:
            MissingProgramError: a stage has no program.
        """
        check_programs(self.lineage, programs)
        self._timeline.check_trainable(self.lineage)
        return closure(self.model, self._view([]).start(self.lineage[0]), self.lineage, programs)

    def report(self, path: str | os.PathLike[str], *results: Result, title: str = "") -> Path:
        """Write the ledger's stages and the given results as one self-contained HTML file; returns its path."""
        blocks = [*ledger_blocks(self.lineage), *(block for result in results for block in result.blocks())]
        subtitle = f"{' → '.join(stage.name for stage in self.lineage)}, recorded in {self.ledger.storage.url}"
        return write_page(path, title or type(self.model).__name__, blocks, subtitle)
