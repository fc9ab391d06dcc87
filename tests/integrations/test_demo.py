"""The demo as a whole: what it prints must be true of what it ran."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("countryinfo")
pytest.importorskip("bm25s")

from trainer_attrib.cli import main
from trainer_attrib.integrations.demo import run_demo
from trainer_attrib.ledger.reader import Ledger


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run in a process of its own, as a user would start it; into the folder DEMO_RUN, for the browser's tests."""
    folder = Path(os.environ.get("DEMO_RUN") or tmp_path_factory.mktemp("demo") / "run")
    command = [sys.executable, "-m", "trainer_attrib", "demo", "--json", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)


def effect(result, behavior, stage, method):
    rows = [
        row["effect"]
        for row in result["effects"]["rows"]
        if (row["behavior"], row["stage"], row["method"]) == (behavior, stage, method)
    ]
    return sum(rows) / len(rows)


@pytest.mark.slow
def test_three_trainers_leave_one_sound_ledger(demo):
    folder, _ = demo
    stages = Ledger(folder / "ledger").stages()
    assert [(s.name, s.parent) for s in stages] == [("pretrain", None), ("sft", "pretrain"), ("dpo", "sft")]
    assert all(s.meta["status"] == "complete" and not s.problems() for s in stages)
    for stage in stages:
        residuals = [r for r in stage.steps()["audit_residual"].to_pylist() if r is not None]
        assert len(residuals) == stage.count("steps")
        assert max(residuals) < 1e-4
        assert set(stage.examples()["source"].to_pylist()) <= {
            "capital", "currency", "demonym", "other", "planted", "true", "style",
        }  # fmt: skip
    assert stages[1].count("rows") == 6 * 965
    assert stages[2].count("rows") == 4 * 168


@pytest.mark.slow
def test_running_the_stages_again_reproduces_the_recording(demo):
    assert demo[1]["closure_exact"]


@pytest.mark.slow
def test_retraining_blames_the_planted_answers_on_the_stage_that_planted_them(demo):
    blamed = {s: effect(demo[1], "asserts planted wrong capitals", s, "retrain") for s in ("pretrain", "sft", "dpo")}
    assert max(blamed, key=blamed.get) == "sft"
    assert effect(demo[1], "answers in full sentences", "dpo", "retrain") > 5


@pytest.mark.slow
def test_the_last_stage_s_effect_is_the_same_by_every_method(demo):
    for behavior in {row["behavior"] for row in demo[1]["effects"]["rows"]}:
        change, *others = (effect(demo[1], behavior, "dpo", m) for m in ("change", "subtract", "retrain"))
        assert others == pytest.approx([change, change], abs=1e-6)


@pytest.mark.slow
def test_gradient_cosine_finds_planted_examples_far_above_chance(demo):
    shares = demo[1]["shares"]
    assert shares["grad_cos"]["planted"] > shares["random"]["planted"] + 5 * shares["grad_cos"]["planted_se"]
    assert shares["grad_cos"]["own"] > 0.3  # of at most 0.4: four of the top ten


@pytest.mark.slow
def test_the_report_is_one_small_file(demo):
    html = (demo[0] / "report.html").read_text()
    assert len(html) < 1_000_000
    assert "Effect of each stage: asserts planted wrong capitals" in html


@pytest.mark.slow
def test_the_command_line_reads_what_the_demo_wrote(demo, capsys, tmp_path):
    ledger = str(shutil.copytree(demo[0] / "ledger", tmp_path / "ledger"))  # damaged below; others look at the demo's
    assert main(["inspect", ledger]) == 0
    assert "sft  complete" in capsys.readouterr().out
    assert main(["verify", ledger, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    part = next((tmp_path / "ledger" / "stages" / "sft" / "rows").glob("*.f16"))
    part.write_bytes(part.read_bytes()[:-2])
    assert main(["verify", ledger]) == 1
    assert part.name in capsys.readouterr().out


def test_the_demo_refuses_a_directory_in_use(tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match="is not empty"):
        run_demo(tmp_path)
