"""Rows of given examples at recorded snapshots."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.analysis.stages import margins, three_stages
from tests.analysis.test_influence import FULL, RAW, dense, gradient
from trainer_attrib import Analyzer, Examples
from trainer_attrib.analysis import passes
from trainer_attrib.analysis.passes import Snapshots
from trainer_attrib.analysis.recipes.trackstar import TrackStar
from trainer_attrib.errors import ConfigurationError, CorruptPartError, StageNotFoundError
from trainer_attrib.ledger.passes import PassFiles


def examples(run, stage="first", batch_size=7, lengths=()):
    x, y = run.data[stage]
    made = Examples.of_classes(x, y, ids=[f"{stage}/{i}" for i in range(len(x))], batch_size=batch_size)
    return replace(made, lengths=lengths) if lengths else made


def ordered(influence, stage="first"):
    place = {str(example): n for n, example in enumerate(influence.examples.ids)}
    return influence.scores[:, [place[f"{stage}/{i}"] for i in range(24)]]


def test_rows_at_the_end_equal_dense_gradients(tmp_path):
    run, behavior = three_stages(tmp_path / "run", "sgd", sketch=RAW, stages=("first",)), margins()
    analyzer = Analyzer(run.ledger, run.model)
    [made] = analyzer.sketch({"first": examples(run)})
    assert (made.stage, made.snapshot, made.examples, made.bytes_per_example) == ("first", "end", 24, 4 * 83)
    queries, rows = dense(run, behavior)
    for recipe in ("grad_dot", "grad_cos"):
        found = ordered(analyzer.influence([behavior], recipe=recipe, source="snapshot"))
        q, g = (queries, rows) if recipe == "grad_dot" else (F.normalize(queries, dim=1), F.normalize(rows, dim=1))
        np.testing.assert_allclose(found, -(q @ g.T).numpy(), rtol=1e-4, atol=1e-5)


def test_rows_inside_a_stage_are_gradients_at_that_snapshot_scaled_by_its_second_moments(tmp_path):
    run, behavior = three_stages(tmp_path / "run", "adamw", sketch=FULL, stages=("first",)), margins()
    analyzer = Analyzer(run.ledger, run.model)
    stage = analyzer.lineage[0]
    middle = next(entry for entry in stage.meta["snapshots"] if entry["name"] not in ("start", "end"))
    version = max(v["version"] for v in stage.meta["versions"] if v["after_step"] <= middle["step"])
    analyzer.sketch({"first": examples(run)}, [middle["name"]])
    found = ordered(analyzer.influence([behavior], recipe="grad_dot", source=Snapshots((middle["name"],))))
    queries = torch.stack([gradient(run.model, behavior.value_of(run.model, q)) for q in range(len(behavior))])
    run.model.load_state_dict(stage.snapshot(middle["name"]))
    _, rows = dense(run, behavior)
    factors, scale = stage.factors(version), []
    for weight in ("body.weight", "head.weight"):
        row, column = factors[weight]
        scale.append((torch.outer(row, column) / row.mean()).rsqrt().flatten())
    scale = torch.cat(scale).double()
    expected = -((queries * scale) @ (rows * scale).T).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("recipe", ["trackstar", "fisher", "grad_dot"])
def test_batches_and_their_order_change_nothing(tmp_path, recipe):
    scores = []
    for n, (size, lengths) in enumerate([(24, ()), (1, ()), (5, list(range(24, 0, -1))), (5, [3, 1] * 12)]):
        run = three_stages(tmp_path / str(n), "adamw", sketch=FULL, stages=("first",))
        data = {"first": examples(run, batch_size=size, lengths=lengths)}
        chosen = Analyzer(run.ledger, run.model).influence([margins()], recipe=recipe, source="snapshot", data=data)
        scores.append(ordered(chosen))
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], rtol=1e-3, atol=1e-4 * np.abs(scores[0]).max())


def test_a_pass_that_broke_off_goes_on_where_it_was(tmp_path, monkeypatch):
    run = three_stages(tmp_path / "run", "sgd", sketch=RAW, stages=("first",))
    analyzer, data = Analyzer(run.ledger, run.model), {"first": examples(run)}
    monkeypatch.setattr(passes, "PART_BYTES", 4 * 83 * 7)  # a part holds a batch
    add, calls = PassFiles.add, []

    def fails_at_the_third(self, table, sketches):
        calls.append(table.num_rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, table, sketches)

    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    monkeypatch.setattr(PassFiles, "add", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        analyzer.sketch(data)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    with pytest.raises(StageNotFoundError, match="no finished pass at 'end': rows of 14 examples"):
        analyzer.influence([margins()], recipe="grad_dot", source="snapshot")
    analyzer.sketch({"first": examples(run, batch_size=4)})  # batches may be of another size
    assert calls == [7, 7, 7, 4, 4, 2]  # the third was lost
    resumed = ordered(analyzer.influence([margins()], recipe="grad_dot", source="snapshot"))
    analyzer.sketch(data)
    assert len(calls) == 6  # finished passes are not made again
    other = three_stages(tmp_path / "other", "sgd", sketch=RAW, stages=("first",))
    whole = Analyzer(other.ledger, other.model).influence(
        [margins()], recipe="grad_dot", source="snapshot", data={"first": examples(other)}
    )
    np.testing.assert_allclose(resumed, ordered(whole), rtol=1e-5)


def test_other_examples_than_a_pass_was_begun_over_are_refused(tmp_path):
    run = three_stages(tmp_path / "run", "sgd", sketch=RAW, stages=("first",))
    analyzer, data = Analyzer(run.ledger, run.model), examples(run)
    analyzer.sketch({"first": data})
    changed = [(x + (n == 5), y) for n, (x, y) in enumerate(data.dataset)]
    with pytest.raises(ConfigurationError, match="begun over other examples"):
        analyzer.sketch({"first": Examples(changed, data.loss, data.ids, data.texts, batch_size=7)})


def test_what_is_not_there_is_refused_by_name(tmp_path):
    run = three_stages(tmp_path / "run", "sgd", sketch=RAW, stages=("first",))
    analyzer = Analyzer(run.ledger, run.model)
    with pytest.raises(StageNotFoundError, match="no finished pass at 'end'"):
        analyzer.influence([margins()], source="snapshot")
    with pytest.raises(StageNotFoundError, match="no snapshot 'mid-77'"):
        analyzer.sketch({"first": examples(run)}, ["mid-77"])
    with pytest.raises(ConfigurationError, match="Unknown source 'memory'"):
        analyzer.influence([margins()], source="memory")


def test_damaged_passes_are_found(tmp_path):
    run = three_stages(tmp_path / "run", "sgd", sketch=RAW, stages=("first",))
    analyzer = Analyzer(run.ledger, run.model)
    analyzer.sketch({"first": examples(run)})
    assert analyzer.lineage[0].problems() == []
    folder = tmp_path / "run" / "stages" / "first" / "passes" / "end"
    assert json.loads((folder / "pass.json").read_text())["parts"][0]["rows"] == 24
    raw = folder / "part-000000.raw"
    raw.write_bytes(raw.read_bytes()[:-4])
    assert any("passes/end/part-000000.raw" in problem for problem in analyzer.lineage[0].problems())
    with pytest.raises(CorruptPartError, match="not what was sealed"):
        analyzer.influence([margins()], source="snapshot")


def test_a_row_for_every_snapshot_is_averaged(tmp_path):
    run = three_stages(tmp_path / "run", "sgd", sketch=RAW, stages=("first",))
    analyzer, data, recipe = (
        Analyzer(run.ledger, run.model),
        {"first": examples(run)},
        TrackStar(train=False, task=False),
    )

    def scores(*names):
        return ordered(analyzer.influence([margins()], recipe=recipe, data=data, source=Snapshots(names)))

    np.testing.assert_allclose(scores("start", "end"), (scores("start") + scores("end")) / 2, atol=1e-5)
