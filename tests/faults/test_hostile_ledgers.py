"""Whatever is changed in a ledger, reading it ends in an error of this library or in an answer; never in another
library's error, in memory running out, or in a file outside."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults import hostile
from trainer_attrib.errors import LedgerFormatError, TrainerAttribError
from trainer_attrib.ledger.storage import Storage

FUZZED = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
ODD = st.one_of(
    st.none(), st.booleans(), st.sampled_from([-1, 0, 2**31, 2**63, 10**30, 1e308, "", "../../etc", "O", "x" * 300]),
    st.just([]), st.just({}), st.just([[[]]]), st.just({"a": {"b": []}}),
)  # fmt: skip


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; every test puts back what it changed."""
    place = tmp_path_factory.mktemp("hostile")
    hostile.make(place)
    hostile.read_everything(place)
    return place


def survives(place: Path) -> None:
    """Reading ends in an answer or in an error of this library: anything else fails the test."""
    with suppress(TrainerAttribError):
        hostile.read_everything(place)


def spots(found: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    inner = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    return [at, *(spot for key, value in inner for spot in spots(value, (*at, key)))]


def put(found: Any, at: tuple[Any, ...], value: Any) -> Any:
    """The document with another value there; it is removed where the value is ``...``."""
    if not at:
        return {} if value is ... else value
    inner = dict(found) if isinstance(found, dict) else list(found)
    if len(at) == 1 and value is ...:
        del inner[at[0]]
    else:
        inner[at[0]] = put(inner[at[0]], at[1:], value)
    return inner


JSONS = [
    "ledger.json", "stages/one/stage.json", "stages/two/stage.json", "stages/one/manifest-0000.json",
    "stages/one/weights.json", "stages/one/passes/end/pass.json",
]  # fmt: skip


@pytest.mark.parametrize("name", JSONS)
def test_any_value_of_a_document_may_be_anything(ledger: Path, name: str) -> None:
    document = json.loads((ledger / name).read_text())

    @FUZZED
    @given(st.sampled_from(spots(document)), st.one_of(st.just(...), ODD))
    def change(at: tuple[Any, ...], value: Any) -> None:
        with hostile.changed(ledger, name, json.dumps(put(document, at, value)).encode(), sealed=False):
            survives(ledger)

    change()


@pytest.mark.parametrize("kind", ["parquet", "safetensors", "f16", "raw", "json"])
def test_any_bytes_may_be_other_ones(ledger: Path, kind: str) -> None:
    names = [name for name in hostile.files(ledger) if name.endswith(kind)]

    @FUZZED
    @given(st.data(), st.sampled_from(names), st.booleans())
    def change(data: st.DataObject, name: str, sealed: bool) -> None:
        content = bytearray((ledger / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, max(0, len(content) - 1)))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
        with hostile.changed(ledger, name, bytes(content[:cut]), sealed=sealed):
            survives(ledger)

    change()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "is not valid JSON: maximum recursion depth"),
        ('{"format": 1, "parameters": {"w": [NaN]}}', "is not valid JSON: NaN is no number"),
        ('{"format": 1, "parameters": {"w": [1e999]}}', r"has inf as 'parameters.w\[0\]', expected an integer"),
        ('{"format": 1, "parameters": {"w": [' + "9" * 5000 + "]}}", "is not valid JSON: Exceeds the limit"),
    ],
    ids=["deep", "nan", "infinite", "digits"],
)  # fmt: skip
def test_numbers_and_depth_have_bounds(ledger: Path, text: str, message: str) -> None:
    with (
        hostile.changed(ledger, "ledger.json", text.encode(), sealed=False),
        pytest.raises(LedgerFormatError, match=message),
    ):
        hostile.read_everything(ledger)


def test_a_file_of_json_has_a_most_length(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_attrib.ledger.storage.MOST_JSON", 10)
    with pytest.raises(LedgerFormatError, match="bytes, more than 10"):
        hostile.read_everything(ledger)


@pytest.mark.parametrize("name", ["stages/one/snapshots/end.safetensors", "ledger.json", "stages/one"])
def test_a_link_that_leads_out_of_the_ledger_is_refused(ledger: Path, name: str, tmp_path: Path) -> None:
    outside = (ledger / name).rename(tmp_path / "outside")
    (ledger / name).symlink_to(outside)
    try:
        with pytest.raises(LedgerFormatError, match="leads out of the ledger"):
            hostile.read_everything(ledger)
    finally:
        (ledger / name).unlink()
        outside.rename(ledger / name)
    hostile.read_everything(ledger)


def test_links_inside_a_ledger_and_to_it_are_followed(ledger: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(ledger)
    hostile.read_everything(tmp_path / "linked")
    (ledger / "within.json").symlink_to(ledger / "ledger.json")
    assert Storage(ledger).read_json("within.json")["format"] == 1
    (ledger / "within.json").unlink()
