"""A ledger as somebody could have made it: one file changed, sealed anew if wanted, and everything that reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from trainer_attrib import Ledger, Recorder, SketchConfig
from trainer_attrib.ledger.kept import Answers
from trainer_attrib.ledger.overview import overview, tree_lines
from trainer_attrib.ledger.passes import PassFiles, PassReader
from trainer_attrib.ledger.schema import EXAMPLES, ROWS
from trainer_attrib.ledger.storage import digest
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections

MOMENTS = "stages/one/second_moment/version-0001.safetensors"


def model() -> torch.nn.Module:
    """That was recorded."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def make(place: Path) -> None:
    """A small ledger that has every kind of file: two stages, a pass, an answer."""
    trained = model()
    for stage in ("one", "two"):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
        settings = {"sketch": SketchConfig(rank=2), "total_steps": 6, "snapshots": 1}
        with Recorder(place, stage=stage, model=trained, optimizer=optimizer, **settings) as recorder:
            for step in range(6):
                with recorder.batch([f"{step}a", f"{step}b"], texts=["x", "y"], denominator=1):
                    trained(torch.ones(2, 3) * step).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    ledger = Ledger(place)
    made = PassFiles(ledger.stage("one"), "end")
    made.begin("data", 0, "float32", pa.Table.from_pylist([{"example": "a", "source": None, "text": "x"}], EXAMPLES))
    row = {"example": "a", "step": 6, "norm": 1.0, "version": 0, "complete": True, "denominator": 1.0}
    made.add(pa.Table.from_pylist([row], ROWS), np.ones((1, ledger.stage("one").width), np.float32))
    Answers(ledger.storage).keep("kept", [{"kind": "note"}], scores=pa.table({"stage": ["one"], "query 0": [1.0]}))


def read_everything(place: Path) -> None:
    """Whatever of a ledger can be read without knowing what is asked."""
    ledger = Ledger(place)
    tree_lines(overview(ledger))
    for stage in ledger.stages():
        stage.problems(), stage.steps(), stage.skipped_steps(), stage.examples(), stage.sources()
        for block in stage.rows():
            np.asarray(block.sketches[:]).sum()
        for entry in stage.meta["snapshots"]:
            stage.snapshot_step(entry["name"])
            stage.snapshot(entry["name"]), stage.moments(entry["name"]), stage.buffers(entry["name"])
        stage.optimizer_state(), stage.weights_at("start"), stage.weights_at("end")
        plan = SketchPlan.from_dict(stage.meta["plan"])
        for version in stage.meta["versions"]:
            stage.factors(version["version"])
        if {weight.name for weight in plan.weights} <= {name for name, _ in model().named_parameters()}:
            Projections(plan, model())
    for block in PassReader(ledger.stage("one"), ["end"]).rows():
        np.asarray(block.sketches[:]).sum()
    answers = Answers(ledger.storage)
    for answer in answers.listed():
        answers.scores(answer["key"])
    ledger.lineage()


def files(place: Path) -> list[str]:
    """Names of all files, those of the stage that has all kinds of them first."""
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    return [name for name in names if "/." not in name]


@contextmanager
def changed(place: Path, name: str, data: bytes, *, sealed: bool) -> Iterator[None]:
    """The ledger with one file's content replaced; ``sealed`` puts its new length and checksum wherever they are."""
    before = {name: (place / name).read_bytes()}
    if sealed:
        entry = {"bytes": len(data), "blake2b": digest(data)}
        for lists in place.rglob("*.json"):
            text = lists.read_bytes()
            anew = json.dumps(_with_seal(json.loads(text), digest(before[name]), entry)).encode()
            if json.loads(anew) != json.loads(text):
                before[str(lists.relative_to(place))] = text
                lists.write_bytes(anew)
    (place / name).write_bytes(data)
    try:
        yield
    finally:
        for changed_name, text in before.items():
            (place / changed_name).write_bytes(text)


def _with_seal(found: Any, old: str, entry: dict[str, Any]) -> Any:
    if isinstance(found, list):
        return [_with_seal(inner, old, entry) for inner in found]
    if isinstance(found, dict):
        anew = {key: _with_seal(inner, old, entry) for key, inner in found.items()}
        return anew | entry if found.get("blake2b") == old else anew
    return found
