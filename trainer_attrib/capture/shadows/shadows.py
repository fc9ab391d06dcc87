"""All shadows of a stage: checked before it begins, led through its steps, dropped where they fail, then stored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture.messages import logger
from trainer_attrib.capture.optimizer_tap import is_fresh
from trainer_attrib.capture.shadows.origin import find_origin
from trainer_attrib.capture.shadows.parts import PartLoss
from trainer_attrib.capture.shadows.refusals import Asked, asked_shadows, refuse_what_shadows_cannot_follow
from trainer_attrib.capture.shadows.replica import Replica, Team, Trained, factual_gradients
from trainer_attrib.capture.shadows.same_gradients import Norms, SameGradients
from trainer_attrib.capture.shadows.second_pass import RandomStates, Surroundings, random_kept
from trainer_attrib.capture.shadows.twin import group_settings_now
from trainer_attrib.errors import CaptureError
from trainer_attrib.ledger.journal import StageJournal
from trainer_attrib.ledger.links import Link
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.tap.names import buffers_by_name, parameters_by_name


class Shadows:
    """The shadows that were asked for; without any, every call does nothing.

    Args:
        asked: names of earlier stages, or how their shadows are to be trained.
        model: being trained.
        optimizers: of the stage.
        storage: of the ledger.
        quiet: makes a context in which forward passes are not recorded.
        scale: gives by what a loss is multiplied for its backward pass, if it is.
        strict: raise a shadow's fault instead of going on without it.

    Raises:
        ConfigurationError: a kind of training that shadows cannot follow.
    """

    def __init__(
        self,
        asked: Asked,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        storage: Storage,
        *,
        quiet: Callable[[], AbstractContextManager[None]],
        scale: Callable[[], Tensor | None],
        strict: bool = False,
    ) -> None:
        self._asked = asked_shadows(asked)
        self._teams: list[Team] = []
        self._quiet, self._scale, self._strict, self._storage = quiet, scale, strict, storage
        self._others: Sequence[Any] = ()
        self._companions: Sequence[nn.Module] = ()
        self._caveats: list[str] = []
        self._random: RandomStates | None = None
        self._settings: list[dict[str, Any]] = []
        self._handle: Any = None
        self._micro_batches = self._step = 0
        self._journal: StageJournal | None = None
        self._stored: set[int] = set()  # steps of checkpoints
        self._broken = ""  # why the stage broke off
        if self._asked:
            refuse_what_shadows_cannot_follow(model, optimizers)
            self._model, self._optimizer = model, optimizers[0]

    def __bool__(self) -> bool:
        return bool(self._asked)

    def surround(
        self, *, others: Sequence[Any] = (), companions: Sequence[nn.Module] = (), caveats: Sequence[str] = ()
    ) -> None:
        """Tell more of the training, before it begins.

        Args:
            others: objects that computing the loss writes to, beside the model.
            companions: models that hold the weights that the stage begins with and do not train.
            caveats: what to say of these shadows.
        """
        self._others, self._companions, self._caveats = others, companions, list(caveats)

    # ---- a stage begins --------------------------------------------------------------------------------------------

    def prepare(self, link: Link, start: Mapping[str, Tensor]) -> None:
        """Find what each shadow begins with.

        Args:
            link: of the stage to its parent.
            start: the weights that the stage begins with, by name.

        Raises:
            ConfigurationError: a shadow cannot be trained along.
        """
        if not self._asked:
            return
        ledger = Ledger(self._storage.url) if self._storage.exists("ledger.json") else None
        trained, carries = self._trained(start), not is_fresh(self._optimizer)
        for asked in self._asked:
            numbers = range(asked.replicas)
            origins = [find_origin(ledger, link, asked.of, number, trained.parameters) for number in numbers]
            self._teams.append(
                Team(asked, [Replica(asked, n, trained, o, carries=carries) for n, o in enumerate(origins)])
            )

    def prepare_again(self, stage: str, weights: Mapping[str, Tensor]) -> None:
        """The same for a stage that is resumed.

        Args:
            stage: its name.
            weights: the current ones.

        Raises:
            ConfigurationError: as :meth:`prepare`.
        """
        if self._asked:
            recorded = Ledger(self._storage.url).stage(stage)
            self.prepare(Link.of(recorded.meta), {**weights, **recorded.snapshot("start")})

    def open(self, journal: StageJournal, after_step: int) -> None:
        """The stage is open; in one that is resumed, shadows go on from the step after which it is."""
        if not self._asked:
            return
        self._journal, self._step = journal, after_step
        self._next()
        stage = StageReader(self._storage, journal.meta["name"])
        for replica in self._live() if after_step else ():
            found = stage.shadow_state(replica.asked.of, replica.number, after_step)
            if found is None:
                why = f"the stage was resumed after step {after_step}, for which the shadow was not stored"
                self._drop([replica], CaptureError(why))
            else:
                self._attempt([replica], functools.partial(replica.load, *found))
        self._note()

    def attach(self) -> None:
        """See the settings that each step begins with."""
        if self._asked:
            self._handle = self._optimizer.register_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Remove the hook; safe to call twice."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def lines(self) -> list[str]:
        """What they will cost, said before the first step."""
        found = []
        for team in self._teams:
            size = sum(replica.bytes for replica in team.live())
            place = team.asked.device or "the model's device"
            copies = f"{team.asked.replicas} replicas, " if team.asked.replicas > 1 else ""
            found.append(
                f"shadow of '{team.asked.of}': {copies}{size / 1e6:.1f} MB on {place}, and about "
                f"{200 / (team.asked.thin * team.asked.every):.0f}% more forward and backward passes"
            )
        return found

    # ---- steps -----------------------------------------------------------------------------------------------------

    def remember(self) -> None:
        """A micro-batch's forward pass is about to begin: its random numbers are drawn again for the parts."""
        if self._compares():
            self._attempt(self._live(), self._remember)

    @contextmanager
    def around(self, block: AbstractContextManager[None], loss: PartLoss | None) -> Iterator[None]:
        """A micro-batch's block: its loss, if it is known how to compute it again, is offered when the block ends."""
        self.remember()
        step = self._step
        with block:
            yield
            if loss is not None and step == self._step:
                self.offer(loss)

    def offer(self, loss: PartLoss) -> None:
        """A micro-batch was backpropagated: compare gradients on a part of it. Before the optimizer's step."""
        self._micro_batches += 1
        if not self._broken and (live := self._live()):
            self._attempt(live, lambda: self._compare_all(loss))

    def step(self, norms: Norms) -> None:
        """The optimizer took a step, with the gradients that are still there.

        Args:
            norms: of its clipping.
        """
        if live := self._live():
            self._attempt(live, lambda: self._gradients.check(norms))
        for team in self._teams:
            for replica in team.live():
                compared = team.due(self._step)
                step = functools.partial(replica.step, self._micro_batches, norms, self._settings, compared=compared)
                self._attempt([replica], step)
        self._step += 1
        self._next()

    def skip(self) -> None:
        """A gradient scaler skipped the step."""
        self._next()

    # ---- checkpoints and the end -----------------------------------------------------------------------------------

    def checkpoint(self, step: int) -> None:
        """Store what a run that resumes after this step needs."""
        live, journal = self._live(), self._journal
        if journal is not None and live and step not in self._stored:
            self._attempt(live, lambda: journal.keep_shadow_states(step, (replica.state() for replica in live)))
            self._stored.add(step)

    def finish(self) -> None:
        """The stage ran to its end: store the weights of every shadow, unless capture stopped before."""
        if self._broken:
            return
        persistent = set(buffers_by_name(self._model)) if self._asked else set()
        files = {}
        for replica in self._live():

            def store(replica: Replica = replica) -> None:
                assert self._journal is not None
                parts, left_out = replica.stored(persistent)
                kept = self._journal.keep_shadow(replica.asked.of, replica.number, parts)
                files[id(replica)] = kept | {"optimizer_state_left_out": left_out}
                replica.status = "complete"

            self._attempt([replica], store)
        self._note(files)

    def interrupt(self, reason: str) -> None:
        """The stage broke off, or capture stopped."""
        self._broken = reason or "the stage broke off"
        self._note()

    # ---- how -------------------------------------------------------------------------------------------------------

    def _trained(self, start: Mapping[str, Tensor]) -> Trained:
        parameters = parameters_by_name(self._model)
        updated = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        own = {name: p for name, p in parameters.items() if id(p) in updated}
        companions = [
            (name, p)
            for model in self._companions
            for name, p in parameters_by_name(model).items()
            if name in start and p.shape == start[name].shape and torch.equal(p.data, start[name].to(p.device))
        ]
        self._gradients = SameGradients(own.values())
        surroundings = Surroundings(self._model, self._others)
        return Trained(self._model, parameters, own, self._optimizer, surroundings, companions)

    def _compare_all(self, loss: PartLoss) -> None:
        begin, self._random = self._random or self._now(), None
        known: dict[tuple[int, ...], dict[str, Tensor]] = {}  # gradients at the model's weights, by part
        examples = loss.examples
        for team in self._teams:
            turns = team.turns.of(examples) if team.due(self._step) else [[]] * team.asked.replicas
            for replica in team.live():
                replica.seen += examples
                if positions := turns[replica.number]:
                    self._attempt([replica], functools.partial(self._on_part, replica, positions, loss, begin, known))
        self._gradients.backpropagated(self._scale())

    def _on_part(
        self, replica: Replica, positions: list[int], loss: PartLoss, begin: RandomStates, known: dict[Any, Any]
    ) -> None:
        """Compare on these examples of a micro-batch, at its random numbers."""
        scale, key = self._scale(), tuple(positions)
        with self._quiet(), random_kept(replica.trained.devices, begin):
            if key not in known:
                known[key] = factual_gradients(replica.trained, loss, loss.of(positions), scale)
                begin.restore()
            replica.compare(loss.of(positions), len(positions), loss, known[key], scale)
        if len(self._teams) == 1:
            known.clear()

    def _remember(self) -> None:
        self._random = self._now()

    def _now(self) -> RandomStates:
        return RandomStates.now(self._teams[0].replicas[0].trained.devices)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        self._settings = group_settings_now(optimizer)

    def _compares(self) -> bool:
        return not self._broken and any(team.due(self._step) and team.live() for team in self._teams)

    def _next(self) -> None:
        self._micro_batches = 0
        for team in self._teams:
            team.turns.begin(self._step)
            for replica in team.live():
                replica.forget()

    def _live(self) -> list[Replica]:
        return [replica for team in self._teams for replica in team.live()]

    def _attempt(self, replicas: Sequence[Replica], work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as fault:
            self._drop(replicas, fault)

    def _drop(self, replicas: Sequence[Replica], fault: Exception) -> None:
        """Go on without those that are not given up yet, or raise if that is wanted."""
        dropped = [replica for replica in replicas if replica.status == "recording"]
        for replica in dropped:
            replica.drop(f"step {self._step + 1}: {type(fault).__name__}: {fault}")
        if self._strict:
            raise fault
        logger.warning(
            "shadows of %s stopped at step %d; recording and training go on. %s: %s",
            ", ".join(f"'{r.asked.of}' (replica {r.number})" for r in dropped), self._step + 1,
            type(fault).__name__, fault,
        )  # fmt: skip
        with suppress(Exception):  # the disk may be what failed
            self._note()

    def _note(self, files: Mapping[int, dict[str, Any]] | None = None) -> None:
        if self._journal is None or not self._teams:
            return
        replicas = [replica for team in self._teams for replica in team.replicas]
        entries = [r.entry(self._broken) | {"caveats": self._caveats} | (files or {}).get(id(r), {}) for r in replicas]
        self._journal.update(shadows=entries)
