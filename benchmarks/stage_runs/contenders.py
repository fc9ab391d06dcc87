"""The methods that are compared: the library's own, as they are by default, and variants. A new one is a line here."""

from __future__ import annotations

from fnmatch import fnmatch

from trainer_attrib.analysis.effects.auto import Auto
from trainer_attrib.analysis.effects.estimate import Method
from trainer_attrib.analysis.effects.replay import Replay
from trainer_attrib.analysis.stage_effects import METHODS

REPLAY, EXACT, AUTO = "replay", "replay 1x1 plain", "auto"  # what targets are about
BUDGET = 0.5  # of auto, so that it cannot retrain

CONTENDERS: dict[str, Method] = {
    **{name: method for name, method in METHODS.items() if name not in (AUTO, "retrain")},
    AUTO: Auto(budget=BUDGET),
    "replay 2x4 diff": Replay(merge=2, thin=4, read_out="diff"),
    "replay 2x4 cv": Replay(merge=2, thin=4, read_out="cv"),
    "replay 2x4 plain": Replay(merge=2, thin=4, read_out="plain"),
    "replay 1x8 diff": Replay(merge=1, thin=8, read_out="diff"),
    "replay 1x8 cv": Replay(merge=1, thin=8, read_out="cv"),
    "replay 1x8 plain": Replay(merge=1, thin=8, read_out="plain"),
    "replay 4x2 diff": Replay(merge=4, thin=2, read_out="diff"),
    EXACT: Replay(merge=1, thin=1, read_out="plain"),
}


def chosen(patterns: str) -> dict[str, Method]:
    """Contenders whose name fits one of the globs, which commas separate."""
    return {n: m for n, m in CONTENDERS.items() if any(fnmatch(n, p.strip()) for p in patterns.split(","))}
