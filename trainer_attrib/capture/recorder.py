"""The recorder watches one stage from inside the training process. Every framework callback is a shell around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

from torch import Tensor, nn

from trainer_attrib.capture.batch import BatchWatch
from trainer_attrib.capture.discarded import DiscardedGradients
from trainer_attrib.capture.ending import Ending
from trainer_attrib.capture.last_step import LastStep
from trainer_attrib.capture.loss_facts import loss_facts
from trainer_attrib.capture.messages import logger, show_messages
from trainer_attrib.capture.meter import Meter
from trainer_attrib.capture.open_stage import Recording, open_stage
from trainer_attrib.capture.processes import Processes
from trainer_attrib.capture.refusals import refuse_unknown_parallelism
from trainer_attrib.capture.scalars import scalars_of
from trainer_attrib.capture.shadows.parts import PartLoss
from trainer_attrib.capture.shadows.refusals import Asked
from trainer_attrib.capture.shadows.shadows import Shadows
from trainer_attrib.capture.stage_facts import preflight_lines, snapshot_steps
from trainer_attrib.capture.step_recorder import StepRecorder
from trainer_attrib.capture.step_watch import StepWatch
from trainer_attrib.capture.window import Describe, Known, MicroBatch, Names, Window
from trainer_attrib.ledger.journal import check_place
from trainer_attrib.tap.module_tap import ModuleTap
from trainer_attrib.tap.plan import WeightPlan, plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.types import LossForm, SketchConfig


class Recorder(Ending):
    """Records one training stage into a ledger.

    Use it as a context manager around any loop; capture needs no further call, ``batch`` only adds what you know::

        with Recorder("runs/chat", stage="pretrain", model=model, optimizer=optimizer) as recorder:
            for batch in loader:
                with recorder.batch(ids=batch["id"]):
                    loss_of(model, batch).backward()
                optimizer.step()

    Training is left bit-identical. A fault inside the recorder is reported once, the stage is closed as incomplete and
    training goes on, unless ``strict``.

    Args:
        ledger: directory or fsspec URL; created if needed.
        stage: name of this stage, new in the ledger.
        model: the model being trained.
        optimizer: its optimizer, or several over disjoint parameters; accelerate's wrapper is fine. Steps are counted
            over all of them, and a step's rows hold the gradients that its optimizer used.
        sketch: how gradients are compressed.
        snapshots: how many snapshots inside the stage, beside its start and end (needs ``total_steps``).
        strict: raise capture faults instead of going on without capture.
        total_steps: optimizer steps of this stage, if known.
        describe: token rows -> texts, to store what each example says; see :data:`capture.window.Describe`.
        loss: how the loss is made of examples: which rows of a forward pass form one, whether they are coupled.
        facts: anything else to keep in ``stage.json`` (loss, settings), JSON-ready.
        shadow: earlier stages without which weights are trained along (docs/recording.md): names, or
            :class:`types.Shadow`. Needs to know how the loss is computed, see :meth:`batch`.
        scaler: the gradient scaler that multiplies the loss, if there is one; that of accelerate's wrapper is found.

    Raises:
        ConfigurationError, LedgerError, UnsupportedLayerError: only from the constructor and from :meth:`start`,
            that is before the first step.
    """

    def __init__(
        self,
        ledger: str | os.PathLike[str],
        *,
        stage: str,
        model: nn.Module,
        optimizer: Any,
        sketch: SketchConfig | None = None,
        snapshots: int = 3,
        strict: bool = False,
        total_steps: int | None = None,
        describe: Describe | None = None,
        loss: LossForm | None = None,
        facts: dict[str, Any] | None = None,
        scaler: Any = None,
        shadow: Asked = (),
    ) -> None:
        storage, sketch, loss = check_place(ledger, stage), sketch or SketchConfig(), loss or LossForm()
        self._strict, self._sides = strict, loss.layout.sides
        self._watch = StepWatch(optimizer, scaler, self._after_step, self._after_skip)
        refuse_unknown_parallelism(model, self._watch.optimizers)
        plan = plan_sketch(model, sketch, self._watch.owners)
        raw = Projections(plan, model)
        self._tap = ModuleTap(model, plan, raw, self._fault)
        self._tap.passes.begins = self._backward_begins
        self._stage = Recording(
            storage, stage, model, self._watch.optimizers, plan, sketch, raw, self._tap, Processes.current(), describe,
            loss_facts(loss, model) | (facts or {}),
        )  # fmt: skip
        self._snapshot_steps = snapshot_steps(snapshots, total_steps)
        self._window = Window()
        self._discarded = DiscardedGradients(plan, self._stage.parameters)
        self._tap.passes.ended = self._discarded.pass_ended
        self._batches = BatchWatch(
            model, self._tap, loss, texts=describe is not None, wanted=self._captures, add=self._add,
            attempt=self.attempt,
        )  # fmt: skip
        self.shadows = Shadows(
            shadow, model, self._watch.optimizers, storage, quiet=self._batches.muted, strict=strict,
            scale=lambda: self._watch.loss_scale(self._stage.like),
        )  # fmt: skip
        self._open = self._running = False
        self._meter = Meter()
        self.step = 0
        self.epoch: float | None = None
        self.clip_threshold: float | None = None
        self.fault: Exception | None = None

    # ---- life ---------------------------------------------------------------------------------------------------

    def start(self, after_step: int = 0) -> Self:
        """Open the stage and attach every hook.

        Args:
            after_step: go on with a stage of this name that broke off, from a checkpoint taken after this step.
        """
        show_messages()
        stage = open_stage(self._stage, self.shadows, after_step)
        self._journal, self._writer = stage.journal, stage.writer
        self._steps = [
            StepRecorder(stage, number, optimizer) for number, optimizer in enumerate(self._watch.optimizers)
        ]
        self.step = after_step
        for steps in self._steps if after_step else ():
            steps.resume(after_step)
        if self._stage.processes.leads:
            for line in preflight_lines(self._stage.name, self._stage.plan, self._stage.sketch, self._journal.meta):
                logger.info(line)
            for line in self.shadows.lines():
                logger.info("stage '%s': %s", self._stage.name, line)
        trained = [weight for name, weight in self._stage.parameters.items() if name in self._stage.trainable]
        self._last_step = LastStep(trained)
        self._batches.attach()
        self._tap.attach()
        self._watch.attach()
        self.shadows.attach()
        self._open = self._running = True
        return self

    def finish(self) -> None:
        """The stage ran to its end: seal the parts, store the end snapshot."""
        self._close("complete", "", reached_end=True)

    def interrupt(self, reason: str) -> None:
        """The stage broke off: seal what there is, mark it incomplete."""
        self._close("incomplete", reason, reached_end=False)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.finish()
        else:
            self.interrupt(f"{type(error).__name__}: {error}")

    # ---- what the training loop may tell --------------------------------------------------------------------------

    def batch(
        self,
        ids: Names | None = None,
        *,
        sources: Names | None = None,
        texts: Sequence[str] | None = None,
        denominator: float | None = None,
        content: Any = None,
        if_they_fit: bool = False,
        loss: Callable[[Any], Tensor] | None = None,
        of: Any = None,
    ) -> AbstractContextManager[None]:
        """Name the examples of the forward passes inside the block.

        Args:
            ids: one per example; otherwise the content's hash is the id.
            sources: where each example comes from.
            texts: what each example says.
            denominator: by how much the loss divides each example's own loss, where it cannot be measured.
            content: the batch itself, a tensor or any nesting of dicts and lists of them. Give it where the forward
                pass does not go through ``model(...)`` but through its submodules, or several times.
            if_they_fit: name the examples by content where ids do not fit their number; otherwise that is a fault.
            loss: for shadows: computes the loss again, as it is backpropagated, on a part of ``of``; called when the
                block ends, which must be after the backward pass and before the optimizer's step.
            of: for shadows: the batch, tensors with examples along the first axis in any nesting of dicts and lists.
        """
        kept = ids.detach().clone() if isinstance(ids, Tensor) else ids  # the loop may reuse its buffer
        block = self._batches.block(Known(kept, sources, texts, denominator, if_they_fit), content)
        if not self.shadows:
            return block
        part = None if loss is None else PartLoss(of, loss, self._sides)
        return self.shadows.around(block, part)

    def note_loss(self, loss: Any) -> None:
        """Add a micro-batch's loss to the current step's: as backpropagated, but before a scaler multiplied it."""
        if self._running and isinstance(loss, Tensor):
            self._window.losses.append(loss.detach())

    def checkpoint(self) -> dict[str, Any]:
        """What a run that resumes from a checkpoint taken now needs in order to go on with this stage; JSON-ready.

        Everything recorded so far is sealed first, so that even a machine that dies afterwards loses nothing of it.
        ``began`` tells recordings of the same name apart. A recorder whose capture broke down returns {}: the steps
        since then are missing, and the stage cannot be gone on with.
        """
        if self._running:
            self.attempt(self._writer.flush)
        if self.fault is not None:
            return {}
        self.shadows.checkpoint(self.step)
        return {"stage": self._stage.name, "step": self.step, "began": self._journal.meta["began"]}

    def scalars(self) -> dict[str, float]:
        """How the recording is doing, named ``trainer_attrib/...`` for a tracker (:func:`capture.scalars.scalars_of`).

        Empty before the stage is open, and once it is closed or capture has stopped. In one process of several it tells
        of that process's rows.
        """
        if not self._running:
            return {}
        return scalars_of(self._writer, self._journal.meta, self._meter.share(self._tap))

    def note_gradient_norm(self, before_clipping: Any, threshold: float) -> None:
        """Tell the norm that clipping measured, to save measuring it again. Over all parameters of one optimizer.

        Args:
            before_clipping: 0-dim tensor.
            threshold: to which it was clipped; infinite for no clipping.
        """
        if self._running and len(self._steps) == 1 and isinstance(before_clipping, Tensor):
            self._window.norms.append((before_clipping.detach(), threshold))

    def attempt(self, work: Callable[[], object]) -> None:
        """Run recording work that must not end training: a fault in it is handled like any capture fault."""
        try:
            work()
        except Exception as fault:
            self._fault(fault)

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def _captures(self) -> bool:
        return self._running and any(steps.wanted for steps in self._steps)

    def _add(self, micro: MicroBatch) -> None:
        self._window.add(micro)

    def _backward_begins(self) -> None:
        self._tap.loss_scale = self._watch.loss_scale(self._stage.like)
        self._discarded.forget(self._window)

    def _after_skip(self, number: int) -> None:
        """A gradient scaler found an overflow and skipped a step of one of the optimizers: it trained nothing."""
        if self._running:
            self.attempt(lambda: self._skip(self._steps[number]))

    def _skip(self, steps: StepRecorder) -> None:
        window = self._window.take(self._taken(steps))
        steps.skip(window, self.step, {"epoch": self.epoch})
        self.shadows.skip()
        self._batches.renew()

    def _taken(self, steps: StepRecorder) -> list[WeightPlan] | None:
        return None if len(self._steps) == 1 else steps.weights

    def _after_step(self, number: int) -> None:
        """An update of one of the optimizers was executed."""
        if not self._open:
            return
        with self._meter.own():
            self._close_window(number)
        share = self._meter.after_step(self._tap)
        if share is not None and self._running:
            self.attempt(lambda: self._journal.update(overhead=share))
            if self._stage.processes.leads:
                percent = 100 * share
                logger.info("stage '%s': capture took %.1f%% of the first steps' time", self._stage.name, percent)

    def _close_window(self, number: int) -> None:
        """Turn what happened since the optimizer's last step into a block.

        What several processes do together is done by a process whose capture failed too, without a window: the others
        would wait for it.
        """
        if self._running:
            self.attempt(lambda: self._watch.refuse_compiled(self._tap.traced))
        steps = self._steps[number]
        captured = self._running and steps.wanted
        self.step += 1
        window = self._window.take(self._taken(steps))
        if not captured:  # another optimizer's steps are, or it would be empty
            window.micro_batches = []
        steps.count += 1
        if self._running and self.shadows:
            self.attempt(lambda: self.shadows.step(window.norms))
        if captured or self._stage.processes.size > 1:
            self.attempt(lambda: steps.check(window if self._running else None))
        if self._running:
            facts = {"epoch": self.epoch, "clip_threshold": self.clip_threshold}
            self.attempt(lambda: steps.write(window, self.step, facts))
        if self._running or self._stage.sharded:
            self.attempt(lambda: steps.refresh(self.step, present=self._running))
        if self._running:
            self.attempt(self._batches.renew)
            self.attempt(self._last_step.note)
        if self.step in self._snapshot_steps and (self._running or self._stage.sharded):
            self.attempt(self._snapshot)  # of shards every process stores its own, until all know that one has stopped

    def _snapshot(self) -> None:
        if not self._stage.processes.broken:
            name = f"mid-{self._snapshot_steps.index(self.step) + 1}"
            self._journal.snapshot(name, self.step, self._stage.weights(), self._stage.beside())
