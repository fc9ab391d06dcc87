"""Names of parameters and modules that do not depend on what the model is wrapped in.

A sketch's projections are keyed by a weight's name, and stages are compared by names. So a weight is called what it is
called in the bare model, whether DDP, FSDP, ``torch.compile`` or PEFT hold it. Only path components that a wrapper's
own class put there are dropped: a model may have a child called ``module``. Frameworks are told by class names, so that
none is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

_TUNER_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
_AVERAGE = "torch.optim.swa_utils.AveragedModel"
_HELD_IN = {  # class (or a base class of it) -> the child that it wraps
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    _AVERAGE: "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
    "lightning_fabric.wrappers._FabricModule": "_forward_module",
    "peft.peft_model.PeftModel": "base_model",
    "peft.mixed_model.PeftMixedModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
    _TUNER_LAYER: "base_layer",
    "peft.utils.other.TrainableTokensWrapper": "token_adapter",
}
_COPIES = "peft.utils.other.AuxiliaryTrainingWrapper"  # trains a copy of a module instead of the module
_COPY = "modules_to_save"
_ADAPTS = {  # whose other children are adapters
    "peft.peft_model.PeftModel",
    "peft.mixed_model.PeftMixedModel",
    _TUNER_LAYER,
    _COPIES,
}


class Named(NamedTuple):
    """A module of the tree, what it is called in the bare model, and whether it belongs to an adapter."""

    name: str
    module: nn.Module
    adapter: bool


def walk(model: nn.Module) -> Iterator[Named]:
    """Every module once, parents before children, in the order of ``named_modules``. A wrapper and what it wraps share
    one name; of a module and the copies that PEFT trains of it, the one that computes has the module's name."""
    seen: set[int] = set()

    def visit(name: str, own: str, module: nn.Module, adapter: bool) -> Iterator[Named]:
        """``own`` is the name below which the wrapper's own children are: its ``name`` unless wrappers are nested."""
        if id(module) in seen:
            return
        seen.add(id(module))
        yield Named(name, module, adapter)
        kinds = _kinds(module)
        held = {_HELD_IN[kind] for kind in kinds if kind in _HELD_IN}
        if _COPIES in kinds:
            held.add(_computing(module))
        for key, child in _children(module, kinds):
            if child is None:
                continue
            if key in held:
                yield from visit(name, _joined(own, key) if kinds & _kinds(child) & _ADAPTS else name, child, adapter)
            else:
                path = _joined(own, key)
                yield from visit(path, path, child, adapter or bool(kinds & _ADAPTS))

    return visit("", "", model, False)


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter; a tied parameter appears once, under its first name."""
    return {name: parameter for name, parameter, _ in _parameters(model)}


def buffers_by_name(model: nn.Module) -> dict[str, Tensor]:
    """What training changes beside the weights, by name: persistent buffers, and the frozen parameters of an
    ``AveragedModel`` inside the model. The tensors themselves, a shared one once."""
    found: dict[str, Tensor] = {}
    averages: set[int] = set()
    for named in walk(model):
        buffers, passing = named.module._buffers, named.module._non_persistent_buffers_set
        for key, buffer in buffers.items():
            if buffer is not None and key not in passing and not any(buffer is known for known in found.values()):
                found[_joined(named.name, key)] = buffer
        if _AVERAGE in _kinds(named.module):
            averages |= {id(p) for p in named.module.parameters() if not p.requires_grad}
    return found | {name: p for name, p in parameters_by_name(model).items() if id(p) in averages}


def adapter_weights(model: nn.Module) -> set[str]:
    """Names of the parameters that PEFT added to the bare model. A copy that computes instead of a module is none."""
    return {name for name, _, adapter in _parameters(model) if adapter}


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module; where a wrapper and what it wraps share a name, what is wrapped."""
    return {named.name: named.module for named in walk(model)}


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether this is a layer of PEFT's that holds a layer of the bare model and its adapters."""
    return _TUNER_LAYER in _kinds(module)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    seen: set[int] = set()
    names: set[str] = set()
    for named in walk(model):
        for key, parameter in named.module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = _joined(named.name, key)
            while name in names:  # a wrapper's own parameter that is called like one of what it wraps
                name = f"{name}'"
            names.add(name)
            yield name, parameter, named.adapter


def _children(module: nn.Module, kinds: set[str]) -> Iterator[tuple[str, nn.Module | None]]:
    """A module's children; the copies that PEFT keeps in a dictionary count as the children of what holds it."""
    for key, child in module._modules.items():
        if _COPIES in kinds and key == _COPY and child is not None:
            yield from ((f"{_COPY}.{name}", copy) for name, copy in child._modules.items())
        else:
            yield key, child


def _computing(module: Any) -> str:
    """Which child of a module that PEFT trains a copy of is in use: the active adapter's copy, else the original."""
    copies = module._modules.get(_COPY)
    return next((f"{_COPY}.{name}" for name in module.active_adapters if copies and name in copies), "original_module")


def _kinds(module: nn.Module) -> set[str]:
    return {f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__}


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
