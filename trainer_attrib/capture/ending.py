"""How a recording ends: whole, broken off, or after a fault. It always leaves training as it was."""

from __future__ import annotations

from contextlib import suppress

from trainer_attrib.capture.batch import BatchWatch
from trainer_attrib.capture.last_step import LastStep
from trainer_attrib.capture.messages import logger
from trainer_attrib.capture.meter import Meter
from trainer_attrib.capture.open_stage import Recording
from trainer_attrib.capture.shadows.shadows import Shadows
from trainer_attrib.capture.stage_facts import closing_line
from trainer_attrib.capture.step_watch import StepWatch
from trainer_attrib.ledger.journal import StageJournal
from trainer_attrib.ledger.writer import StageWriter
from trainer_attrib.tap.adapters import merged_weights
from trainer_attrib.tap.module_tap import ModuleTap

REPLACED = "weights were changed after its last step (averages, an earlier checkpoint); its end is what they are now"


class Ending:
    """The end of a :class:`capture.recorder.Recorder`'s life."""

    step: int
    fault: Exception | None
    shadows: Shadows
    _strict: bool
    _open: bool
    _running: bool
    _watch: StepWatch
    _tap: ModuleTap
    _batches: BatchWatch
    _stage: Recording
    _journal: StageJournal
    _writer: StageWriter
    _meter: Meter
    _last_step: LastStep

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
            self._stage.name, self.step, type(fault).__name__, fault,
        )  # fmt: skip

    def _detach(self) -> None:
        """Remove every hook. Among several processes steps are still counted, to take turns until the stage closes."""
        self._running = False
        self._tap.detach()
        self._batches.detach()
        self.shadows.detach()
        if self._stage.processes.size == 1 or not self._open:
            self._watch.detach()

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
                self.shadows.interrupt(reason)
                self._journal.update(status="incomplete", reason=reason)

    def _close(self, status: str, reason: str, *, reached_end: bool) -> None:
        """Close an open stage. One that capture dropped out of still gets its end weights, which link its children."""
        if not self._open:
            return
        self._open = False
        known = self.fault
        if self._running:
            self._seal()
        self._detach()
        if self.fault is not None:
            status, reason = "incomplete", self._journal.meta["reason"]
        try:
            if reached_end and not self._stage.processes.agree(self.fault is None) and self.fault is None:
                status, reason = "incomplete", "capture stopped in another process of the training"
            elif reached_end and status == "complete" and (lost := self._lost()):
                status, reason = "incomplete", lost
            if reached_end:
                self.shadows.finish()
            else:
                self.shadows.interrupt(reason)
            self._end(status, reason, reached_end=reached_end)
        except Exception as fault:
            self.fault = self.fault or fault
            with suppress(Exception):
                why = f"it could not be closed as a whole: {type(fault).__name__}: {fault}"
                self._journal.end("incomplete", reason or why, self.step, None)
        if self.fault is None and self._stage.processes.leads:
            sealed, share = self._writer.sealed(), self._meter.share(self._tap)
            logger.info(closing_line(self._stage.name, status, sealed, self._writer.left_out, share))
            if self._journal.meta.get("weights_replaced"):
                logger.info("stage '%s': %s", self._stage.name, REPLACED)
        if self.fault is not None and self.fault is not known:
            if self._strict:
                raise self.fault
            logger.warning("stage '%s' could not be closed as a whole: %s", self._stage.name, self.fault)

    def _lost(self) -> str:
        """What is missing of the steps before the checkpoints that the stage was resumed from."""
        return "; ".join(attempt["lost"] for attempt in self._journal.meta["resumed"] if "lost" in attempt)

    def _end(self, status: str, reason: str, *, reached_end: bool) -> None:
        """Close the journal; with the weights, which all processes describe together, if the end was reached."""
        if not reached_end:
            return self._journal.end(status, reason, self.step, None)
        if self.fault is None and self._last_step.replaced:
            self._journal.update(weights_replaced=True)
        described, _ = self._stage.described()
        merged = () if self._stage.sharded else merged_weights(self._stage.model)
        self._journal.end(status, reason, self.step, self._stage.weights(), described, merged, self._stage.beside())
