"""A ledger may come from elsewhere: what it says about files is checked before a file is touched."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from trainer_attrib import Ledger, Recorder
from trainer_attrib.errors import ConfigurationError, LedgerFormatError


@pytest.fixture
def ledger(tmp_path):
    for stage in ("first", "second"):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        if stage == "second":
            model.load_state_dict(Ledger(tmp_path).stage("first").snapshot("end"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        with Recorder(tmp_path, stage=stage, model=model, optimizer=optimizer, strict=True) as recorder:
            for _ in range(5):
                with recorder.batch(["a", "b"], denominator=1):
                    model(torch.ones(2, 3)).sum().backward()
                optimizer.step()
    return tmp_path


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "name", ["../../../secret", "rows/../../x.parquet", "rows/part-0000-000000.pkl", "/etc/passwd"]
)
def test_a_manifest_cannot_point_elsewhere(ledger, name):
    def point(data):
        data["parts"][0]["files"][name] = {"bytes": 1, "blake2b": ""}

    edit(ledger / "stages" / "first" / "manifest-0000.json", point)
    with pytest.raises(LedgerFormatError, match="not the name of a part"):
        Ledger(ledger).stage("first").problems()


@pytest.mark.parametrize("stored_in", [["../..", "end"], ["first", "../../../weights"]])
def test_a_snapshot_cannot_point_elsewhere(ledger, stored_in):
    edit(ledger / "stages" / "second" / "stage.json", lambda data: data["snapshots"][0].update(stored_in=stored_in))
    with pytest.raises(ConfigurationError, match="is not a stage name"):
        Ledger(ledger).stage("second").snapshot("start")


@pytest.mark.parametrize("file", ["snapshots/end.safetensors", "second_moment/version-0001.safetensors"])
def test_verification_covers_weights_and_second_moments(ledger, file):
    stage = Ledger(ledger).stage("first")
    assert stage.problems() == []
    path = ledger / "stages" / "first" / file
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    assert stage.problems() == [f"first: {file} has another checksum than when it was sealed"]
    path.unlink()
    assert f"first: {file} is missing" in stage.problems()
