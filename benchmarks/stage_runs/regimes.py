"""What is trained: the same four stages in six regimes of optimizer and later learning rates.

The study that the methods come from gives lengths and the ratios of learning rates, not the rates. They were chosen by
the noise floor alone, to be about the study's: with twice the rate of SGD, or three times that of the language model,
retraining on another order of the data disagrees with itself (Pearson 0.57 for the first stage with SGD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from trainer_attrib import Behavior, Shadow, SketchConfig
from trainer_attrib.analysis.programs import Program

SKETCH = SketchConfig(rank=4, every_n_steps=50)  # rows of examples play no part here


@dataclass(frozen=True)
class Regime:
    """A pipeline's optimizer, and the learning rate and length of each of its four stages.

    Args:
        name: shown in the table.
        pipeline: ``"classifier"`` (Lightning) or ``"language model"`` (transformers).
        optimizer: ``"SGD"`` or ``"AdamW"``.
        rates: peak learning rate of each stage.
        steps: optimizer steps of each stage.
        later: ``"gentle"``, a tenth of the first stage's learning rate, or ``"standard"``, about half of it.
    """

    name: str
    pipeline: str
    optimizer: str
    rates: tuple[float, ...]
    steps: tuple[int, ...]
    later: str

    def shorter(self, by: int) -> Regime:
        """The same with fewer steps."""
        return replace(self, steps=tuple(max(count // by, 1) for count in self.steps))


class Pipeline(Protocol):
    """Four stages of one model, at one regime and seed."""

    stages: Sequence[str]

    def model(self) -> nn.Module:
        """The model before the first stage."""
        ...

    def programs(self, ledger: Path | None = None, order: int = 0) -> dict[str, Program]:
        """How each stage is run.

        Args:
            ledger: where stages are recorded, if they are.
            order: 0 for the recorded order of the data, another number for another order.
        """
        ...

    def behaviors(self) -> list[Behavior]:
        """What is asked, the same queries in each behavior."""
        ...


def _regimes(pipeline: str, short: str, optimizer: str, rate: float) -> list[Regime]:
    gentle = (rate, 0.1 * rate, 0.1 * rate, 0.1 * rate)
    standard = (rate, 0.6 * rate, 0.5 * rate, 0.4 * rate)
    return [
        Regime(f"{short} gentle", pipeline, optimizer, gentle, (200, 60, 60, 40), "gentle"),
        Regime(f"{short} standard", pipeline, optimizer, standard, (200, 100, 100, 80), "standard"),
    ]


REGIMES = (
    *_regimes("classifier", "SGD", "SGD", 0.05),
    *_regimes("classifier", "AdamW", "AdamW", 5e-3),
    *_regimes("language model", "LM AdamW", "AdamW", 3e-3),
)


def recording(callback: Any, ledger: Path, stage: str, earlier: Sequence[str]) -> list[Any]:
    """The callback of either framework that records a stage."""
    shadows = [Shadow(one, thin=4) for one in earlier]
    return [callback(ledger, stage=stage, sketch=SKETCH, strict=True, shadow=shadows)]


def order_seed(seed: int, stage: int, order: int) -> int:
    """Decides the order of a stage's data."""
    return 1_000_000 * order + 1000 * seed + stage
