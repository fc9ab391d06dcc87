"""Which shadows were asked for, and what they cannot follow: said before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

from torch import nn
from torch.optim import Optimizer

from trainer_attrib.capture.processes import Processes, is_sharded
from trainer_attrib.capture.shadows.twin import refuse_closures
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.types import Shadow

Asked = str | Shadow | Sequence[str | Shadow]
"""What ``shadow=`` takes: earlier stages, by name or with settings; one or several."""


def asked_shadows(asked: Asked) -> list[Shadow]:
    """One :class:`Shadow` for each, where a name stands for one with the usual settings.

    Raises:
        ConfigurationError: something else was given, or a stage twice.
    """
    asked = [asked] if isinstance(asked, str | Shadow) else asked
    if not isinstance(asked, Sequence) or not all(isinstance(each, str | Shadow) for each in asked):
        raise ConfigurationError(f"shadow={asked!r} names no stages.", fix='for instance shadow=[Shadow("pretrain")].')
    found = [Shadow(each) if isinstance(each, str) else each for each in asked]
    if twice := {each.of for each in found if sum(other.of == each.of for other in found) > 1}:
        raise ConfigurationError(
            f"shadow= names {sorted(twice)} twice.", fix="for several shadows of one stage: Shadow(of, replicas=2)."
        )
    return found


def refuse_what_shadows_cannot_follow(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raises ConfigurationError for several processes or optimizers, compiled or sharded models, optimizers that step
    inside the backward pass or need a closure, and weights that the model does not hold."""
    if Processes.current().size > 1 or any(is_sharded(parameter) for parameter in model.parameters()):
        refuse("training runs in several processes (DDP or FSDP)", "record the shadow in a run of one process")
    if len(optimizers) > 1:
        refuse(f"there are {len(optimizers)} optimizers", "train with one")
    if any(_compiled(module) for module in model.modules()):
        refuse("the model is compiled, and code compiled for its weights would be compiled again", "do not compile it")
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in model.parameters()):
        refuse("something acts on gradients during the backward pass", "let the optimizer step after it")
    refuse_closures(optimizers[0])
    held = {id(parameter) for parameter in model.parameters()}
    others = sum(id(p) not in held for p in _updated(optimizers[0]))
    if others:
        refuse(f"the optimizer updates {others} weights that the model does not hold", "record the module that does")


def _compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _updated(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def refuse(why: str, instead: str) -> NoReturn:
    """Raises ConfigurationError for a kind of training that shadows cannot follow.

    Args:
        why: they cannot.
        instead: what to do about it.
    """
    raise ConfigurationError(f"A shadow cannot follow this training: {why}.", fix=f"{instead}, or leave out shadow=.")
