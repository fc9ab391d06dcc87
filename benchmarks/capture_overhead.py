"""What recording costs: whole `Trainer` runs with and without the callback, taking turns step by step.

Four trainers train the same 4-layer GPT-2 of width 256 (vocabulary 4096, batch 8 x 128 tokens, float32, one thread,
clipping, fused AdamW): plain, plain once more (the control: its ratio shows the noise), with raw rows, with
AdamW-corrected rows. Each runs in a thread of its own and hands a baton to the next after every optimizer step, so that
adjacent steps are compared and the machine's drift cancels. CPU time is that of the training thread; `with writer` is
that of the whole process meanwhile. Medians over rounds, with a bootstrap standard error; the first are not counted.

The FLOP bound counts the sketches' matrix products over those of the model's training step, attention included.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import report
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from trainer_attrib import SketchConfig
from trainer_attrib.capture.stage_facts import flop_share
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib.tap.plan import plan_sketch

LAYERS, WIDTH, VOCABULARY, BATCH, TOKENS, RANK = 4, 256, 4096, 8, 128, 16
RUNS = {"plain": None, "plain again": None, "raw": "none", "corrected": "factored"}
WARM = 3  # rounds not counted
PATIENCE = 120.0  # seconds until a run that waits for a dead one gives up


class Baton:
    """Lets the runs step one after another, in an order that rotates by one each round."""

    def __init__(self, runs: list[str]) -> None:
        self._runs, self._turn, self._changed = runs, 0, threading.Condition()
        self._arrived: set[str] = set()

    def wait_for(self, run: str) -> None:
        """Wait for one's turn, which comes only when every run has arrived."""
        with self._changed:
            self._arrived.add(run)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._whose() == run, timeout=PATIENCE):
                raise TimeoutError(f"'{run}' waited {PATIENCE} seconds for its turn: another run has died")

    def wait_until_arrived(self, run: str) -> None:
        """Wait for a run's first step, so that runs do not import and set up at the same time."""
        with self._changed:
            if not self._changed.wait_for(lambda: run in self._arrived, timeout=PATIENCE):
                raise TimeoutError(f"'{run}' never began its first step")

    def pass_on(self) -> None:
        """End one's turn."""
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    def _whose(self) -> str | None:
        if len(self._arrived) < len(self._runs):
            return None
        round_, place = divmod(self._turn, len(self._runs))
        return self._runs[(place + round_) % len(self._runs)]


class StepClock(TrainerCallback):
    """CPU time of each of a run's steps: of its thread, and of the whole process meanwhile."""

    def __init__(self, run: str, baton: Baton) -> None:
        self.run, self.baton = run, baton
        self.thread: list[float] = []
        self.process: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the baton, then start."""
        self.baton.wait_for(self.run)
        self._began = time.thread_time(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop, then pass the baton."""
        self.thread.append(time.thread_time() - self._began[0])
        self.process.append(time.process_time() - self._began[1])
        self.baton.pass_on()


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=VOCABULARY, n_positions=TOKENS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def trainer_for(clock: StepClock, steps: int, folder: Path) -> Trainer:
    """The same trainer each time, but for the callback."""
    tokens = torch.randint(0, VOCABULARY, (BATCH * steps, TOKENS), generator=torch.Generator().manual_seed(0))
    callbacks: list[TrainerCallback] = [clock]
    correction = RUNS[clock.run]
    if correction is not None:
        sketch = SketchConfig(rank=RANK, correction=correction)
        callbacks.append(AttributionCallback(folder / "ledger", stage=clock.run, sketch=sketch, strict=True))
    arguments = TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=BATCH, max_steps=steps, max_grad_norm=1.0, learning_rate=1e-3,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=small_gpt2(), args=arguments, train_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def model_flop_bound() -> float:
    """Sketch FLOPs over all matrix products of the model's training step, attention included."""
    plan = plan_sketch(small_gpt2(), SketchConfig(rank=RANK, exclude=("transformer.wpe", "transformer.wte")))
    captured = sum(6 * w.rows * w.columns * len(w.modules) for w in plan.weights)
    attention = LAYERS * 3 * 2 * 2 * TOKENS * WIDTH  # scores and values, forward and twice backward, per token
    return flop_share(plan) * captured / (captured + attention)


def row_of(clock: StepClock, base: StepClock, bound: float) -> dict[str, Any]:
    """One line of the table: medians of the ratios of adjacent steps."""
    thread = [a / b for a, b in zip(clock.thread, base.thread, strict=True)][WARM:]
    process = [a / b for a, b in zip(clock.process, base.process, strict=True)][WARM:]
    draw = random.Random(0)
    medians = [statistics.median(draw.choices(thread, k=len(thread))) for _ in range(500)]
    return {
        "run": clock.run,
        "step": statistics.median(thread),
        "standard error": statistics.stdev(medians),
        "with writer": statistics.median(process),
        "flop bound": 1 + bound if RUNS[clock.run] is not None else 1.0,
    }


def main() -> None:
    chosen = report.options((__doc__ or "").splitlines()[0])
    steps = chosen.seeds or (24 if chosen.quick else 120)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    baton = Baton(list(RUNS))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clocks = {run: StepClock(run, baton) for run in RUNS}
        trainers = [trainer_for(clock, steps, folder) for clock in clocks.values()]
        threads = [threading.Thread(target=trainer.train, daemon=True) for trainer in trainers]
        for thread, run in zip(threads, RUNS, strict=True):
            thread.start()
            baton.wait_until_arrived(run)
        for thread in threads:
            thread.join()
        bound = model_flop_bound()
        rows = [row_of(clock, clocks["plain"], bound) for run, clock in clocks.items() if run != "plain"]
    by_run = {row["run"]: row["step"] for row in rows}
    checks = {
        "capture_overhead_raw": report.check(by_run["raw"], 1.05),
        "capture_overhead_corrected": report.check(by_run["corrected"], 1.07),
    }
    report.publish("capture_overhead", rows, checks, quick=chosen.quick)
    if chosen.quick and max(by_run["raw"], by_run["corrected"]) > 1.25:
        raise SystemExit("capture costs more than a quarter of a step: something is badly slower than it was")


if __name__ == "__main__":
    main()
