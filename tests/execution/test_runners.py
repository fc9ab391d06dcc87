"""One process, two of torchrun's, Ray's actors: the same answers to the bit, and the same errors."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from tests.analysis.stages import three_stages
from tests.execution.ask import answers
from tests.processes.conftest import launch  # noqa: F401  a fixture
from trainer_attrib.errors import BehaviorError, ConfigurationError, ExecutionError, MissingExtraError
from trainer_attrib.execution.choice import runner_of
from trainer_attrib.execution.outcome import Outcome
from trainer_attrib.execution.runner import Serial
from trainer_attrib.ledger import writer

ASK = Path(__file__).parent / "ask.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A ledger of which every step is a part of its own, and the trained weights."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ROLL_BYTES", 1)
        trained = three_stages(folder / "ledger")
    save_file(trained.model.state_dict(), str(folder / "weights.safetensors"))
    return folder


@pytest.fixture(scope="module")
def serial(run):
    return answers(*copied(run, "serial"), "serial", str(run / "retrained-serial"))


def copied(run, name):
    """The ledger for one runner, since passes are stored in it; and the weights."""
    shutil.copytree(run / "ledger", run / name)
    return str(run / name), str(run / "weights.safetensors")


def assert_same(found, serial):
    assert found.keys() == serial.keys()
    for name, values in serial.items():
        assert values.size > 3
        np.testing.assert_array_equal(found[name], values, err_msg=name, strict=True)


def test_torchrun_gives_the_same_bits_in_every_process(run, serial, launch):  # noqa: F811
    launch(ASK, *copied(run, "torchrun"), "torchrun", run / "out", processes=2)
    for rank in range(2):
        assert_same(dict(np.load(run / f"out-{rank}.npz")), serial)


def test_ray_gives_the_same_bits(run, serial):
    ray = pytest.importorskip("ray")
    from trainer_attrib.execution.ray_actors import Ray

    try:
        assert_same(answers(*copied(run, "ray"), Ray(2), str(run / "retrained-ray")), serial)
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        with pytest.raises(ExecutionError, match="ZeroDivisionError"):
            list(Ray(2).map(lambda task: 1 // task, [1, 0]))
        several = [Ray(2) for _ in range(3)]  # more actors than processors
        assert [list(one.map(lambda task: task * task, range(9))) for one in several] == [[n * n for n in range(9)]] * 3
    finally:
        ray.shutdown()


def test_serial_work_begins_when_its_answer_is_asked_for():
    begun = []
    found = Serial().map(lambda task: begun.append(task) or task, [1, 2])
    assert begun == []
    assert next(found) == 1
    assert begun == [1]


def test_a_fault_travels_as_itself_if_it_is_ours_and_as_text_if_it_is_not():
    def fail(fault):
        raise fault

    with pytest.raises(BehaviorError, match="no queries"):
        Outcome.of(fail, BehaviorError("no queries")).get()
    with pytest.raises(ExecutionError, match="KeyError: 'x'") as found:
        Outcome.of(fail, KeyError("x")).get()
    assert "runner='serial'" in str(found.value)
    assert Outcome.of(lambda task: task, None).get() is None


@pytest.mark.parametrize("fault", [MissingExtraError("ray", "ray"), BehaviorError("no queries", cause="a", fix="b")])
def test_faults_are_the_same_in_the_process_that_hears_of_them(fault):
    heard = copy.deepcopy(fault)  # by what a process would send
    assert type(heard) is type(fault)
    assert str(heard) == str(fault)


def test_a_runner_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigurationError, match="use 'serial', 'torchrun' or 'ray'"):
        runner_of("slurm")
    with pytest.raises(ConfigurationError, match="torchrun --nproc-per-node"):
        runner_of("torchrun")
