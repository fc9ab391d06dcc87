"""What the kill trials interrupt: a small recorded training with checkpoints, a pass over data, a retraining."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.analysis.stages import Classifier, margins, stage_data
from tests.analysis.stages import train as train_again
from trainer_attrib import Analyzer, Examples, Recorder, SketchConfig
from trainer_attrib.analysis import passes
from trainer_attrib.ledger import writer
from trainer_attrib.ledger.journal import StageJournal
from trainer_attrib.ledger.storage import Storage

STEPS, BATCH, SAVE_EVERY = 24, 6, 5
SKETCH = SketchConfig(rank=4, dtype="float32")


def model_of(stage: str, place: Path) -> Classifier:
    """The model as the stage begins."""
    torch.manual_seed(0)
    model = Classifier().double()
    if stage == "second":
        model.load_state_dict(torch.load(place / "first.pt", weights_only=True))
    return model


def optimizer_of(model: Classifier) -> torch.optim.AdamW:
    """AdamW: the stage has second moments, whose files are written while it is recorded."""
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def train(place: Path, stage: str = "second", *, resume: bool = False, recorded_as: str = "") -> None:
    """Train a stage of the ledger in ``place``, from the start or from the last checkpoint; every step's rows are
    ``STEP/ROW``, however often the step is trained.

    Args:
        place: of the ledger, and of weights and checkpoints.
        stage: whose data to train on.
        resume: from the checkpoint.
        recorded_as: the stage's name in the ledger, if it is another.
    """
    model, checkpoint = model_of(stage, place), place / f"{stage}.checkpoint"
    optimizer, done = optimizer_of(model), 0
    if resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["noted"]["step"]
    name, settings = recorded_as or stage, {"sketch": SKETCH, "total_steps": STEPS, "strict": True}
    recorder = Recorder(place / "ledger", stage=name, model=model, optimizer=optimizer, **settings)
    recorder.start(after_step=done)
    x, y = stage_data(stage)
    for step in range(done + 1, STEPS + 1):
        rows = (torch.arange(BATCH) + BATCH * step) % len(x)
        optimizer.zero_grad()
        with recorder.batch([f"{step}/{row}" for row in range(BATCH)], denominator=BATCH):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if step % SAVE_EVERY == 0:
            _save(checkpoint, model, optimizer, recorder.checkpoint())
    recorder.finish()
    torch.save(model.state_dict(), place / f"{stage}.pt")


def _save(path: Path, model: Classifier, optimizer: torch.optim.Optimizer, noted: dict[str, Any]) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "noted": noted}
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def sketch_pass(place: Path) -> None:
    """Sketch the second stage's examples at its end, a part for every two of them."""
    x, y = stage_data("second")
    examples = Examples.of_classes(x, y, ids=[f"second/{i}" for i in range(len(x))], batch_size=2)
    before, passes.PART_BYTES = passes.PART_BYTES, 1
    try:
        Analyzer(place / "ledger", end_of_second(place)).sketch({"second": examples})
    finally:
        passes.PART_BYTES = before


def retrain(place: Path) -> None:
    """Ask what the first stage did, which trains the second one again without it."""
    programs = {"second": lambda model: lambda: train_again(model, "second")}
    Analyzer(place / "ledger", end_of_second(place)).stage_effects([margins()], method="retrain", programs=programs)


def end_of_second(place: Path) -> Classifier:
    """The model after both stages."""
    model = Classifier().double()
    model.load_state_dict(torch.load(place / "second.pt", weights_only=True))
    return model


@contextmanager
def acknowledged(path: Path, *, roll_bytes: int) -> Iterator[None]:
    """Note what is sealed, in order, as soon as the manifest that lists it is on disk; parts are made small.

    A line is the example ids of a part, or the step after which a stage is about to be gone on with. One that is not
    whole was not acknowledged: the process died writing it.
    """
    notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    seal, rolled, write_json = writer.StageWriter._seal, writer.ROLL_BYTES, Storage.write_json
    resume = StageJournal.resume

    def noted_seal(self: writer.StageWriter) -> None:
        rows = [row["example"] for block in self._buffer for row in block.rows]
        seal(self)
        os.write(notes, json.dumps(rows).encode() + b"\n")

    def noted_write(self: Storage, name: str, data: dict[str, Any]) -> None:
        write_json(self, name, data)
        if name.endswith("pass.json"):
            os.write(notes, json.dumps([f"part {n}" for n in range(len(data["parts"]))][-1:]).encode() + b"\n")

    def noted_resume(storage: Storage, name: str, after_step: int, *rest: Any) -> StageJournal:
        os.write(notes, json.dumps(after_step).encode() + b"\n")
        return resume(storage, name, after_step, *rest)

    writer.StageWriter._seal, writer.ROLL_BYTES, Storage.write_json = noted_seal, roll_bytes, noted_write
    StageJournal.resume = staticmethod(noted_resume)
    try:
        yield
    finally:
        writer.StageWriter._seal, writer.ROLL_BYTES, Storage.write_json = seal, rolled, write_json
        StageJournal.resume = staticmethod(resume)
        os.close(notes)


def read_acknowledged(path: Path) -> set[str]:
    """What :func:`acknowledged` noted and is still owed: steps after a checkpoint that a run went on from never became
    part of the model, and are owed again once they are recorded again."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    owed: set[str] = set()
    for noted in map(json.loads, lines):
        if isinstance(noted, int):
            owed = {name for name in owed if int(name.split("/")[0]) <= noted}
        else:
            owed |= {*noted}
    return owed
