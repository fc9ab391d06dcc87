"""Weights that an optimizer would reach along given gradients, kept beside the model, which stays where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.numerics.update_rules import AdamWSettings, SGDSettings, merged_adamw, merged_sgd

_ADAM = (torch.optim.Adam, torch.optim.AdamW)


class Arm:
    """An optimizer that steps copies of a model's weights.

    Args:
        optimizer: new, over the model's parameters; it is taken over.
        names: of the parameters by ``id``.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        self._optimizer, self._places = optimizer, dict[str, tuple[Tensor, Tensor]]()
        for group in optimizer.param_groups:
            copies = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
            self._places |= {names[id(p)]: (p, copy) for p, copy in zip(group["params"], copies, strict=True)}
            group["params"] = copies
        self._settings = [dict(group) for group in optimizer.param_groups]
        self._merges = can_merge(optimizer)

    def step(self, gradients: Mapping[str, Tensor], rates: Sequence[Sequence[float]]) -> None:
        """Take the steps that have these learning rates, all along the same gradients. Optimizers that can be merged
        take one step for all of them, which moves as far and forgets as much; others take each."""
        for name, (_, copy) in self._places.items():
            copy.grad = gradients.get(name)
        for window in [rates] if self._merges else [[rate] for rate in rates]:
            for number, group in enumerate(self._optimizer.param_groups):
                own = [rate[number] for rate in window]
                group.update(_merged(self._settings[number], own) if self._merges else {"lr": own[-1]})
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)  # given, not kept: they would take the place of the next ones

    def displacement(self) -> Displacement:
        """Where the weights are now, as a change of the model's, in their own precision."""
        return {name: (copy.detach() - p.detach()).cpu() for name, (p, copy) in self._places.items()}

    def end(self) -> Displacement:
        """The same for good: what the optimizer remembers is given up."""
        self._optimizer.state.clear()
        places, self._places = self._places, {}
        return {name: copy.detach().sub_(p.detach()).cpu() for name, (p, copy) in places.items()}


def can_merge(optimizer: Optimizer) -> bool:
    """Whether several of its steps can be taken as one."""
    if isinstance(optimizer, torch.optim.SGD):
        return not any(group["dampening"] for group in optimizer.param_groups)
    return type(optimizer) in _ADAM and not any(group["amsgrad"] for group in optimizer.param_groups)


def adam_epsilon(optimizer: Optimizer) -> float | None:
    """What is added to the root of the second moment by an optimizer of Adam's kind; None for others."""
    groups = optimizer.param_groups
    adam = isinstance(optimizer, _ADAM) or "adam" in type(optimizer).__name__.lower()
    return float(groups[0]["eps"]) if adam and all("betas" in g and "eps" in g for g in groups) else None


def _merged(settings: Mapping[str, Any], rates: Sequence[float]) -> dict[str, Any]:
    if "betas" in settings:
        beta1, beta2 = settings["betas"]
        adamw = merged_adamw(rates, AdamWSettings(learning_rate=rates[-1], beta1=beta1, beta2=beta2))
        return {"lr": adamw.learning_rate, "betas": (adamw.beta1, adamw.beta2)}
    sgd = merged_sgd(rates, SGDSettings(learning_rate=rates[-1], momentum=settings["momentum"]))
    return {"lr": sgd.learning_rate, "momentum": sgd.momentum}
