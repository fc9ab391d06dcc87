"""One trial of each phase: work that is killed, what it left, and the same gone on with to its end."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import killing, verdict, work

FEW_BYTES, ONE_BYTE = 12_000, 1  # of a part before it is sealed: some steps, or a part for every step
Found = dict[str, int]


class Trials:
    """A finished run to start from, and a trial of each phase.

    Args:
        place: a folder for ledgers.
        seed: of the moments.
    """

    def __init__(self, place: Path, seed: int) -> None:
        self._place, self._chance = place, random.Random(seed)
        self.moments: list[str] = []
        self._before, self._whole = place / "before", place / "whole"
        self._before.mkdir()
        killing.import_what_it_imports(partial(work.train, self._before, "first"))
        shutil.copytree(self._before, self._whole)
        self._extents: dict[str, killing.Extent] = {}
        self._extents["training"] = killing.measured(partial(self._train, self._whole, ONE_BYTE))
        (self._whole / "notes").unlink()
        self._expected = killing.run(partial(verdict.reference, self._whole))
        self._files = _contents(self._whole / "ledger")

    def capture(self) -> Found:
        """Killed anywhere in the training, parts of a few steps."""
        return self._killed_training(FEW_BYTES)

    def sealing(self) -> Found:
        """Killed anywhere in a training that seals every step."""
        return self._killed_training(ONE_BYTE)

    def resume(self) -> Found:
        """Killed, and killed again while going on."""
        return self._killed_training(ONE_BYTE, twice=True)

    def sketch_pass(self) -> Found:
        """Killed in a pass over data; the pass goes on."""
        place = self._copy(self._whole)
        if "pass" not in self._extents:
            self._extents["pass"] = killing.measured(partial(work.sketch_pass, self._copy(self._whole)))

        def noted() -> None:
            with work.acknowledged(place / "notes", roll_bytes=FEW_BYTES):
                work.sketch_pass(place)

        self._kill(noted, "pass")
        owed = work.read_acknowledged(place / "notes")
        found = killing.run(partial(verdict.look_at_pass, place, owed, finished=False))
        killing.run(partial(work.sketch_pass, place))
        return _worst(found, killing.run(partial(verdict.look_at_pass, place, owed, finished=True)))

    def retraining(self) -> Found:
        """Killed while the analyzer trains a stage again: the ledger is what it was, to the byte."""
        place = self._copy(self._whole)
        if "retraining" not in self._extents:
            self._extents["retraining"] = killing.measured(partial(work.retrain, place))
        self._kill(partial(work.retrain, place), "retraining")
        changed = _contents(place / "ledger") != self._files
        found = killing.run(partial(verdict.look, place, "second", self._expected, verdict.ALL_ROWS))
        return {**found, "corrupt": found["corrupt"] + changed}

    def _killed_training(self, roll: int, *, twice: bool = False) -> Found:
        place = self._copy(self._before)
        self._kill(partial(self._train, place, roll), "training")
        if twice and _can_resume(place):
            self._kill(partial(self._train, place, roll, resume=True), "training", early=0.6)
        owed = work.read_acknowledged(place / "notes")
        found = killing.run(partial(verdict.look, place, "second", self._expected, owed))
        stage = self._go_on(place)
        return _worst(found, killing.run(partial(verdict.look_at_whole, place, stage, self._expected)))

    def _go_on(self, place: Path) -> str:
        """What a person does after a crash: resume from the last checkpoint; without one, begin anew, under another
        name if the stage has been opened."""
        if _status(place) == "complete":
            return "second"
        if _can_resume(place):
            killing.run(partial(self._train, place, FEW_BYTES, resume=True))
            return "second"
        stage = "again" if (place / "ledger/stages/second/stage.json").exists() else "second"
        killing.run(partial(work.train, place, "second", recorded_as=stage))
        return stage

    def _train(self, place: Path, roll: int, *, resume: bool = False) -> None:
        with work.acknowledged(place / "notes", roll_bytes=roll):
            work.train(place, resume=resume)

    def _kill(self, job: Callable[[], Any], kind: str, *, early: float = 1.0) -> None:
        moment = self._extents[kind].moment(self._chance, early=early)
        self.moments.append(str(moment))
        killing.kill(job, moment)

    def _copy(self, of: Path) -> Path:
        return Path(shutil.copytree(of, Path(tempfile.mkdtemp(dir=self._place)) / "place"))


PHASES: dict[str, Callable[[Trials], Found]] = {
    "capture": Trials.capture, "sealing": Trials.sealing, "resume": Trials.resume,
    "sketch pass": Trials.sketch_pass, "retraining": Trials.retraining,
}  # fmt: skip


def _worst(*found: Found) -> Found:
    return {name: min(f[name] for f in found) if name == "opened" else max(f[name] for f in found) for name in found[0]}


def _status(place: Path) -> str:
    path = place / "ledger/stages/second/stage.json"
    return json.loads(path.read_text())["status"] if path.exists() else ""


def _can_resume(place: Path) -> bool:
    return (place / "second.checkpoint").exists() and _status(place) != "complete"


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
