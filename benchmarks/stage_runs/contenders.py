"""The methods that are compared. A new one is a line here; those with a name of the library's come by themselves."""

from __future__ import annotations

from fnmatch import fnmatch

from trainer_attrib.analysis.effects.auto import Auto
from trainer_attrib.analysis.effects.estimate import Method
from trainer_attrib.analysis.effects.recorded import Change, Subtract
from trainer_attrib.analysis.effects.replay import Replay
from trainer_attrib.analysis.stage_effects import METHODS

REPLAY, EXACT, AUTO = "replay 2x4 diff", "replay 1x1 plain", "auto"  # what targets are about

CONTENDERS: dict[str, Method] = {
    "change": Change(),
    "subtract": Subtract(),
    REPLAY: Replay(merge=2, thin=4, read_out="diff"),
    "replay 2x4 cv": Replay(merge=2, thin=4, read_out="cv"),
    "replay 2x4 plain": Replay(merge=2, thin=4, read_out="plain"),
    "replay 1x8 diff": Replay(merge=1, thin=8, read_out="diff"),
    "replay 1x8 plain": Replay(merge=1, thin=8, read_out="plain"),
    "replay 4x2 diff": Replay(merge=4, thin=2, read_out="diff"),
    EXACT: Replay(merge=1, thin=1, read_out="plain"),
    AUTO: Auto(budget=0.5),
}
CONTENDERS |= {name: method for name, method in METHODS.items() if name not in (*CONTENDERS, "replay", "retrain")}


def chosen(patterns: str) -> dict[str, Method]:
    """Contenders whose name fits one of the globs, which commas separate."""
    return {n: m for n, m in CONTENDERS.items() if any(fnmatch(n, p.strip()) for p in patterns.split(","))}
