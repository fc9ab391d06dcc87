"""The script of docs/evaluation.md runs, and what the page says about its output is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from trainer_attrib.evaluation.datamodeling import datamodeling_score

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    script = tmp_path_factory.mktemp("page") / "script.py"
    script.write_text(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    return runpy.run_path(str(script))


def test_recorded_scores_order_retrained_models(ran):
    found = datamodeling_score(ran["scores"], ran["halves"], ran["measured"])
    assert found.mean.value > 0.7
    assert 0.9 < found.ceiling < 1
    random = np.random.default_rng(1).normal(size=ran["scores"].shape)
    assert abs(datamodeling_score(random, ran["halves"], ran["measured"]).mean.value) < 0.3


def test_measuring_again_trains_nothing(ran):
    store = ran["store"]
    assert store.missing(ran["halves"], ran["seeds"]) == 0
    assert (store.measure(ran["halves"], ran["seeds"]) == ran["measured"]).all()


def test_the_output_is_that_of_the_script(ran):
    """Figures differ in their last digits between machines; what was measured does not."""
    shown = PAGE.read_text()
    found = datamodeling_score(ran["scores"], ran["halves"], ran["measured"])
    printed = float(re.search(r"datamodeling:  spearman (\S+)", shown)[1])
    assert printed == pytest.approx(found.mean.value, abs=0.03)
    for part in ("24 subsets", "3 seeds per subset", "top 10", "all 5 in one step", "6 bad of 60"):
        assert part in shown
