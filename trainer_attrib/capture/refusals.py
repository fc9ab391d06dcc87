"""Ways to train that would be recorded wrongly, told apart by class names so that nothing is imported for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainer_attrib.capture.processes import Processes
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.tap.shards import shard_of

_REFUSED = {
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "FSDP1 flattens parameters, so that a gradient no longer has its layer's shape",
        "use FSDP2: fully_shard, fsdp_version: 2 in accelerate, ModelParallelStrategy in Lightning",
    ),
    "torch.nn.parallel.data_parallel.DataParallel": (
        "nn.DataParallel makes new replicas of the model at every step",
        "train with DDP (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES to one device",
    ),
    "deepspeed.runtime.engine.DeepSpeedEngine": (
        "DeepSpeed keeps gradients and optimizer state in flat partitions of its own, which nobody has checked here",
        "train with DDP or FSDP2",
    ),
}


def refuse_unknown_parallelism(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Check how the model is distributed, before the first step.

    Raises:
        ConfigurationError: FSDP1, DataParallel, DeepSpeed, tensor parallelism or hybrid sharding.
    """
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for module in model.modules() for kind in type(module).__mro__}
    for name, (why, instead) in _REFUSED.items():
        if name in kinds:
            raise ConfigurationError(f"The model is a {name.rsplit('.', 1)[-1]}: {why}.", fix=instead + ".")
    if any(type(optimizer).__module__.startswith("deepspeed.") for optimizer in optimizers):
        why, instead = _REFUSED["deepspeed.runtime.engine.DeepSpeedEngine"]
        raise ConfigurationError(f"The optimizer is DeepSpeed's: {why}.", fix=instead + ".")
    for parameter in model.parameters():
        if shard_of(parameter.data).distributed:
            _refuse_part_of_the_processes(parameter)


def _refuse_part_of_the_processes(parameter: Any) -> None:
    """What shards hold is added up over all processes, so that two groups with the same rows would count twice."""
    size, processes = parameter.device_mesh.size(), Processes.current().size
    if size != processes:
        raise ConfigurationError(
            f"A parameter is sharded over {size} of {processes} processes.",
            cause="hybrid sharding: several groups of processes hold the same rows.",
            fix="shard over all processes (plain fully_shard), or train with DDP, or without recording.",
        )
