"""Which hooks hang on a model, on whatever holds it and on its optimizers, wherever in this process they are."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

from torch import nn
from torch.optim import Optimizer

_OF_MODULES = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_OPTIMIZERS = (
    "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks",
)  # fmt: skip


def hooks_around(model: nn.Module) -> Counter[str]:
    """Every hook, by the kind of its owner, its registry and its own name; and forwards put on instances.

    The garbage collector knows every module that contains the model and every optimizer of its parameters, so that
    nobody has to hand them over, not even after a run that raised.
    """
    mine = {id(p) for p in model.parameters()}
    found: Counter[str] = Counter()
    for owner in gc.get_objects():
        kind = type(owner)  # not isinstance, which would wake lazy proxies
        if issubclass(kind, nn.Module) and "_parameters" in owner.__dict__:
            parts = list(owner.modules())
            if owner is model or any(part is model for part in parts):
                for part in parts:
                    found += _of(part, _OF_MODULES)
                    found += Counter({f"{type(part).__name__}.forward on the instance": "forward" in part.__dict__})
        elif issubclass(kind, Optimizer):
            groups = owner.__dict__.get("param_groups", [])
            if any(id(p) in mine for group in groups for p in group["params"]):
                found += _of(owner, _OF_OPTIMIZERS)
    for p in model.parameters():
        found += _of(p, _OF_TENSORS)
    return found


def _of(owner: Any, registries: tuple[str, ...]) -> Counter[str]:
    hooks = [(name, hook) for name in registries for hook in (getattr(owner, name, None) or {}).values()]
    return Counter(f"{type(owner).__name__}.{name}: {_named(hook)}" for name, hook in hooks)


def _named(hook: Any) -> str:
    return f"{getattr(hook, '__module__', '?')}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"
