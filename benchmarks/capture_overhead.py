"""What recording costs: the same `Trainer` run with and without the callback, in turn.

A 4-layer GPT-2 of width 256 (vocabulary 4096, batch 8 x 128 tokens, float32, one thread, clipping, fused AdamW) is
trained for a few steps again and again: plain, plain once more (the control, which shows the noise), raw rows, rows with
the AdamW correction. Per run the median CPU time of a step; per round the ratio to that round's plain run; over rounds
the median. `step` is the time of the training thread, `process` includes the writer's thread.

The FLOP bound counts the sketches' matrix products over those of the whole model's forward and backward pass.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import statistics
import tempfile
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
WARM = 2  # steps not counted


class StepClock(TrainerCallback):
    """CPU time of each optimizer step, of the training thread and of the whole process."""

    def __init__(self) -> None:
        self.thread: list[float] = []
        self.process: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.thread_time(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.thread.append(time.thread_time() - self._began[0])
        self.process.append(time.process_time() - self._began[1])


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=VOCABULARY, n_positions=TOKENS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def run(steps: int, correction: str | None, folder: Path) -> tuple[float, float]:
    """Median CPU seconds of a step: training thread, whole process."""
    tokens = torch.randint(0, VOCABULARY, (BATCH * steps, TOKENS), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    clock = StepClock()
    callbacks: list[TrainerCallback] = [clock]
    if correction is not None:
        sketch = SketchConfig(rank=RANK, correction=correction)
        callbacks.append(AttributionCallback(folder / "ledger", stage="bench", sketch=sketch, strict=True))
    arguments = TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=BATCH, max_steps=steps, max_grad_norm=1.0, learning_rate=1e-3,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=small_gpt2(), args=arguments, train_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return statistics.median(clock.thread[WARM:]), statistics.median(clock.process[WARM:])


def model_flop_bound() -> float:
    """Sketch FLOPs over all matrix products of the model's training step, attention included."""
    model = small_gpt2()
    plan = plan_sketch(model, SketchConfig(rank=RANK, exclude=("transformer.wpe", "transformer.wte")))
    captured = sum(6 * w.rows * w.columns * len(w.modules) for w in plan.weights)
    attention = LAYERS * 3 * 2 * 2 * TOKENS * WIDTH  # scores and values, forward and twice backward, per token
    return flop_share(plan) * captured / (captured + attention)


def main() -> None:
    chosen = report.options(__doc__.splitlines()[0])
    rounds, steps = chosen.seeds or (3 if chosen.quick else 9), (8 if chosen.quick else 14)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    kinds = {"plain": None, "plain again": None, "raw": "none", "corrected": "factored"}
    run(4, "factored", Path(tempfile.mkdtemp()))  # imports, allocator, first use of every kernel
    ratios: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds if kind != "plain"}
    for round_ in range(rounds):
        measured = {}
        order = list(kinds.items())
        for kind, correction in order[round_ % len(order) :] + order[: round_ % len(order)]:
            folder = Path(tempfile.mkdtemp())
            measured[kind] = run(steps, correction, folder)
            shutil.rmtree(folder)
        base = measured["plain"]
        for kind in ratios:
            ratios[kind].append((measured[kind][0] / base[0], measured[kind][1] / base[1]))
    bound = model_flop_bound()
    rows = [
        {
            "run": kind,
            "step": statistics.median(r[0] for r in found),
            "step min": min(r[0] for r in found),
            "step max": max(r[0] for r in found),
            "process": statistics.median(r[1] for r in found),
            "flop bound": 1.0 if kind == "plain again" else 1 + bound,
        }
        for kind, found in ratios.items()
    ]
    checks = {
        "capture_overhead_raw": report.check(statistics.median(r[0] for r in ratios["raw"]), 1.05),
        "capture_overhead_corrected": report.check(statistics.median(r[0] for r in ratios["corrected"]), 1.07),
    }
    report.publish("capture_overhead", rows, checks, quick=chosen.quick)
    if chosen.quick and max(check["value"] for check in checks.values()) > 1.25:
        raise SystemExit("capture costs more than a quarter of a step: something is badly slower than it was")


if __name__ == "__main__":
    main()
