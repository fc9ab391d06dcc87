"""A cleaned data set on disk: whole or not at all, never over something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("datasets")

import datasets

from tests.analysis.test_suspects import random_scores, scored
from tests.report.test_page import HOSTILE
from trainer_attrib.analysis.suspects import Suspects
from trainer_attrib.errors import ConfigurationError


@pytest.fixture
def found():
    return Suspects.of(scored(random_scores()))


def rows(count=200):
    return [{"id": f"e{i}", "text": HOSTILE if i == 5 else f"text {i}\u2028", "n": i} for i in range(count)]


def dropped_in(folder):
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_what_is_kept_is_a_data_set_and_what_is_dropped_has_its_reason(tmp_path, found):
    folder = found.write_cleaned(tmp_path / "new" / "clean", rows())
    kept = datasets.load_from_disk(str(folder))
    assert kept["n"][:] == [i for i in range(200) if i not in (5, 40, 41)]
    assert kept["text"][0] == "text 0\u2028"
    dropped = dropped_in(folder)
    assert [row["id"] for row in dropped] == ["e5", "e40", "e41"]
    assert dropped[0]["text"] == HOSTILE
    reasons = {row.example: (row.reason, row.score) for row in found.rows}
    assert all((row["reason"], row["score"]) == reasons[row["id"]] for row in dropped)
    assert [path.name for path in folder.parent.iterdir()] == ["clean"]


def test_a_data_set_of_the_library_keeps_its_types(tmp_path, found):
    features = datasets.Features(
        {"id": datasets.Value("string"), "text": datasets.Value("large_string"), "n": datasets.Value("int8")}
    )
    whole = datasets.Dataset.from_list(rows(120), features=features).add_column("more", [[1, 2]] * 120)
    folder = found.write_cleaned(tmp_path / "clean", whole)
    kept = datasets.load_from_disk(str(folder))
    assert kept.features == whole.features
    assert len(kept) == 117
    assert found.keep(whole)["id"][:] == kept["id"][:]


def test_rows_may_lack_columns_but_not_mix_types(tmp_path, found):
    given = rows()
    given[0]["source"] = "web"
    kept = datasets.load_from_disk(str(found.write_cleaned(tmp_path / "clean", given)))
    assert kept["source"][:2] == ["web", None]
    given[1]["n"] = "one"
    with pytest.raises(ConfigurationError, match="cannot be stored as columns"):
        found.write_cleaned(tmp_path / "other", given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean"]


def test_nothing_is_written_over_and_nothing_half(tmp_path, found, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigurationError, match="exists already"):
        found.write_cleaned(tmp_path / "there", rows())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="exists already"):
        found.write_cleaned(tmp_path / "link", rows())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="Cannot write"):
        found.write_cleaned(tmp_path / "file" / "clean", rows())
    for fault in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fails(*args, fault=fault, **settings):
            raise fault

        monkeypatch.setattr(Path, "write_text", fails)  # of the list of what was dropped, the last thing written
        with pytest.raises(ConfigurationError if isinstance(fault, OSError) else KeyboardInterrupt):
            found.write_cleaned(tmp_path / "clean", rows())
        monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "there"]


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path, found, monkeypatch):
    write = datasets.Dataset.save_to_disk

    def appears(self, path, **settings):
        (tmp_path / "clean").mkdir()
        write(self, path, **settings)

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", appears)
    with pytest.raises(ConfigurationError, match="exists already"):
        found.write_cleaned(tmp_path / "clean", rows())
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]
    assert not list((tmp_path / "clean").iterdir())
