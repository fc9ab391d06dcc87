"""The optimizer of a recorded stage, rebuilt and set to what each recorded step used."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer_attrib.analysis.programs import Steps
from trainer_attrib.analysis.training_state import OptimizerState
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.update_rules import (
    AdamWSettings,
    SGDSettings,
    carried_into_merged,
    merged_adamw,
    merged_sgd,
)

_REBUILT = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (
        torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
        torch.optim.Adagrad, torch.optim.Adamax, torch.optim.Adadelta,
    )
}  # fmt: skip
_MERGED = {"torch.optim.adam.Adam", "torch.optim.adamw.AdamW", "torch.optim.sgd.SGD"}
Row = Mapping[str, Any]
"""A row of the steps table."""


def can_merge(stage: StageReader) -> bool:
    """Whether several steps of the stage can be merged into one: AdamW, Adam, and SGD without dampening."""
    if len(stage.meta["optimizers"]) != 1:
        return False
    [optimizer] = stage.meta["optimizers"]
    return optimizer["class"] in _MERGED and not any(g["settings"].get("dampening") for g in optimizer["groups"])


def rebuild_optimizer(stage: StageReader, steps: Steps, parameters: Mapping[str, Tensor]) -> Optimizer:
    """A new optimizer of the stage's class, with its groups and settings, over the model's parameters.

    Optimizers of torch are made from the recorded settings, so that what a program does with its own (a scheduler, a
    warmup) does not matter; of any other class the program's own is taken.

    Raises:
        NotComparableError: several optimizers, or the program's has other groups than the recorded one.
    """
    if len(stage.meta["optimizers"]) != 1:
        raise NotComparableError(
            f"Stage '{stage.name}' has {len(stage.meta['optimizers'])} optimizers.",
            cause="steps are run again with one optimizer.",
            fix="use method='retrain', which lets the stage's own trainer run.",
        )
    [recorded] = stage.meta["optimizers"]
    kind = _REBUILT.get(recorded["class"])
    if kind is None:
        optimizer = steps.optimizer()
        _check_groups(stage, optimizer, recorded)
        return optimizer
    accepted = inspect.signature(kind).parameters
    groups = [
        {"params": [parameters[name] for name in group["parameters"]], **_arguments(group["settings"], accepted)}
        for group in recorded["groups"]
    ]
    return kind(groups, lr=0.0)


def use_settings(optimizer: Optimizer, stage: StageReader, rows: Sequence[Row]) -> None:
    """Set the optimizer to take the recorded steps as one: learning rate, weight decay, betas or momentum."""
    kind = stage.meta["optimizers"][0]["class"]
    for number, group in enumerate(optimizer.param_groups):
        rates, last = [row["learning_rate"][number] for row in rows], rows[-1]
        group["weight_decay"] = last["weight_decay"][number]
        beta1, beta2 = last["beta1"][number], last["beta2"][number]
        if "betas" in group:
            settings = AdamWSettings(learning_rate=rates[-1], beta1=beta1, beta2=beta2)
            settings = merged_adamw(rates, settings) if len(rates) > 1 else settings
            group["betas"], rate = (settings.beta1, settings.beta2, *group["betas"][2:]), settings.learning_rate
        elif "momentum" in group and kind in _MERGED:
            settings = SGDSettings(learning_rate=rates[-1], momentum=beta1)
            settings = merged_sgd(rates, settings) if len(rates) > 1 else settings
            group["momentum"], rate = settings.momentum, settings.learning_rate
        else:
            rate = rates[-1]
        if rate == rate:  # NaN where the optimizer makes its own
            group["lr"] = rate if not isinstance(group["lr"], Tensor) else group["lr"].fill_(rate)


@dataclass(frozen=True)
class CarriedState:
    """Puts a carried optimizer state into an optimizer of merged steps, and reads off what it hands on.

    Momenta are scaled so that they carry the weights as far through merged steps as through those that they stand for,
    and steps are counted in merged ones. With one step per step nothing is changed.

    Args:
        optimizer: that runs the stage again.
        names: of the parameters by ``id``.
        merge: steps merged into one.
    """

    optimizer: Optimizer
    names: Mapping[int, str]
    merge: int

    def load(self, state: OptimizerState, first: Row) -> None:
        """Begin with a state; ``first`` is the step that comes next."""
        for number, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                for key, value in state.get(self.names[id(parameter)], {}).items():
                    scaled = value.detach().clone() * self._factor(key, first["beta1"][number])
                    self.optimizer.state[parameter][key] = scaled if value.dim() == 0 else scaled.to(parameter.device)

    def read(self, last: Row) -> dict[str, dict[str, Tensor]]:
        """The state by parameter name, as it would stand after steps that were not merged; ``last`` is the last one."""
        found: dict[str, dict[str, Tensor]] = {}
        for number, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                entries = self.optimizer.state.get(parameter, {})
                found[self.names[id(parameter)]] = {
                    key: torch.as_tensor(value).detach().clone() / self._factor(key, last["beta1"][number])
                    for key, value in entries.items()
                    if value is not None
                }
        return found

    def _factor(self, key: str, beta1: float) -> float:
        if key == "step":
            return 1 / self.merge
        averaged = {"exp_avg": True, "momentum_buffer": False}.get(key)
        return 1.0 if averaged is None else carried_into_merged(self.merge, beta1, averaged=averaged)


def _arguments(settings: Mapping[str, Any], accepted: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {key: value for key, value in settings.items() if key in accepted and key != "betas"}
    if "betas" in accepted:
        chosen["betas"] = tuple(settings["betas"])
    elif "momentum" in accepted:
        chosen["momentum"] = settings["betas"][0]
    return chosen


def _check_groups(stage: StageReader, optimizer: Optimizer, recorded: Mapping[str, Any]) -> None:
    then = [len(group["parameters"]) for group in recorded["groups"]]
    now = [len(group["params"]) for group in optimizer.param_groups]
    if type(optimizer).__qualname__ != recorded["class"].rpartition(".")[2] or then != now:
        raise NotComparableError(
            f"Stage '{stage.name}' was trained by {recorded['class']} with groups of {then} parameters; its program "
            f"makes {type(optimizer).__qualname__} with groups of {now}.",
            fix="build the same optimizer in the program.",
        )
