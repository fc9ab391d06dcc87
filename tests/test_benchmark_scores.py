"""What a benchmark prints as the most that could be reached is what can be reached."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.stage_runs import scoring


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_bars_that_know_every_standard_error_reach_the_query_oracle(spread):
    draw = np.random.default_rng(0)
    known = np.exp(spread * draw.normal(size=(40, 50)))
    true = draw.normal(size=known.shape)
    effects = true + known * draw.normal(size=known.shape)
    cells = [
        scoring.Cell("regime", seed, "stage", "loss", 0, effects[seed], known[seed], true[seed], 1.0)
        for seed in range(len(known))
    ]
    row = scoring.scored("regime", "method", cells)
    assert row["bar spearman"] == pytest.approx(row["query oracle"], abs=0.05)
    assert row["cell oracle"] < row["query oracle"]  # what differs within a cell is nothing to it
