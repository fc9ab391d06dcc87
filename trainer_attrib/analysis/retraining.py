"""Really running stages again: the ground truth that every estimate is compared with."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer_attrib.analysis.displacement import weights_set_to
from trainer_attrib.errors import MissingProgramError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name

Program = Callable[[Any], Any]
"""Takes a model, returns what would train that very object: an object with ``train()``, or a function to call."""


@dataclass(frozen=True)
class Closure:
    """Whether the programs really are the recorded training: all stages run again with nothing removed.

    ``differences`` has for each stage the largest absolute difference of any weight at its end from what was recorded.
    """

    differences: dict[str, float]

    @property
    def exact(self) -> bool:
        """Every stage ended with the recorded bits."""
        return all(difference == 0.0 for difference in self.differences.values())

    def __str__(self) -> str:
        if self.exact:
            return "running every stage again reproduces the recorded weights bit for bit"
        worst = max(self.differences, key=lambda stage: self.differences[stage])
        return (
            f"running every stage again does NOT reproduce the recorded weights: after '{worst}' they differ by up to "
            f"{self.differences[worst]:.2g}; retraining is then an approximation"
        )


def retrain(
    model: nn.Module, start: dict[str, Tensor], stages: Sequence[StageReader], programs: Mapping[str, Program]
) -> dict[str, Tensor]:
    """Weights after running ``stages`` in order from ``start``, on a copy; the model and all random states stay.

    Raises:
        MissingProgramError: a stage has no program.
    """
    weights = [start, *_weights_after(model, start, stages, programs)]
    return weights[-1]


def closure(
    model: nn.Module, start: dict[str, Tensor], stages: Sequence[StageReader], programs: Mapping[str, Program]
) -> Closure:
    """Run every stage again with nothing removed and compare with the recording."""
    differences = {}
    for stage, weights in zip(stages, _weights_after(model, start, stages, programs), strict=True):
        recorded = stage.snapshot("end")
        differences[stage.name] = max(float((weights[n] - recorded[n]).abs().max()) for n in recorded)
    return Closure(differences)


def check_programs(stages: Sequence[StageReader], programs: Mapping[str, Program] | None) -> Mapping[str, Program]:
    """The programs, if every stage has one.

    Raises:
        MissingProgramError: otherwise.
    """
    missing = [stage.name for stage in stages if stage.name not in (programs or {})]
    if missing:
        raise MissingProgramError(
            f"Retraining needs programs for the stages {missing}; given are {sorted(programs or {})}.",
            cause="the ledger records what training did, not the code and data that did it.",
            fix="pass programs={stage: lambda model: Trainer(model=model, ...)}, each building the trainer of that "
            "stage with the same arguments, data and seed; or use method='subtract', which needs none.",
        )
    return programs or {}


def _weights_after(
    model: nn.Module, start: dict[str, Tensor], stages: Sequence[StageReader], programs: Mapping[str, Program]
) -> Iterator[dict[str, Tensor]]:
    check_programs(stages, programs)
    with _random_states_kept():
        trained = _copy(model)
        with weights_set_to(trained, start):
            for stage in stages:
                _train_only(trained, set(stage.meta["trainable"]))
                _run(programs[stage.name](trained))
                yield {n: p.detach().cpu().clone() for n, p in parameters_by_name(trained).items()}


def _train_only(model: nn.Module, names: set[str]) -> None:
    """What a stage froze, and adapters that came later, must not train."""
    for name, parameter in parameters_by_name(model).items():
        parameter.requires_grad_(name in names)


def _run(prepared: Any) -> None:
    if not isinstance(prepared, nn.Module) and callable(getattr(prepared, "train", None)):
        prepared.train()
    elif callable(prepared) and not isinstance(prepared, nn.Module):
        prepared()
    else:
        raise MissingProgramError(
            f"A program returned {type(prepared).__name__}, which cannot be run.",
            fix="return a trainer (an object with train()) or a function without arguments that trains the model.",
        )


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy that computes with its own weights.

    TRL replaces ``model.forward`` by a wrapper whose closure holds the original model; a copy of it would go on
    computing with the original's weights. Such a wrapper of the class's own forward is dropped; trainers put it back.
    """
    copied = copy.deepcopy(model)
    patched = copied.__dict__.get("forward")
    if getattr(patched, "__wrapped__", None) is type(copied).forward:
        del copied.__dict__["forward"]
    return copied


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numeric = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numeric)
