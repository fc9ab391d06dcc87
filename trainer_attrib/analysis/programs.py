"""Programs: how a stage is run again, as a whole by its own trainer or step by step by the analyzer.

A ledger records what training did, not the code and data that did it. A program is that code: a function that takes a
model and returns what would train that very object. The analyzer can let it train (``train()``, or a call), or drive
it one optimizer step at a time through :class:`Steps`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.errors import ConfigurationError, MissingProgramError
from trainer_attrib.ledger.reader import StageReader

Program = Callable[[Any], Any]
"""Takes a model, returns what would train that very object: an object with ``train()``, or a function to call. To be
run step by step it must be a trainer of a known framework, :class:`Steps` itself (``Loop``, ``Fit``), or an iterable
(a list, a generator, a generator function) of losses, each of one optimizer step."""

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


class Averages(Protocol):
    """Averages of the weights that a training keeps beside its model, and with which it leaves the model."""

    def after_step(self, step: int) -> None:
        """The recorded step of this number, from 1, has been taken, by itself or as one of several in a larger one."""
        ...

    def put(self) -> None:
        """Training is over: put the averages into the model."""
        ...


@runtime_checkable
class Averaging(Protocol):
    """What :class:`Steps` are as well if their training averages weights."""

    def averages(self) -> Averages | None:
        """Averages that begin with the model as it is now; None where the training keeps none."""
        ...


_DRIVERS = {
    "transformers.trainer.Trainer": "trainer_attrib.integrations.huggingface",
}
"""Class of a trainer -> the module whose ``steps_of`` drives it, imported only when such a trainer is met."""


class Losses:
    """The losses of a plain loop, one for each optimizer step, on whose gradients training did nothing more.

    Args:
        losses: they begin anew each time they are iterated over; an iterator can be driven once.
        model: that they train.
    """

    def __init__(self, losses: Iterable[Loss], model: nn.Module) -> None:
        self.losses, self.model = losses, model
        self._spent = False

    def steps(self, thin: int = 1) -> Iterator[Step]:
        """One step per loss, ending where they end. What a loss is computed from is unknown: ``thin`` changes nothing.

        Raises:
            ConfigurationError: an iterator was driven before.
        """
        if self._spent:
            raise ConfigurationError(
                "The losses of this program were an iterator, which has been read already.",
                fix="return a list or a generator function instead, or a Loop.",
            )
        self._spent = isinstance(self.losses, Iterator)
        return (Step([loss]) for loss in self.losses)

    def clip(self) -> None:
        """Nothing: a loss says nothing of clipping. ``Loop`` does."""

    def optimizer(self) -> Optimizer:
        """Unknown.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            "The program returned losses, which do not say with which optimizer they are trained.",
            fix="return a Loop(..., make_optimizer=...).",
        )


def steps_of(prepared: Any, model: nn.Module | None = None) -> Steps | None:
    """What a program returned, to be driven step by step; None if nobody knows how.

    Args:
        prepared: what the program returned.
        model: that the program was given; an iterable of losses does not say which model they train.
    """
    if isinstance(prepared, Steps):
        return prepared
    for base in type(prepared).__mro__:
        if module := _DRIVERS.get(f"{base.__module__}.{base.__qualname__}"):
            return importlib.import_module(module).steps_of(prepared)
    if model is None or isinstance(prepared, nn.Module | Mapping | str):
        return None
    if inspect.isgeneratorfunction(prepared):
        return Losses(_Anew(prepared), model)
    return Losses(prepared, model) if isinstance(prepared, Iterable) else None


@dataclass(frozen=True)
class _Anew:
    generator: Callable[[], Iterator[Loss]]

    def __iter__(self) -> Iterator[Loss]:
        return self.generator()


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
