"""The modules that a plan names, found in a live model with the rules that sketch them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer_attrib.errors import UnsupportedLayerError
from trainer_attrib.tap.experts import stacks_of
from trainer_attrib.tap.layers import FactorsOf, Pair, Rule, rule_for
from trainer_attrib.tap.names import modules_by_name, parameters_by_name
from trainer_attrib.tap.plan import SketchPlan, WeightPlan


@dataclass(frozen=True)
class Site:
    """One hooked module."""

    name: str
    module: nn.Module
    rule: Rule
    weight: WeightPlan
    has_bias: bool  # False for a tied module whose own bias is another parameter, or none

    def watch(self, x: Tensor, pair: Pair) -> FactorsOf:
        """The rule's :meth:`~trainer_attrib.tap.layers.Rule.watch`, outside autograd and autocast."""
        with torch.no_grad(), full_precision(x.device.type):
            return self.rule.watch(self.module, x.detach(), pair, pair.bias if self.has_bias else None)


@dataclass(frozen=True)
class Experts:
    """One module whose products are watched, and by parameter name the stacks' names among the plan's modules."""

    module: nn.Module
    stacks: dict[str, tuple[str, WeightPlan]]


def experts_of(model: nn.Module, plan: SketchPlan) -> list[Experts]:
    """The modules of experts that a plan names through their stacks.

    Raises:
        UnsupportedLayerError: a module's type is not registered in this process.
    """
    modules, found = modules_by_name(model), {}
    for weight in plan.weights:
        for name in weight.modules:
            if name in modules:
                continue
            parent, _, key = name.rpartition(".")
            if key not in stacks_of(modules[parent]):
                raise _unregistered(parent, modules[parent])
            found.setdefault(parent, Experts(modules[parent], {})).stacks[key] = (name, weight)
    return list(found.values())


def sites_of(model: nn.Module, plan: SketchPlan) -> list[Site]:
    """The modules of a plan, in its order.

    Raises:
        UnsupportedLayerError: a module's type is not registered in this process.
    """
    sites = []
    parameters, modules = parameters_by_name(model), modules_by_name(model)
    for weight in plan.weights:
        for name in weight.modules:
            if name not in modules:
                continue  # a stack of experts
            module = modules[name]
            rule = rule_for(module)
            if rule is None:
                raise _unregistered(name, module)
            has_bias = bool(weight.bias) and getattr(module, "bias", None) is parameters[weight.bias]
            sites.append(Site(name, module, rule, weight, has_bias))
    return sites


def _unregistered(name: str, module: nn.Module) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"'{name}' is a {type(module).__name__}, not a known layer type here, yet its weight was recorded.",
        fix="register the layer type as the training script did (docs/extending.md).",
    )


def full_precision(device: str) -> AbstractContextManager[object]:
    """Outside autocast; entering its context costs as much as a small product, so only where one is active."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
