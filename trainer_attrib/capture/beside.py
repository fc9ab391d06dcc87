"""What a snapshot holds beside the weights: second moments, buffers, the optimizer state that a stage begins with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture.moment_readers import Factored, second_moment
from trainer_attrib.capture.processes import is_sharded
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.journal import Tensors
from trainer_attrib.tap.names import buffers_by_name
from trainer_attrib.tap.shards import Shard, shard_of


def stored_moments(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> Tensors:
    """What the last step divided by the root of, on the CPU, by weight name: full shape, float32 (float64 for float64
    weights); of a sharded weight this process's part. Weights whose second moment cannot be read are left out, as are
    those that have none yet."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, Tensor | Shard] = {}
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if id(p) in names):
            moment = _readable(optimizer, parameter)
            if moment is not None:
                dtype = torch.float64 if parameter.dtype is torch.float64 else torch.float32
                found[names[id(parameter)]] = _on_cpu(moment, dtype)
    return found


def _readable(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """The second moment in the parameter's shape, multiplied out as Adafactor does: rows columns^T / mean(rows). Means
    of a sharded weight's rows are no rows of it: they are left out."""
    try:
        moment = second_moment(optimizer, parameter)
    except KeyError:
        return None
    if isinstance(moment, Factored):
        if is_sharded(parameter):
            return None
        mean = moment.rows.mean().clamp_min(torch.finfo(moment.rows.dtype).tiny)
        moment = moment.rows[:, None] * moment.columns[None, :] / mean
    return moment if moment is not None and moment.shape == parameter.shape else None


def _on_cpu(tensor: Tensor, dtype: torch.dtype | None = None, *, copy: bool = False) -> Tensor | Shard:
    """A tensor, or what this process holds of a sharded one."""
    shard = shard_of(tensor.detach())
    local = shard.local.to("cpu", dtype or shard.local.dtype, copy=copy)
    return replace(shard, local=local) if shard.distributed else local


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of what training changes beside the weights; a tensor of a kind that cannot be stored (sparse,
    sharded, quantized) is left out."""
    found = {name: buffer for name, buffer in buffers_by_name(model).items() if _plain(buffer)}
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in found.items()}


def stored_state(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> tuple[Tensors, list[str]]:
    """The state of optimizers that have one, as ``NUMBER/PARAMETER/KEY`` -> copy on the CPU, numbers as 0-dim float64,
    of a sharded entry this process's part; and the names of the entries that are neither tensors nor numbers."""
    found: dict[str, Tensor | Shard] = {}
    left_out: list[str] = []
    for path, value in _entries(optimizers, parameters):
        if (_plain(value) or _rows(value)) and "?" not in path:
            found[path] = _on_cpu(value, copy=True)
        elif isinstance(value, int | float) and "?" not in path:
            found[path] = torch.tensor(float(value), dtype=torch.float64)
        elif value is not None:
            left_out.append(path)
    return found, left_out


def _entries(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Any]]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            entries = state if isinstance(state, dict) else {"": state}
            for key, value in entries.items():
                yield f"{number}/{names.get(id(parameter), '?')}/{key}", value


def _plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_complex()


def _rows(value: Any) -> bool:
    """Whether it is sharded as FSDP2 shards weights."""
    if not isinstance(value, Tensor) or not is_sharded(value):
        return False
    try:
        return shard_of(value).distributed
    except ConfigurationError:
        return False
