"""Ledgers on object stores: what is fetched, when, and who gets a stage's name."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.ledger.remote import CountedStore
from trainer_attrib import Analyzer, Behavior, Ledger, SketchConfig
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.errors import CorruptPartError, LedgerNotFoundError
from trainer_attrib.ledger import ranges, stored_rows
from trainer_attrib.ledger.prefetch import ahead
from trainer_attrib.ledger.row_codecs import row_codec
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.testing.zoo import LinearOnThreeAxes

WIDTH = 6  # of the records below, bytes


@pytest.fixture
def url() -> Iterator[str]:
    CountedStore.fetched.clear()
    CountedStore.latency = 0.0
    yield f"counted://ledger-{uuid.uuid4().hex}"
    CountedStore.latency = 0.0


def records(url: str, count: int) -> ranges.RangedRecords:
    storage, record = Storage(url), np.dtype(("<i2", (WIDTH // 2,)))
    storage.write("rows/x.f16", np.arange(count * WIDTH // 2, dtype="<i2").tobytes())
    found = storage.records("rows/x.f16", record, count)
    assert isinstance(found, ranges.RangedRecords)
    return found


def test_only_the_ranges_that_are_asked_for_are_fetched(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "GAP_BYTES", 3 * WIDTH)
    found, whole = records(url, 100), np.arange(300).reshape(100, 3)
    assert len(found) == 100
    for key, requests in (
        (slice(10, 20), [(10, 10)]),
        (np.array([3, 1, 3, 5]), [(1, 5)]),  # what is between is read through
        (np.array([0, 50, 99]), [(0, 1), (50, 1), (99, 1)]),
        (slice(7, 7), []),
        (slice(None, None, -40), [(19, 1), (59, 1), (99, 1)]),
    ):
        CountedStore.fetched.clear()
        assert np.array_equal(found[key], whole[key])
        assert [request[1:] for request in CountedStore.fetched] == [(WIDTH * at, WIDTH * n) for at, n in requests]


def test_what_is_missing_is_said(url: str) -> None:
    found = records(url, 10)
    longer = Storage(url).records("rows/x.f16", np.dtype(("<i2", (3,))), 11)
    with pytest.raises(CorruptPartError, match="ends before byte 66"):
        longer[5:]
    Storage(url).remove("rows/x.f16")
    with pytest.raises(LedgerNotFoundError, match="does not exist"):
        found[2:3]


def test_one_result_is_made_ahead_and_no_more() -> None:
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        return number

    results = ahead(lambda n=n: read(n) for n in range(5))
    for expected in range(5):
        assert next(results) == expected
        deadline = time.monotonic() + 10
        while len(begun) < min(expected + 2, 5):
            assert time.monotonic() < deadline, "the next one was not begun"
            time.sleep(0.001)
        assert len(begun) == min(expected + 2, 5)
    assert list(results) == []

    def fail() -> int:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(ahead([lambda: 1, fail]))


def recorded(url: str, train: Callable, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = LinearOnThreeAxes()
    train(model, url, steps=8, sketch=SketchConfig(rank=4, correction="none", **settings))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("dtype", ["float32", "int8", "rank1"])
def test_scores_are_those_of_a_local_ledger_bit_by_bit(
    url: str, dtype: str, tmp_path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read ahead in several windows; with a condition on steps only the rows that meet it are fetched."""
    monkeypatch.setattr("trainer_attrib.ledger.writer.ROLL_BYTES", 1 << 30)
    monkeypatch.setattr(stored_rows, "READ_BYTES", 1)
    monkeypatch.setattr("trainer_attrib.analysis.recipes.streamed.CHUNK_BYTES", 1)  # chunks have 64 rows at least
    models = [recorded(place, train, dtype=dtype) for place in (url, str(tmp_path))]
    question = Behavior("size", [torch.ones(3, 21)], lambda model, items: model(torch.stack(items)).sum((1, 2)))
    found = []
    for place, model in zip((url, str(tmp_path)), models, strict=True):
        analyzer = Analyzer(place, model)
        found.append([analyzer.influence([question], recipe="grad_cos", where=where).scores for where in (
            None, Where(steps=(3, 4)))])  # fmt: skip
    assert all(np.array_equal(*both) for both in zip(*found, strict=True))
    size = Ledger(url).stage("one").codec(dtype).record.itemsize
    rows = Ledger(url).stage("one").count("rows")
    assert sum(request[2] for request in CountedStore.of_rows()) == size * (rows + rows // 8 * 2)


def test_the_next_rows_are_fetched_while_the_last_are_used(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six reads of 50 ms beside work of 50 ms for each: one after the other would take 600 ms."""
    monkeypatch.setattr(stored_rows, "READ_BYTES", 1)
    codec = row_codec("float32", [[1, 1, 3]])
    Storage(url).write("rows/x.f32", np.zeros(6 * 10 * 3, "<f4").tobytes())
    rows = stored_rows.StoredRows(Storage(url).records("rows/x.f32", codec.record, 60), codec)
    CountedStore.latency = 0.05
    begun = time.monotonic()
    chunks = 0
    for chunk in rows.chunks(10):
        assert chunk.shape == (10, 3)
        time.sleep(0.05)
        chunks += 1
    assert chunks == 6
    assert len(CountedStore.of_rows()) == 6
    assert time.monotonic() - begun < 0.5


@pytest.mark.parametrize("protocol", ["local", "memory", "counted", "forgetful"])
def test_one_of_several_gets_a_stage_s_name(protocol: str, tmp_path) -> None:
    place = str(tmp_path) if protocol == "local" else f"{protocol}://{uuid.uuid4().hex}"
    assert [Storage(place).create_folder("stages/sft") for _ in range(3)] == [True, False, False]
    assert Storage(place).create_folder("stages/dpo")
    assert Storage(place).names("stages/sft") == []


@pytest.mark.parametrize("protocol", ["local", "memory", "counted", "forgetful"])
def test_a_file_is_created_once(protocol: str, tmp_path) -> None:
    place = str(tmp_path) if protocol == "local" else f"{protocol}://{uuid.uuid4().hex}"
    assert [Storage(place).create_json("ledger.json", {"format": n, "parameters": {}}) for n in (1, 2)] == [True, False]
    assert Storage(place).read_json("ledger.json")["format"] == 1
    assert Storage(place).names("") == ["ledger.json"]


@pytest.mark.parametrize("protocol", ["local", "memory", "counted"])
def test_of_two_models_one_begins_the_ledger(protocol: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have looked, and found no ledger, before either writes: the other one's is not replaced."""
    place = str(tmp_path) if protocol == "local" else f"{protocol}://{uuid.uuid4().hex}"
    monkeypatch.setattr(Storage, "exists", lambda storage, name: False)
    asked = [{"format": 1, "parameters": {"w": [n]}} for n in (1, 2)]
    first = Storage(place).create_json("ledger.json", asked[0])
    seen = iter([False, True])  # on object stores, whether an error was that of a taken name
    monkeypatch.setattr(Storage, "exists", lambda storage, name: next(seen))
    second = Storage(place).create_json("ledger.json", asked[1])
    monkeypatch.undo()
    assert (first, second) == (True, False)
    assert Storage(place).read_json("ledger.json")["parameters"] == {"w": [1]}


def test_a_disk_without_hard_links_has_the_last_one_s(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert Storage(str(tmp_path)).create_json("ledger.json", {"format": 1, "parameters": {}})
    assert Storage(str(tmp_path)).names("") == ["ledger.json"]


def test_who_comes_at_the_same_time_does_not_get_it_either(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have looked, and found nothing, before either writes."""
    both, got = threading.Barrier(2), list[bool]()
    exists = Storage.exists

    def looked(storage: Storage, name: str) -> bool:
        found = exists(storage, name)
        if name == "stages/sft":
            both.wait(10)
        return found

    monkeypatch.setattr(Storage, "exists", looked)
    threads = [threading.Thread(target=lambda: got.append(Storage(url).create_folder("stages/sft"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False, True]
