"""The recorder watches one stage from inside the training process. Every framework callback is a shell around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture import coverage as checks
from trainer_attrib.capture.batch import BatchWatch
from trainer_attrib.capture.messages import logger, show_messages
from trainer_attrib.capture.meter import Meter
from trainer_attrib.capture.optimizer_tap import OptimizerTap
from trainer_attrib.capture.second_moments import SecondMoments
from trainer_attrib.capture.stage_facts import (
    audited_scalars,
    preflight_lines,
    snapshot_steps,
    stage_facts,
    step_row,
)
from trainer_attrib.capture.window import Describe, Known, MicroBatch, Names, RowMaker, Window
from trainer_attrib.ledger.journal import StageJournal, check_place
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.ledger.schema import Block
from trainer_attrib.ledger.writer import StageWriter
from trainer_attrib.tap.module_tap import ModuleTap
from trainer_attrib.tap.plan import WeightPlan, parameters_by_name, plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.types import Layout, SketchConfig


class Recorder:
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
        optimizer: its optimizer; accelerate's wrapper is fine.
        sketch: how gradients are compressed.
        snapshots: how many snapshots inside the stage, beside its start and end (needs ``total_steps``).
        strict: raise capture faults instead of going on without capture.
        total_steps: optimizer steps of this stage, if known.
        describe: token rows -> texts, to store what each example says; see :data:`capture.window.Describe`.
        layout: which rows of a forward pass form one example.
        facts: anything else to keep in ``stage.json`` (loss, settings), JSON-ready.

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
        layout: Layout = Layout.ROWS,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self._storage = check_place(ledger, stage)
        self._model, self._stage, self._strict = model, stage, strict
        self._sketch = sketch or SketchConfig()
        self._describe, self._facts = describe, dict(facts or {})
        self._optimizer_tap = OptimizerTap(optimizer, self._after_step)
        self._plan = plan_sketch(model, self._sketch)
        self._raw = Projections(self._plan, model)
        self._tap = ModuleTap(model, self._plan, self._raw, self._fault)
        self._parameters = parameters_by_name(model)
        self._snapshot_steps = snapshot_steps(snapshots, total_steps)
        self._window = Window()
        self._batches = BatchWatch(
            model, self._tap, layout, texts=describe is not None, wanted=self._captures, add=self._add,
            attempt=self.attempt,
        )  # fmt: skip
        self._rows: RowMaker | None = None
        self._seen: set[str] = set()
        self._audited: list[WeightPlan] = []
        self._keep: Tensor | None = None
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
        optimizer = self.optimizer
        self._moments = SecondMoments(self._plan, optimizer, self._parameters, self._sketch.correction)
        trainable = {name for name, p in self._parameters.items() if p.requires_grad}
        meta = (
            stage_facts(self._model, optimizer, self._plan, self._sketch, trainable, self._moments.unavailable)
            | self._facts
        )
        if after_step:
            self._journal = StageJournal.resume(self._storage, self._stage, after_step, trainable, meta)
            self._resume(after_step)
        else:
            self._journal = StageJournal.begin(self._storage, self._stage, self._weights(), trainable, meta)
        self._writer = StageWriter(self._storage, f"stages/{self._stage}", self._sketch.dtype)
        for line in preflight_lines(self._stage, self._plan, self._sketch, self._journal.meta):
            logger.info(line)
        self._batches.attach()
        self._tap.attach()
        self._optimizer_tap.attach()
        self._open = self._running = True
        return self

    def _resume(self, step: int) -> None:
        """Continue as if there had been no break: count on, fold in the restored optimizer's second moments."""
        self.step = step
        self._seen = set(Ledger(self._storage.url).stage(self._stage).examples()["example"].to_pylist())
        if self._moments.due(step):
            self._refresh()
            self._moments.catch_up(step)

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

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimizer being watched."""
        return self._optimizer_tap.optimizer

    # ---- what the training loop may tell --------------------------------------------------------------------------

    def batch(
        self,
        ids: Names | None = None,
        *,
        sources: Names | None = None,
        texts: Sequence[str] | None = None,
        denominator: float | None = None,
        content: Any = None,
    ) -> AbstractContextManager[None]:
        """Name the examples of the forward passes inside the block.

        Args:
            ids: one per example; otherwise the content's hash is the id.
            sources: where each example comes from.
            texts: what each example says.
            denominator: by how much the loss divides each example's own loss, where it cannot be measured.
            content: the batch itself, a tensor or any nesting of dicts and lists of them. Give it where the forward
                pass does not go through ``model(...)`` but through its submodules, or several times.
        """
        kept = ids.detach().clone() if isinstance(ids, Tensor) else ids  # the loop may reuse its buffer
        return self._batches.block(Known(kept, sources, texts, denominator), content)

    def note_loss(self, loss: Any) -> None:
        """Add a micro-batch's loss, as backpropagated, to the current step's."""
        if self._running and isinstance(loss, Tensor):
            self._window.losses.append(loss.detach())

    def attempt(self, work: Callable[[], object]) -> None:
        """Run recording work that must not end training: a fault in it is handled like any capture fault."""
        try:
            work()
        except Exception as fault:
            self._fault(fault)

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def _captures(self) -> bool:
        return self._running and self.step % self._sketch.every_n_steps == 0

    def _add(self, micro: MicroBatch) -> None:
        self._window.add(micro)

    def _after_step(self) -> None:
        if not self._running:
            return
        with self._meter.own():
            self.attempt(self._close_window)
        share = self._meter.after_step(self._tap)
        if share is not None and self._running:
            self.attempt(lambda: self._journal.update(overhead=share))
            logger.info("stage '%s': capture took %.1f%% of the first steps' time", self._stage, 100 * share)

    def _close_window(self) -> None:
        self.step += 1
        window, self._window = self._window, Window()
        captured = window.captured()
        trained = [micro for micro in window.micro_batches if micro.trained]
        if captured is not None and self._rows is None:
            self._check_coverage(window, captured)
        elif self._rows is None and self.step == 1:
            logger.warning(
                "stage '%s': no layer fired in the first step; is the model compiled or replaced? If training calls "
                "only submodules of it, say what the batch is: `with recorder.batch(content=batch):`", self._stage,
            )  # fmt: skip
        row = step_row(self.step, self.optimizer, len(trained), self._tap.projections.version)
        row |= {"epoch": self.epoch, "clip_threshold": self.clip_threshold}
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None and not p.grad.is_sparse]
        scalars = audited_scalars(gradients, window.losses, self._audit(captured, row))
        projected = torch.cat([self._project(w).flatten() for w in self._plan.weights])
        self._writer.put(lambda: self._make_block(row, scalars, projected, trained))
        if self._moments.due(self.step):
            self._refresh()
        self._batches.renew()
        if self.step in self._snapshot_steps:
            self._journal.snapshot(f"mid-{self._snapshot_steps.index(self.step) + 1}", self.step, self._weights())

    # ---- parts of a step ------------------------------------------------------------------------------------------

    def _make_block(
        self, row: dict[str, Any], scalars: dict[str, Tensor], projected: Tensor, trained: list[MicroBatch]
    ) -> Block:
        """Runs on the writer's thread: the only place that waits for the device."""
        row |= {name: float(value) for name, value in scalars.items()}
        row["projected_weights"] = projected.float().cpu().numpy().tobytes()
        if row.get("audit_residual", 0.0) > checks.AUDIT_LIMIT:
            logger.warning(
                "step %d: the captured rows explain the gradient of %s only up to a residual of %.3f. Likely causes: "
                "the weight is also used outside its layer, or gradients were changed before the optimizer step.",
                row["step"], row["audit_weight"], row["audit_residual"],
            )  # fmt: skip
        return self._rows.block(row, trained, self._keep) if self._rows else Block(row | {"rows": 0})

    def _check_coverage(self, window: Window, captured: Tensor) -> None:
        report = checks.check_coverage(self._model, self._plan, self._tap.projections, window)
        self._keep = checks.keep_columns(self._plan, report, captured)
        self._audited = [w for w in self._plan.weights if w.name not in report.partial]
        self._rows = RowMaker(report.expected - len(report.silent), self._sketch, self._describe, self._seen)
        self._journal.update(coverage=report.to_dict())
        for line in report.lines():
            logger.info("stage '%s': %s", self._stage, line)

    def _audit(self, captured: Tensor | None, row: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Audit one weight per step, in turn."""
        if captured is None or not self._audited:
            return None
        weight = self._audited[self.step % len(self._audited)]
        row["audit_weight"] = weight.name
        return checks.audit(weight, captured, self._parameters, self._tap.projections)

    def _project(self, weight: WeightPlan) -> Tensor:
        bias = self._parameters[weight.bias].data if weight.bias else None
        return self._raw.sketch(weight, self._parameters[weight.name].data, bias)

    def _refresh(self) -> None:
        """Fold the current second moments into the projections that the next steps are sketched with."""
        if not (factors := self._moments.factors()):  # none yet, or none that can be read
            return self._journal.update(correction_unavailable=self._moments.unavailable)
        version = self._journal.second_moment(self.step, factors)
        self._tap.projections = Projections(self._plan, self._model, factors, version)

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self._parameters.items()}

    # ---- faults ---------------------------------------------------------------------------------------------------

    def _fault(self, fault: Exception) -> None:
        """Report once, stop capturing, let training go on (or raise, if strict)."""
        if not self._running:
            return
        self.fault = fault
        self._seal()
        if self._strict:
            raise fault
        logger.warning(
            "stage '%s': capture stopped at step %d and training goes on. %s: %s. What was sealed is kept; the stage "
            "is marked incomplete. Pass strict=True to raise instead.",
            self._stage, self.step, type(fault).__name__, fault,
        )  # fmt: skip

    def _detach(self) -> None:
        self._running = False
        self._tap.detach()
        self._optimizer_tap.detach()
        self._batches.detach()

    def _seal(self) -> None:
        """Remove the hooks and seal what was captured, whatever else fails."""
        self._detach()
        try:
            self._writer.close()
        except Exception as fault:
            self.fault = self.fault or fault
        if self.fault is not None:
            reason = f"capture fault at step {self.step}: {type(self.fault).__name__}: {self.fault}"
            with suppress(Exception):  # the disk may be what failed; the caller hears of the first fault
                self._journal.update(status="incomplete", reason=reason)

    def _close(self, status: str, reason: str, *, reached_end: bool) -> None:
        """Close an open stage. One that capture dropped out of still gets its end weights, which link its children."""
        if not self._open:
            return
        self._open = False
        known = self.fault
        if self._running:
            self._seal()
        if self.fault is not None:
            status, reason = "incomplete", self._journal.meta["reason"]
        try:
            self._journal.end(status, reason, self.step, self._weights() if reached_end else None)
        except Exception as fault:
            self.fault = self.fault or fault
        if self.fault is not None and self.fault is not known:
            if self._strict:
                raise self.fault
            logger.warning("stage '%s' could not be closed as a whole: %s", self._stage, self.fault)
