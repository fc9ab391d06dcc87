"""Turns what happened between two executed updates of one optimizer into what the ledger keeps of them."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer_attrib.capture import coverage as checks
from trainer_attrib.capture.messages import logger
from trainer_attrib.capture.open_stage import OpenStage
from trainer_attrib.capture.second_moments import SecondMoments
from trainer_attrib.capture.stage_facts import step_row, step_scalars
from trainer_attrib.capture.window import MicroBatch, RowMaker, Window
from trainer_attrib.ledger.schema import Block
from trainer_attrib.tap.plan import WeightPlan


class StepRecorder:
    """Records the steps of one optimizer.

    A step is taken in three turns. :meth:`check` and :meth:`refresh` may need the other processes, so every process
    takes them at the same steps, those whose capture failed without a window; :meth:`write` is each one's own.

    Args:
        stage: what is being recorded.
        number: of the optimizer, among those of the stage.
        optimizer: whose steps they are.
    """

    def __init__(self, stage: OpenStage, number: int, optimizer: Optimizer) -> None:
        self._open, self._stage, self._number, self._optimizer = stage, stage.recording, number, optimizer
        self._parameters = stage.recording.parameters
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        updated = {name: parameter for name, parameter in self._parameters.items() if id(parameter) in owned}
        self._updated = list(updated.values())
        self.weights = [weight for weight in self._stage.plan.weights if weight.name in updated]
        correction, processes = self._stage.sketch.correction, self._stage.processes
        self._moments = SecondMoments(self.weights, optimizer, self._parameters, correction, processes)
        self.count = stage.taken[number]  # steps of this optimizer
        self._version = 0
        self._checked = self._said_not_finite = False
        self._rows: RowMaker | None = None
        self._audited: list[WeightPlan] = []
        self._keep: Tensor | None = None

    def resume(self, step: int) -> None:
        """Continue as if there had been no break: fold in the restored optimizer's second moments."""
        if self._moments.due(step):
            self._refresh(step, present=True)
            self._moments.catch_up(step)

    @property
    def wanted(self) -> bool:
        """Whether the optimizer's next step is captured."""
        return self.count % self._stage.sketch.every_n_steps == 0

    # ---- the turns of a step --------------------------------------------------------------------------------------

    def check(self, window: Window | None) -> None:
        """Until rows were captured once: find out which weights they explain, over all processes."""
        if self._checked:
            return
        processes, plan = self._stage.processes, self._stage.plan
        if processes.size == 1 and (window is None or window.captured() is None):
            if self.count == 1:
                self._say_nothing_fired(window)
            return
        modules = [name for weight in self.weights for name in weight.modules]
        sizes = [plan.width, plan.width, len(modules)]
        make = None if window is None else lambda: self._evidence(window, modules)
        captured, gradients, fired = processes.total(make, self._stage.like, sum(sizes)).split(sizes)
        self._checked = bool(fired.any())
        if window is not None and self._checked:
            skipped = {name: why for micro in window.micro_batches for name, why in micro.record.skipped.items()}
            found = {name for name, count in zip(modules, fired.tolist(), strict=True) if count}
            evidence = checks.Evidence(captured, gradients, found, skipped)
            self._start_rows(checks.check_coverage(plan, self.weights, self._parameters, evidence), captured)
        elif window is not None and self.count == 1:
            self._say_nothing_fired(window)

    def write(self, window: Window, step: int, facts: dict[str, Any]) -> None:
        """Queue the step's block."""
        stage = self._stage
        trained = [micro for micro in window.micro_batches if micro.trained]
        row = step_row(step, self._optimizer, len(trained), self._version)
        row |= {"optimizer": self._number, "rank": stage.processes.rank, **facts}
        told = [p for p in self._updated if not stage.sharded or stage.tells_of(p)]
        gradients = [p.grad for p in told if p.grad is not None and not p.grad.is_sparse]
        scalars, audited = step_scalars(gradients, window), self._audit(window)
        projected = None
        if stage.processes.leads or stage.sharded:
            projected = torch.cat([self._project(w).flatten() for w in stage.plan.weights])
        own = 0 if projected is None else projected.nbytes
        size = own + sum(micro.nbytes for micro in trained)
        if stage.sketch.when_behind == "skip" and trained and not self._open.writer.keeps_up(size):
            self._open.writer.leave_out(step)
            row["captured"], trained, size = False, [], own
        self._open.writer.put(lambda: self._block(row, scalars, audited, projected, trained), size)

    def skip(self, window: Window, step: int, facts: dict[str, Any]) -> None:
        """Queue a step that a gradient scaler skipped: its settings and loss, none of its overflowed gradients."""
        row = step_row(step, self._optimizer, len(window.micro_batches), self._version)
        row |= {"optimizer": self._number, "rank": self._stage.processes.rank, **facts}
        row |= {"skipped": True, "captured": False, "rows": 0, "projected_weights": None}
        scalars = step_scalars([], window)
        self._open.writer.put(lambda: Block(row | {name: float(value) for name, value in scalars.items()}))

    def refresh(self, step: int, *, present: bool) -> None:
        """Fold the current second moments into the projections that the next steps are sketched with, if it is time."""
        if self._moments.due(step):
            self._refresh(step, present=present)

    # ---- parts of a step ------------------------------------------------------------------------------------------

    def _evidence(self, window: Window, modules: list[str]) -> Tensor:
        captured = window.captured()
        if captured is None:
            captured = self._stage.like.new_zeros(self._stage.plan.width)
        gradients = torch.zeros_like(captured)
        for weight in (w for w in self.weights if self._tells_of(w)):
            sketch = checks.gradient_sketch(weight, self._parameters, self._stage.tap.projections)
            gradients[weight.span] = torch.nan if sketch is None else sketch.flatten()
        fired = [sum(m.record.backwards[name] for m in window.micro_batches) for name in modules]
        return torch.cat([captured, gradients, captured.new_tensor(fired)])

    def _start_rows(self, report: checks.Coverage, captured: Tensor) -> None:
        stage = self._stage
        self._audited = [w for w in self.weights if w.name not in report.partial]
        self._keep = checks.keep_columns(stage.plan, self._audited, captured)
        fire = report.expected - len(report.silent)
        self._rows = RowMaker(fire, stage.sketch, stage.plan, stage.describe, stage.processes.rank, self._open.seen)
        self._open.reports[self._number] = report
        report = checks.merged(self._open.reports.values())
        self._open.journal.update(coverage=report.to_dict())
        if stage.processes.leads:
            for line in report.lines():
                logger.info("stage '%s': %s", stage.name, line)

    def _audit(self, window: Window) -> checks.Audit | None:
        """Audit one weight per step, in turn."""
        captured = window.captured()
        if captured is None or not self._audited:
            return None
        weight = self._audited[self.count % len(self._audited)]
        sketch = None
        if self._tells_of(weight):
            sketch = checks.gradient_sketch(weight, self._parameters, self._stage.tap.projections)
            if sketch is None:
                return None
        return checks.Audit(weight.name, captured[weight.span], sketch, alone=self._stage.processes.size == 1)

    def _tells_of(self, weight: WeightPlan) -> bool:
        return self._stage.tells_of(self._parameters[weight.name])

    def _project(self, weight: WeightPlan) -> Tensor:
        if not self._tells_of(weight):
            return self._stage.like.new_zeros(weight.size)
        bias = self._parameters[weight.bias].data if weight.bias else None
        return self._stage.raw.sketch(weight, self._parameters[weight.name].data, bias)

    def _refresh(self, step: int, *, present: bool) -> None:
        journal, tap = self._open.journal, self._stage.tap
        if not (factors := self._moments.factors(self.count, present=present)):  # none yet, or none that can be read
            return journal.update(correction_unavailable=self._moments.unavailable)
        self._version = journal.second_moment(step, factors)
        tap.projections = tap.projections.refreshed(self.weights, factors, self._version)

    def _block(
        self,
        row: dict[str, Any],
        scalars: dict[str, Tensor],
        audited: checks.Audit | None,
        projected: Tensor | None,
        trained: list[MicroBatch],
    ) -> Block:
        """Runs on the writer's thread: the only place that waits for the device."""
        row |= {name: float(value) for name, value in scalars.items()}
        row |= audited.to_row() if audited is not None else {}
        row["projected_weights"] = None if projected is None else projected.float().cpu().numpy().tobytes()
        if row.get("audit_residual", 0.0) > checks.AUDIT_LIMIT:
            logger.warning(
                "step %d: the captured rows explain the gradient of %s only up to a residual of %.3f. Likely causes: "
                "the weight is also used outside its layer, or gradients were changed before the optimizer step.",
                row["step"], row["audit_weight"], row["audit_residual"],
            )  # fmt: skip
        block = self._rows.block(row, trained, self._keep) if self._rows else Block(row | {"rows": 0})
        self._say_not_finite(block)
        return block

    def _say_not_finite(self, block: Block) -> None:
        """Training may survive it, and the run is recorded as it was; once is enough to go and look."""
        broken = [row["example"] for row in block.rows if not isfinite(row["norm"])]
        if broken and not self._said_not_finite:
            self._said_not_finite = True
            logger.warning(
                "stage '%s', step %d: the gradients of %d examples are NaN or infinite (%s, ...). Such rows are kept "
                "without a direction, and left out of every answer; later steps are not reported.",
                self._stage.name, block.step["step"], len(broken), broken[0],
            )  # fmt: skip

    def _say_nothing_fired(self, window: Window | None) -> None:
        """Say why that may be. If forward passes were seen, it is likely code compiled before recording began."""
        micro_batches = [] if window is None else window.micro_batches
        if reasons := {why for micro in micro_batches for why in micro.record.skipped.values()}:
            logger.warning("stage '%s': no layer fired in the first step: %s", self._stage.name, "; ".join(reasons))
        elif micro_batches:
            self._stage.tap.retrace()
            logger.warning(
                "stage '%s': no layer fired in the first step, which has no rows. A model that was compiled and run "
                "before recording began does not see later hooks: it is compiled again from the next step on. To have "
                "every step, begin recording before the first compiled call.", self._stage.name,
            )  # fmt: skip
        else:
            logger.warning(
                "stage '%s': no layer fired in the first step; is the model replaced, or called by a compiled "
                "function? If training does not call it itself, say what the batch is: "
                "`with recorder.batch(content=batch):`", self._stage.name,
            )  # fmt: skip
