"""Ledgers on S3: a server that speaks its protocol in this process. Skipped where s3fs and moto are not installed."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from trainer_attrib import Ledger, SketchConfig
from trainer_attrib.errors import StageExistsError
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.testing.zoo import LinearOnThreeAxes

s3fs = pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_stage_is_recorded_and_read(bucket: str, tmp_path, train: Callable) -> None:
    for place in (f"{bucket}/runs/chat", str(tmp_path)):
        train(LinearOnThreeAxes(), place, steps=3, snapshots=1, total_steps=3, sketch=SketchConfig(dtype="int8"))
    far, here = (Ledger(place).stage("one") for place in (f"{bucket}/runs/chat", str(tmp_path)))
    assert far.problems() == []
    assert far.steps().num_rows == here.steps().num_rows == 3
    for one, other in zip(far.rows(), here.rows(), strict=True):
        assert one.table.equals(other.table)
        assert np.array_equal(one.sketches[:], other.sketches[:])
        assert np.array_equal(one.sketches[2:4], other.sketches[2:4])
    with pytest.raises(StageExistsError):
        train(LinearOnThreeAxes(), f"{bucket}/runs/chat", steps=1)


def test_of_many_who_come_at_the_same_time_one_gets_the_name(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them sees the others' folder: the condition of the request decides."""
    monkeypatch.setattr(Storage, "exists", lambda storage, name: name.endswith(".claim"))
    got: list[bool] = []
    threads = [threading.Thread(target=lambda: got.append(Storage(bucket).create_folder("stages/a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True], json.dumps(got)
