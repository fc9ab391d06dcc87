"""Programs: how a stage is run again, as a whole by its own trainer or step by step by the analyzer.

A ledger records what training did, not the code and data that did it. A program is that code: a function that takes a
model and returns what would train that very object. The analyzer can let it train (``train()``, or a call), or drive
it one optimizer step at a time through :class:`Steps`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.errors import MissingProgramError
from trainer_attrib.ledger.reader import StageReader

Program = Callable[[Any], Any]
"""Takes a model, returns what would train that very object: an object with ``train()``, or a function to call. To be
run step by step it must be a trainer of a known framework, or :class:`Steps` itself (``Loop``, ``Fit``)."""

Loss = Callable[[], Tensor]
"""Computes the loss of one micro-batch at the model's present weights, 0-dim, with its gradient."""


@dataclass(frozen=True)
class Step:
    """One optimizer step's batch.

    Args:
        losses: one per micro-batch; the step's gradient is the sum of theirs, before clipping.
        share: which part of the examples that training used they hold.
    """

    losses: Sequence[Loss]
    share: float = 1.0


@runtime_checkable
class Steps(Protocol):
    """A stage that can be run again from outside, one optimizer step at a time, on the model given to its program."""

    model: nn.Module

    def steps(self, thin: int = 1) -> Iterator[Step]:
        """The stage's batches in the order of training, without an end of their own: the caller stops after as many as
        were recorded. Random numbers are drawn as training draws them, so that from the same random state the same
        batches come.

        Args:
            thin: keep about one in ``thin`` of a step's examples, at least one; losses are means over those kept.
        """
        ...

    def clip(self) -> None:
        """Clip the gradients as training does before a step, if it does."""
        ...

    def optimizer(self) -> Optimizer:
        """A new optimizer as training would begin with, for classes that are not torch's own."""
        ...


_DRIVERS = {
    "transformers.trainer.Trainer": "trainer_attrib.integrations.huggingface",
}
"""Class of a trainer -> the module whose ``steps_of`` drives it, imported only when such a trainer is met."""


def steps_of(prepared: Any) -> Steps | None:
    """What a program returned, to be driven step by step; None if nobody knows how."""
    if isinstance(prepared, Steps):
        return prepared
    for base in type(prepared).__mro__:
        if module := _DRIVERS.get(f"{base.__module__}.{base.__qualname__}"):
            return importlib.import_module(module).steps_of(prepared)
    return None


def check_programs(stages: Sequence[StageReader], programs: Mapping[str, Program] | None) -> Mapping[str, Program]:
    """The programs, if every stage has one.

    Raises:
        MissingProgramError: otherwise.
    """
    missing = [stage.name for stage in stages if stage.name not in (programs or {})]
    if missing:
        raise MissingProgramError(
            f"Running stages again needs programs for {missing}; given are {sorted(programs or {})}.",
            cause="the ledger records what training did, not the code and data that did it.",
            fix="pass programs={stage: lambda model: Trainer(model=model, ...)}, each building the trainer of that "
            "stage with the same arguments, data and seed; or use method='subtract', which needs none.",
        )
    return programs or {}
