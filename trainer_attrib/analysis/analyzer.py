"""The analyzer: reads a ledger, moves a model through displacements, measures behaviors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from trainer_attrib.analysis import influence as influences
from trainer_attrib.analysis import stage_effects as effects
from trainer_attrib.analysis.across_stages import CarriedQueries
from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.checking import Check, check
from trainer_attrib.analysis.controls import CONTROLS
from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.estimate import Method
from trainer_attrib.analysis.effects.first_order import FirstOrder
from trainer_attrib.analysis.effects.lineage import Lineage, chosen_stages
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.influence_results import Influence
from trainer_attrib.analysis.passes import Pass, Snapshots, sketch, source_of
from trainer_attrib.analysis.programs import Program, check_programs
from trainer_attrib.analysis.recipes.directional import Directional
from trainer_attrib.analysis.recipes.recipe import Question, Recipe
from trainer_attrib.analysis.recipes.tokens import token_scores
from trainer_attrib.analysis.removal import SCALES, Removal, Search, remove
from trainer_attrib.analysis.replaying import Pace
from trainer_attrib.analysis.results import Result, StageEffects
from trainer_attrib.analysis.retraining import Closure, closure
from trainer_attrib.analysis.retrieval.faiss_candidates import Faiss
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.analysis.split import Split, split
from trainer_attrib.analysis.stage_view import ledger_blocks
from trainer_attrib.analysis.suspects import DEFAULT_RECIPES, Suspects
from trainer_attrib.analysis.timeline import Timeline
from trainer_attrib.analysis.verification import Removed, Verification, verify_removal
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.journal import check_same_model
from trainer_attrib.ledger.links import describe_weights, find_link
from trainer_attrib.ledger.passes import PassReader
from trainer_attrib.ledger.reader import Ledger, StageReader, no_stage_ended_with
from trainer_attrib.report.page import write_page
from trainer_attrib.tap.names import adapter_weights, parameters_by_name


class Analyzer:
    """Answers from a ledger about a model that stands at the end of one of its stages, its adapters merged or not.

    Args:
        ledger: directory or URL that the callbacks recorded to.
        model: the trained model. It is moved while behaviors are measured and is bit-identical afterwards.

    Raises:
        LedgerNotFoundError: nothing is recorded there.
        ModelMismatchError: the ledger was recorded from another model.
        StageNotFoundError: no stage ended with the model's weights.
    """

    def __init__(self, ledger: str | os.PathLike[str], model: nn.Module) -> None:
        self.ledger, self.model = Ledger(ledger), model
        weights = {name: parameter.data for name, parameter in parameters_by_name(model).items()}
        described = describe_weights(weights)
        self.link = find_link(self.ledger.stages(), described, weights, adapter_weights(model))
        if self.link.parent is None:
            check_same_model(self.ledger, described)
            raise no_stage_ended_with(self.ledger, self.link.reason)
        self.lineage: list[StageReader] = self.ledger.ancestry(self.link.parent)
        self._timeline = Timeline(model, self.lineage, self.link)

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

    def influence(
        self,
        behaviors: Sequence[Behavior],
        stages: Sequence[str] | None = None,
        recipe: str | Recipe = "trackstar",
        *,
        data: Mapping[str, Examples] | None = None,
        carry: Propagate | None = None,
        programs: Mapping[str, Program] | None = None,
        controls: Sequence[str] = CONTROLS,
        where: Where | None = None,
        keep: int | None = None,
        source: str | Snapshots = "training",
        candidates: Faiss | None = None,
    ) -> Influence:
        """Scores of training examples for every query.

        Args:
            behaviors: differentiable behaviors; every item is a query.
            stages: names of the stages whose examples are scored; all of the model's lineage by default.
            recipe: ``"trackstar"``, ``"grad_cos"``, ``"grad_dot"`` or ``"tracin"``, from the sketches captured during
                training; ``"unrolled"``, the exact derivative of the training, for a few queries; or a recipe object
                (docs/influence.md has all of them).
            data: the examples of stages, for recipes that need their losses: stage name -> examples.
            carry: carries the behaviors' gradients back through later stages to the end of each scored one, so that
                examples are scored by what is left of them in the final model; without it, gradients at the final
                weights are compared with the rows of every stage.
            programs: for ``carry``, of the stages after the first scored one; for recipes that run stages again, of
                these.
            controls: rankings shown beside the scores: ``"bm25"``, ``"grad_cos"`` (one more look at the rows),
                ``"random"``. What cannot be had, such as a lexical search without the extra ``search``, is said.
                None with ``keep``.
            where: conditions that recorded rows must meet, by source, step or id; others are not read.
            keep: hold the scores of so many examples at either end of each ranking only, for ledgers whose scores do
                not fit into memory. They are the same as without it.
            source: of rows: ``"training"``, those captured then; ``"snapshot"``, those of the given data at the stage's
                end, or ``Snapshots(names)`` (:meth:`sketch` makes what is not there yet).
            candidates: with ``keep``, score only what an approximate index proposes, with its recall in the caveats.

        Raises:
            ConfigurationError: an unknown recipe or source, ``keep`` below 1, ``where`` for a recipe that reads no
                rows, ``candidates`` fewer than ``keep`` or for a recipe that has none, or a stage
                that is not in the model's lineage.
            MissingExtraError: ``candidates`` without the extra ``faiss``.
            NotComparableError: a stage none of whose sketched weights the model has (its adapter was merged since).
        """
        chosen = chosen_stages(self.lineage, stages)
        if keep is not None and keep < 1:
            raise ConfigurationError(f"keep={keep}, at least 1 example has to be kept.", fix="correct this argument.")
        if candidates is not None:
            candidates.check(keep)
        view = self._view(behaviors, programs)
        carried = None if carry is None else CarriedQueries(view, behaviors, chosen, carry)
        if states := source_of(source):
            scored = {stage.name for stage in chosen}
            self.sketch({name: given for name, given in (data or {}).items() if name in scored}, states.names)
            chosen = [PassReader(stage, states.names) for stage in chosen]
        return influences.influence(
            Question(view, chosen, data or {}, carried, where, keep, candidates), recipe, controls
        )

    def suspects(
        self,
        behaviors: Sequence[Behavior],
        stages: Sequence[str] | None = None,
        recipe: str | Recipe | None = None,
        *,
        data: Mapping[str, Examples] | None = None,
        k: int | None = None,
        source: str | Snapshots = "training",
    ) -> Suspects:
        """The examples that most increased an error: :meth:`Suspects.of` the influence on behaviors that *grow* with
        it, by ``recipe`` (``DEFAULT_RECIPES``, as data are given or not). See :meth:`influence` for the rest."""
        chosen = recipe or DEFAULT_RECIPES["given examples" if data else "recorded rows"]
        found = self.influence(behaviors, stages, chosen, data=data, source=source)
        return Suspects.of(found, k).located(self.lineage)

    def verify_removal(self, stage: str, asked: Removed) -> Verification:
        """Train a stage again without its suspects: is the error gone, and what else changed? See
        :func:`~trainer_attrib.analysis.verification.verify_removal`."""
        return verify_removal(self._view, self._stage(stage), asked)

    def sketch(self, data: Mapping[str, Examples], snapshots: Sequence[str] = ("end",)) -> list[Pass]:
        """Rows of given examples at recorded states of the model, for data of which training left none or too few.

        They are stored in the ledger. A pass that broke off goes on where it was, a finished one costs nothing.

        Args:
            data: stage name -> examples.
            snapshots: names of recorded states of these stages.

        Raises:
            ConfigurationError: a stage that did not lead to this model, or a pass begun over other examples.
            StageNotFoundError: no such snapshot.
        """
        view = self._view([])
        return [
            sketch(view, self._stage(n), examples, snapshot) for n, examples in data.items() for snapshot in snapshots
        ]

    def check(
        self, influence: Influence, behaviors: Sequence[Behavior], data: Mapping[str, Examples], k: int = 10
    ) -> Check:
        """Take one optimizer step on each of the top examples of every query and measure what it does, beside BM25's
        top examples and random ones: the cheapest proof that a ranking found causes.

        Args:
            influence: scores from :meth:`influence`.
            behaviors: that it was asked for.
            data: the scored stages' examples: stage name -> examples.
            k: examples per query.

        Raises:
            ConfigurationError: other behaviors than were asked for, or a stage that did not lead to this model.
            MissingDataError: data hold none of the scored examples of a stage.
        """
        return check(self.model, [self._stage(name) for name in data], influence, behaviors, data, k)

    def token_scores(
        self,
        influence: Influence,
        behaviors: Sequence[Behavior],
        data: Mapping[str, Examples],
        *,
        top: int = 5,
        recipe: Directional | None = None,
    ) -> Influence:
        """The same influence, with scores of the tokens of each query's examples at both ends of its ranking: in
        ``token_table()`` and as colors in the report.

        Args:
            influence: of any recipe.
            behaviors: those for which it was asked.
            data: the examples of the scored stages, with losses by token (``Examples.of_texts``, ``of_pairs``).
            top: so many examples at each end.
            recipe: with other settings than the default ones.

        Raises:
            ConfigurationError: the influence is of other queries, or of examples that are not among the given ones.
            MissingDataError: no examples are given for a stage, or they have no losses by token.
        """
        scored = {*influence.examples.stages}
        question = Question(self._view(behaviors), [s for s in self.lineage if s.name in scored], data)
        return token_scores(question, influence, top, recipe or Directional())

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

    def _stage(self, name: str) -> StageReader:
        return chosen_stages(self.lineage, [name])[0]

    def _view(self, behaviors: Sequence[Behavior], programs: Mapping[str, Program] | None = None) -> Lineage:
        return Lineage(self.model, self.lineage, self._timeline, list(behaviors), programs or {})
