"""A training run that has not begun, as a forecast sees it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from trainer_attrib.analysis.programs import Steps


@dataclass(frozen=True)
class TrainingRow:
    """One example of the run's data: how it is called, where it comes from, what it says.

    Args:
        id: unique.
        source: where it comes from.
        prompt: of a pair or a completion; empty for a text.
        chosen: the answer that training makes likelier; the text.
        rejected: the answer that it makes less likely; None where there is none.
    """

    id: str
    source: str | None
    prompt: str
    chosen: str
    rejected: str | None = None

    @property
    def text(self) -> str:
        """All of it."""
        against = "" if self.rejected is None else f"  (not:{self.rejected})"
        return f"{self.prompt}{self.chosen}{against}"


class Run(Protocol):
    """What would train a model, and on what."""

    @property
    def steps(self) -> Steps:
        """Its batches, losses, clipping and optimizer."""
        ...

    @property
    def rates(self) -> Sequence[Sequence[float]]:
        """Learning rates: one list per optimizer step, one rate per parameter group."""
        ...

    @property
    def batch_size(self) -> int:
        """Examples of an optimizer step."""
        ...

    def undisturbed(self) -> AbstractContextManager[None]:
        """Whatever is done inside the block, the run is afterwards as it was: weights, gradients, random numbers, the
        trainer's own notes."""
        ...

    def rows(self) -> Sequence[TrainingRow]:
        """The run's examples, N of them.

        Raises:
            ConfigurationError: they cannot be listed, as those of a stream.
        """
        ...

    def example_loss(self, number: int) -> Tensor:
        """The loss of one example alone, 0-dim, with its gradient; the mean over all examples is what training
        minimizes."""
        ...

    def arranged(self, plan: Any) -> AbstractContextManager[None]:
        """The same run under a plan (:class:`~trainer_attrib.analysis.forecasting.plan.Plan`), inside the block.

        Raises:
            ConfigurationError: this kind of run cannot do what the plan says.
        """
        ...
