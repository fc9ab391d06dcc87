"""A recorded stage run again from its ledger and its examples only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.analysis.stages import Classifier, margins, three_stages
from trainer_attrib import Analyzer, Examples, Recorder, SketchConfig
from trainer_attrib.analysis.recorded_steps import RecordedOrder, RecordedSteps
from trainer_attrib.analysis.retraining import retrain
from trainer_attrib.errors import ConfigurationError, MissingDataError, NotComparableError

ROWS, BATCH, STEPS = 21, 4, 16


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 6, generator=generator).double(), torch.randint(0, 3, (ROWS,), generator=generator)


def train(model, optimizer, max_norm, without=(), recorder=None, denominator=2 * BATCH):
    """Steps of two micro-batches, of which the last rows come short; every loss over ``denominator``."""
    x, y = data()
    order = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for rows in torch.randperm(ROWS, generator=order)[: 2 * BATCH - 1].split(BATCH):
            kept = [int(i) for i in rows if int(i) not in without]
            if recorder is not None:
                with recorder.batch([str(int(i)) for i in rows], denominator=denominator):
                    (F.cross_entropy(model(x[rows]), y[rows], reduction="sum") / denominator).backward()
            elif kept:
                (F.cross_entropy(model(x[kept]), y[kept], reduction="sum") / denominator).backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return model


def make(kind, tmp_path, max_norm):
    torch.manual_seed(0)
    model = Classifier().double()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    makers = {
        "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1),
        "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    }
    optimizer = makers[kind](model)
    sketch = SketchConfig(rank=2, dtype="float32")
    with Recorder(tmp_path, stage="only", model=model, optimizer=optimizer, sketch=sketch, strict=True) as recorder:
        train(model, optimizer, max_norm, recorder=recorder)

    def again(without):
        other = Classifier().double()
        other.load_state_dict(initial)
        return train(other, makers[kind](other), max_norm, without)

    return Analyzer(tmp_path, model), again


def rerun(analyzer, examples, left_out=(), stage="only"):
    [stage] = [found for found in analyzer.lineage if found.name == stage]
    order = RecordedOrder.of(stage, examples)
    start = analyzer._view([]).start(stage)
    program = {stage.name: lambda model: RecordedSteps(model, order, examples, left_out)}
    return retrain(analyzer.model, start, [stage], program), order


def farthest(state, model):
    return max(float((state.weights[name] - p.detach()).abs().max()) for name, p in model.named_parameters())


@pytest.mark.parametrize(("kind", "max_norm"), [("adamw", None), ("sgd", 0.3)])
def test_it_ends_where_training_ended_and_where_training_without_examples_ends(tmp_path, kind, max_norm):
    analyzer, again = make(kind, tmp_path, max_norm)
    examples = Examples.of_classes(*data())
    whole, order = rerun(analyzer, examples)
    assert farthest(whole, analyzer.model) < 1e-12
    assert ["clipped to a norm of 0.3" in note for note in order.notes] == [True] * (max_norm is not None)
    left_out = (0, 3, 4, 9, 17)
    without, _ = rerun(analyzer, examples, left_out)
    assert farthest(without, again(left_out)) < 1e-12
    assert farthest(without, analyzer.model) > 1e-3


def test_a_step_of_which_nothing_is_left_goes_on_with_its_momentum(tmp_path):
    analyzer, again = make("sgd", tmp_path, None)
    left_out = tuple(range(1, ROWS))
    without, _ = rerun(analyzer, Examples.of_classes(*data()), left_out)
    assert farthest(without, again(left_out)) < 1e-12


def test_examples_may_have_another_order_and_more_of_them(tmp_path):
    run = three_stages(tmp_path / "run", "momentum")
    x, y = run.data["second"]
    order = [*range(23, -1, -1), 0]
    ids = [*(f"second/{i}" for i in order[:-1]), "another"]
    analyzer = Analyzer(run.ledger, run.model)
    examples = Examples.of_classes(x[order], y[order], ids=ids)
    state, _ = rerun(analyzer, examples, stage="second")
    recorded = analyzer._view([]).end(analyzer.lineage[1]).weights
    assert max(float((state.weights[n] - recorded[n]).abs().max()) for n in recorded) < 1e-12


def test_fewer_examples_of_each_step_weigh_as_much_together(tmp_path):
    analyzer, _ = make("adamw", tmp_path, None)
    examples = Examples.of_classes(*data())
    steps = RecordedSteps(analyzer.model, RecordedOrder.of(analyzer.lineage[0], examples), examples, (2, 5))
    whole, thin = list(steps.steps()), list(steps.steps(2))
    assert len(whole) == len(thin) == STEPS
    assert sum(step.share for step in thin) < 0.7 * sum(step.share for step in whole)
    ones = replace(examples, loss=lambda model, items: torch.ones(len(items)))
    even = RecordedSteps(analyzer.model, steps.order, ones, ())
    totals = [[float(sum(loss() for loss in step.losses)) for step in even.steps(n)] for n in (1, 2)]
    assert totals[0] == pytest.approx([7 / 8] * STEPS)
    assert totals[1] == pytest.approx(totals[0])


def test_a_program_of_a_stage_makes_the_methods_for_stages_work_without_user_code(tmp_path):
    run, behavior = three_stages(tmp_path / "run", "adamw"), margins()
    analyzer = Analyzer(run.ledger, run.model)
    programs = {}
    for stage in analyzer.lineage[1:]:
        examples = Examples.of_classes(*run.data[stage.name], ids=[f"{stage.name}/{i}" for i in range(24)])
        order = RecordedOrder.of(stage, examples)
        programs[stage.name] = lambda model, o=order, e=examples: RecordedSteps(model, o, e)
    found, truth = (analyzer.stage_effects([behavior], "retrain", programs=given) for given in (programs, run.programs))
    effects = [{(r.stage, r.query): r.effect for r in result.rows} for result in (found, truth)]
    assert effects[0] == pytest.approx(effects[1], abs=1e-10)


def test_what_is_not_there_is_refused_by_name(tmp_path):
    run = three_stages(tmp_path / "run", stages=("first",))
    analyzer = Analyzer(run.ledger, run.model)
    x, y = run.data["first"]
    with pytest.raises(MissingDataError, match="3 of the 24 examples that stage 'first' was trained on are not among"):
        rerun(analyzer, Examples.of_classes(x[3:], y[3:], ids=[f"first/{i}" for i in range(3, 24)]), stage="first")
    sampled = three_stages(tmp_path / "sampled", sketch=SketchConfig(rank=4, sample=0.5), stages=("first",))
    whole = Examples.of_classes(x, y, ids=[f"first/{i}" for i in range(24)])
    with pytest.raises(NotComparableError, match="only a sample of the examples has rows"):
        rerun(Analyzer(sampled.ledger, sampled.model), whole, stage="first")
    steps = RecordedSteps(analyzer.model, RecordedOrder.of(analyzer.lineage[0], whole), whole)
    with pytest.raises(ConfigurationError, match="how to make an optimizer"):
        steps.optimizer()
