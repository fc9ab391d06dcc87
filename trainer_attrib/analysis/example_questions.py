"""Questions about training examples: which of them made the model say this?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer_attrib.analysis import influence as influences
from trainer_attrib.analysis.across_stages import CarriedQueries
from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.calibration import BETAS, Calibration, Canaries, calibrate
from trainer_attrib.analysis.controls import CONTROLS
from trainer_attrib.analysis.effects.lineage import chosen_stages
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.influence_results import Influence
from trainer_attrib.analysis.opened import Opened
from trainer_attrib.analysis.own_losses import OwnLossMetric
from trainer_attrib.analysis.passes import Pass, Snapshots, sketch, source_of
from trainer_attrib.analysis.programs import Program
from trainer_attrib.analysis.recipes.directional import Directional
from trainer_attrib.analysis.recipes.recipe import Question, Recipe
from trainer_attrib.analysis.recipes.tokens import token_scores
from trainer_attrib.analysis.retrieval.faiss_candidates import Faiss
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.analysis.self_influence import GIVEN, SelfInfluence, given_self_influence, self_influence
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.lance_rows import LanceTables
from trainer_attrib.ledger.passes import PassReader
from trainer_attrib.ledger.reader import StageReader

if TYPE_CHECKING:  # loaded by those who ask
    from trainer_attrib.analysis.checking import Check
    from trainer_attrib.analysis.suspects import Suspects
    from trainer_attrib.analysis.verification import Removed, Verification


class ExampleQuestions(Opened):
    """The half of :class:`trainer_attrib.Analyzer` that scores examples."""

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
        source: str | Snapshots | LanceTables = "training",
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
                end, or ``Snapshots(names)`` (:meth:`sketch` makes what is not there yet); ``LanceTables(urls)``, those
                of training, from exported tables.
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
        question = self._question(behaviors, chosen, data or {}, source, programs)
        carried = None if carry is None else CarriedQueries(question.lineage, behaviors, chosen, carry)
        asked = replace(question, carried=carried, where=where, keep=keep, candidates=candidates)
        return influences.influence(asked, recipe, controls)

    def self_influence(
        self,
        stage: str | None = None,
        metric: str | OwnLossMetric = "fisher",
        data: Mapping[str, Examples] | None = None,
    ) -> SelfInfluence:
        """How much training on each example of a stage changed that very example: mislabelled and odd examples come
        first. No behavior is needed.

        Args:
            stage: the last one by default.
            metric: from the captured rows ``"fisher"``, in the metric of all rows' second moments, or ``"plain"``, the
                squared norm; from given examples ``"leave_one_out"``, the loss that the model would have of an example
                without it, or ``"gauss_newton"``, how much the example lowered its own loss, or an object with their
                settings.
            data: for the last two, all examples of the stage: stage name -> examples.

        Raises:
            ConfigurationError: another metric, or a stage without comparable rows.
            MissingDataError: a metric that needs the examples, without them.
        """
        chosen = self.lineage[-1] if stage is None else self._stage(stage)
        asked = GIVEN.get(metric, metric) if isinstance(metric, str) else metric
        if isinstance(asked, str):
            return self_influence(chosen, asked, self.runner)
        question = Question(self._view([]), [chosen], data or {})
        return given_self_influence(question.lineage, chosen, question.examples_of(chosen, asked.name), asked)

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
        it (:meth:`error_behavior`), by ``recipe`` (``DEFAULT_RECIPE``). See :meth:`influence` for the rest."""
        from trainer_attrib.analysis.suspects import DEFAULT_RECIPE, Suspects

        found = self.influence(behaviors, stages, recipe or DEFAULT_RECIPE, data=data, source=source)
        return Suspects.of(found, k).located(self.lineage).told_by(data or {})

    def verify_removal(self, stage: str, asked: Removed) -> Verification:
        """Train a stage again without its suspects: is the error gone, and what else changed? See
        :func:`~trainer_attrib.analysis.verification.verify_removal`."""
        from trainer_attrib.analysis.verification import verify_removal

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
        from trainer_attrib.analysis.checking import check

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

    def error_behavior(
        self,
        name: str,
        prompts: Sequence[str],
        wrong: Sequence[str],
        right: Sequence[str] = (),
        *,
        tokenizer: Any,
        stage: str | None = None,
        form: str = "auto",
        background: Sequence[tuple[str, str]] = (),
    ) -> Behavior:
        """What to ask about wrong outputs: a behavior that increases with the error, one query per output, in nats.

        Args:
            name: shown in every table.
            prompts: one per query.
            wrong: what the model said.
            right: what it should have said, if that is known.
            tokenizer: of the model.
            stage: suspected of having taught it; the last one by default. Its start is what knowledge is held against.
            form: ``"contrast"``, log-probability of the wrong output minus that of the right one;
                ``"learned"``, of the wrong one's tokens weighted by what the stage added to them; ``"alternative"``,
                the same against the tokens that the model preferred before; ``"background"``, of the wrong
                output minus what it has in common with others; ``"plain"``. ``"auto"``: contrast where right outputs
                are given, else learned, or background if there is one and the stage taught no few tokens above all.
            background: (prompt, completion) of some 50 other outputs of the same kind, mostly right ones.

        Raises:
            BehaviorError: lists of different lengths, or nothing to measure.
            ConfigurationError: an unknown form or stage, or a form without what it needs.
        """
        from trainer_attrib.analysis.error_queries import ErrorQueries

        queries = ErrorQueries(name, prompts, wrong, right, background)
        chosen = self.lineage[-1] if stage is None else self._stage(stage)
        return queries.behavior(self._view([]), chosen, tokenizer, form)

    def calibrate(
        self,
        canaries: Canaries,
        *,
        recipe: str | Recipe = "dda",
        stage: str | None = None,
        data: Mapping[str, Examples] | None = None,
        source: str | Snapshots = "training",
        betas: Sequence[float] = BETAS,
    ) -> Calibration:
        """Fit and judge corrections of scores (debias, denoise, weights of states) on errors whose examples are known.

        Args:
            canaries: errors and the examples that taught them, of other kinds than the questions to come.
            recipe: whose scores are corrected; ``"dda"`` for cosines of captured rows.
            stage: that taught them; the last one by default.
            data: the stage's examples, for recipes that need them.
            source: of rows, as for :meth:`influence`; ``Snapshots(("start", "mid-1", "end"))`` for several states.
            betas: shares of the base model's scores to try taking out.

        Raises:
            ConfigurationError: an unknown recipe or stage, or responsible examples that were not scored.
            AnalysisError: something is missing that the recipe needs.
        """
        chosen = self.lineage[-1] if stage is None else self._stage(stage)
        question = self._question([canaries.behavior], [chosen], data or {}, source)
        return calibrate(question, question.stages[0], canaries, influences.recipe_of(recipe), betas)

    def _question(
        self,
        behaviors: Sequence[Behavior],
        stages: Sequence[StageReader],
        data: Mapping[str, Examples],
        source: str | Snapshots | LanceTables,
        programs: Mapping[str, Program] | None = None,
    ) -> Question:
        """With the rows of passes, made where they are missing, or of exported tables, if the source says so."""
        if isinstance(source, LanceTables):
            stages = [source.reader(stage) for stage in stages]
        elif states := source_of(source):
            scored = {stage.name for stage in stages}
            self.sketch({name: given for name, given in data.items() if name in scored}, states.names)
            stages = [PassReader(stage, states.names) for stage in stages]
        return Question(self._view(behaviors, programs), stages, data)
