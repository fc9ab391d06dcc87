"""The training that overhead is measured on, and the turns that its runs take: for every environment, whatever records.

Imports torch, transformers and datasets only: a peer's own environment runs the same work (``peer_overhead.py``).
"""

from __future__ import annotations

import ctypes
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

LAYERS, WIDTH, VOCABULARY, BATCH, TOKENS, RANK = 4, 256, 4096, 8, 128, 16
WARM = 3  # rounds not counted
PATIENCE = 600.0  # seconds until a run that waits for a dead one gives up


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


@dataclass
class StepClock:
    """CPU seconds of each of a run's steps: of its thread, and of the whole process meanwhile."""

    run: str
    baton: Baton
    thread: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Wait for the baton, then start."""
        self.baton.wait_for(self.run)
        self._began = time.thread_time(), time.process_time()

    def stop(self) -> None:
        """Stop, then pass the baton."""
        self.thread.append(time.thread_time() - self._began[0])
        self.process.append(time.process_time() - self._began[1])
        self.baton.pass_on()


class First(TrainerCallback):
    """Starts the clock before any other callback sees the step."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.clock.start()


class Last(First):
    """Stops the clock after every other callback has done its work of the step."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the clock runs already."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.clock.stop()


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=VOCABULARY, n_positions=TOKENS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def trainer_for(clock: StepClock, recording: TrainerCallback | None, steps: int, folder: Path) -> Trainer:
    """The same trainer each time, but for the callback that records."""
    tokens = torch.randint(0, VOCABULARY, (BATCH * steps, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=BATCH, max_steps=steps, max_grad_norm=1.0, learning_rate=1e-3,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    callbacks = [First(clock), *([recording] if recording else []), Last(clock)]
    data = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    trainer = Trainer(model=small_gpt2(), args=arguments, train_dataset=data, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def keep_freed_memory() -> None:
    """One heap for all threads that keeps what is freed: else some runs fault more pages in each step than others.

    Only where the C library is glibc. The numbers are those of its malloc.h: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, value in {-8: 1, -4: 0, -1: 2**31 - 1}.items() if mallopt else ():
        mallopt(option, value)


def take_turns(runs: list[str], trainer_of: Callable[[StepClock], Trainer]) -> dict[str, StepClock]:
    """Train one trainer per run, each in a thread of its own, step by step in turn; the clocks of all."""
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    baton = Baton(runs)
    clocks = {run: StepClock(run, baton) for run in runs}
    threads = [threading.Thread(target=trainer_of(clock).train, daemon=True) for clock in clocks.values()]
    for thread, run in zip(threads, runs, strict=True):
        thread.start()
        baton.wait_until_arrived(run)
    for thread in threads:
        thread.join()
    return clocks


def ratios(clocks: dict[str, StepClock], base: str = "plain") -> Iterator[dict[str, Any]]:
    """Each other run's ratio to the base: medians over adjacent steps, with a bootstrap standard error."""
    for run, clock in clocks.items():
        if run == base:
            continue
        thread = [a / b for a, b in zip(clock.thread, clocks[base].thread, strict=True)][WARM:]
        process = [a / b for a, b in zip(clock.process, clocks[base].process, strict=True)][WARM:]
        draw = random.Random(0)
        medians = [statistics.median(draw.choices(thread, k=len(thread))) for _ in range(500)]
        yield {
            "run": run,
            "step": statistics.median(thread),
            "standard error": statistics.stdev(medians),
            "with writer": statistics.median(process),
        }
