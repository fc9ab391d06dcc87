"""Ways to distribute a model that would be recorded wrongly are refused before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support import support
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.testing.zoo import LinearOnThreeAxes

AREA = "Many processes"


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def record(model: nn.Module, ledger: Path) -> Recorder:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Recorder(ledger, stage="one", model=model, optimizer=optimizer)


def as_class(module: str, name: str) -> type[nn.Sequential]:
    """A stand-in for a class of a package that cannot run here, known by its name."""
    return type(name, (nn.Sequential,), {"__module__": module})


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        pytest.param(
            "torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "FSDP1 flattens",
            marks=support(AREA, "FSDP1", refused=True),
        ),
        pytest.param(
            "deepspeed.runtime.engine", "DeepSpeedEngine", "DeepSpeed keeps gradients",
            marks=support(AREA, "DeepSpeed, by its engine", refused=True),
        ),
    ],
)  # fmt: skip
def test_wrappers_that_change_what_a_parameter_is(module: str, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        record(as_class(module, name)(LinearOnThreeAxes()), tmp_path)


@support(AREA, "nn.DataParallel, plain loop", refused=True)
def test_replicas_made_at_every_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="DataParallel makes new replicas"):
        record(nn.DataParallel(LinearOnThreeAxes()), tmp_path)
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param([Shard(1)], marks=support(AREA, "tensor parallelism", refused=True)),
        pytest.param([Replicate()], marks=support(AREA, "replicated distributed tensors", refused=True)),
    ],
)
def test_other_placements_than_fully_sharded_rows(placement: list, group: None, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = LinearOnThreeAxes()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 2:
                setattr(module, name, nn.Parameter(distribute_tensor(parameter.data, mesh, placement)))
    with pytest.raises(ConfigurationError, match="FSDP2's sharding of the first axis"):
        record(model, tmp_path)


@support(AREA, "hybrid sharding in separate groups of processes", refused=True)
def test_shards_over_a_part_of_the_processes(tmp_path: Path) -> None:
    """Process 0 of 4, of which two hold the one half of each weight and two the other."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh, model = DeviceMesh("cpu", [0, 1]), nn.Sequential(nn.Linear(6, 4, bias=False))
        model[0].weight = nn.Parameter(DTensor.from_local(torch.ones(2, 6), mesh, [Shard(0)]))
        with pytest.raises(ConfigurationError, match="sharded over 2 of 4 processes"):
            record(model, tmp_path)
    finally:
        dist.destroy_process_group()
