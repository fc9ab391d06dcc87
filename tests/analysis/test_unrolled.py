"""Unrolled influence is the derivative of training, and says when a derivative means nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.analysis.adapted import adapted, llama, losses, record, trainer_of
from tests.analysis.looped import network
from tests.analysis.weighted import EXAMPLES, Weighted, asked, falling, in_order
from trainer_attrib import Analyzer, Behavior, Recorder, SketchConfig
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.loops import Loop
from trainer_attrib.analysis.recipes.unrolled import Unrolled
from trainer_attrib.analysis.unrolled.smoothness import correlation, kinks
from trainer_attrib.analysis.unrolled.unroll import Effort, unroll
from trainer_attrib.errors import AnalysisError, ConfigurationError, MissingProgramError, NotComparableError

ALONE = Unrolled(check=0)


def sgd(**settings: Any) -> Any:
    return lambda model: torch.optim.SGD(model.parameters(), lr=0.1, **settings)


TWO = ("first", "second")
CASES = {
    "SGD": Weighted(sgd()),
    "momentum and decay": Weighted(sgd(momentum=0.9, weight_decay=0.01)),
    "Nesterov": Weighted(sgd(momentum=0.8, nesterov=True), drop_last=True),
    "dampened": Weighted(sgd(momentum=0.8, dampening=0.3), make_schedule=falling),
    "AdamW": Weighted(),
    "AdamW, clipped, with a schedule": Weighted(max_norm=0.3, make_schedule=falling, accumulate=2),
    "Adam with coupled decay": Weighted(lambda model: torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.1)),
    "SGD, clipped": Weighted(sgd(momentum=0.9), max_norm=0.5),
    "dropout": Weighted(make_model=lambda: network(0.3, norm=False)),
    "two stages": Weighted(stages=TWO),
    "a carried optimizer": Weighted(stages=TWO, carried=True, max_norm=0.5),
    "carried momentum": Weighted(sgd(momentum=0.9), stages=TWO, carried=True),
    "a frozen layer": Weighted(sgd(momentum=0.9), stages=TWO, frozen="0."),
}


def scored(run: Weighted, analyzer: Analyzer, recipe: Any = ALONE, programs: Any = None, **settings: Any) -> Any:
    programs = run.programs if programs is None else programs
    return analyzer.influence([asked()], recipe=recipe, programs=programs, controls=(), **settings)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weighted, Analyzer]:
    run = Weighted()
    return run, run.analyzer(tmp_path_factory.mktemp("adamw"))


@pytest.mark.parametrize("name", CASES)
def test_scores_are_central_differences_of_retraining(name: str, tmp_path: Path) -> None:
    run = CASES[name]
    found = scored(run, run.analyzer(tmp_path))
    for stage in run.stages:
        expected = run.differences(asked(), stage)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(in_order(found, stage), expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["AdamW, clipped, with a schedule", "dropout", "a carried optimizer"])
def test_the_replay_ends_where_training_ended_bit_for_bit(name: str, tmp_path: Path) -> None:
    run = CASES[name]
    analyzer = run.analyzer(tmp_path)
    for part in unroll(analyzer._view([asked()], run.programs), analyzer.lineage, Effort()):
        recorded = part.stage.snapshot("end")
        assert part.drift == 0.0
        assert [n for n, weight in recorded.items() if not torch.equal(weight, part.end.weights[n])] == []


def test_scores_do_not_depend_on_what_is_kept_or_shared(recorded: Any) -> None:
    whole = scored(*recorded).scores
    for spacing in (2, 4, 100):
        np.testing.assert_array_equal(scored(*recorded, Unrolled(check=0, spacing=spacing)).scores, whole)
    np.testing.assert_allclose(scored(*recorded, Unrolled(check=0, at_once=1)).scores, whole, rtol=1e-6)


def test_examples_are_described_as_the_ledger_has_them(recorded: Any) -> None:
    found = scored(*recorded, "unrolled")
    assert found.recipe == "unrolled"
    assert sorted(found.examples.ids) == [f"only/{i}" for i in range(EXAMPLES)]
    assert list(found.examples.texts) == list(found.examples.ids)
    assert {*found.examples.sources} == {"data"}
    assert {*found.examples.steps} == {7, 8, 9}
    assert found.scores.dtype == np.float32


def test_model_and_random_states_are_left_as_they_were(recorded: Any) -> None:
    run, analyzer = recorded
    before, random = copy.deepcopy(analyzer.model.state_dict()), torch.get_rng_state()
    scored(run, analyzer, Unrolled(check=2))
    assert all(torch.equal(before[name], value) for name, value in analyzer.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(not module._forward_hooks for module in analyzer.model.modules())


def test_duplicates_share_what_they_did(tmp_path: Path) -> None:
    """Two equal rows under one id: the sum of both; under two ids: each its own."""

    class Doubled(Weighted):
        def batches(self, stage: str) -> list[Any]:
            return [tuple(torch.cat([part, part[:1]]) for part in batch) for batch in super().batches(stage)]

    run = Doubled()
    expected = run.differences(asked(), "only")
    np.testing.assert_allclose(in_order(scored(run, run.analyzer(tmp_path)), "only"), expected, rtol=1e-6, atol=1e-9)


# ---- models that compute their loss themselves -----------------------------------------------------------------------


class TinyLM(nn.Module):
    """Causal, with attention and the loss inside, mean over all tokens of rows of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.qkv, self.head = nn.Embedding(9, 8), nn.Linear(8, 24), nn.Linear(8, 9)
        self.double()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embed(tokens)
        attended = F.scaled_dot_product_attention(*self.qkv(hidden).chunk(3, -1), is_causal=True)
        logits = self.head(hidden + attended)[:, :-1]
        return {"loss": F.cross_entropy(logits.transpose(1, 2), labels[:, 1:]), "logits": logits}


def test_a_language_model_that_computes_its_loss_itself(tmp_path: Path) -> None:
    """A weight multiplies the example's part of the sum over all tokens."""
    tokens, make = torch.randint(0, 9, (4, 7)), sgd(momentum=0.9)
    labels = tokens.where(torch.arange(7) < torch.tensor([[7], [4], [5], [6]]), -100)
    behavior = Behavior(
        "loss", list(tokens.roll(1, 0)), lambda m, rows: m(torch.stack(rows), torch.stack(rows))["logits"][:, -1, 3]
    )

    def trained(weights: torch.Tensor) -> np.ndarray:
        model = TinyLM()
        optimizer = make(model)
        for _ in range(4):
            optimizer.zero_grad()
            logits = model(tokens, labels)["logits"]
            losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
            ((losses * weights).sum() / (labels[:, 1:] != -100).sum()).backward()
            optimizer.step()
        return behavior.values(model).numpy()

    def program(model: Any) -> Loop:
        return Loop(model, lambda m, batch: m(*batch)["loss"], [(tokens, labels)], make, 4)

    loop = program(TinyLM())
    names = [f"text-{i}" for i in range(4)]
    optimizer = loop.optimizer()
    settings = {"sketch": SketchConfig(rank=2), "strict": True}
    with Recorder(tmp_path, stage="lm", model=loop.model, optimizer=optimizer, **settings) as recorder:
        for _, step in zip(range(4), loop.steps(), strict=False):
            optimizer.zero_grad()
            with recorder.batch(names, denominator=18):
                step.losses[0]().backward()
            optimizer.step()
    analyzer = Analyzer(tmp_path, loop.model)
    found = analyzer.influence([behavior], recipe=ALONE, programs={"lm": program}, controls=())
    assert list(found.examples.ids) == names
    small = 1e-4 * torch.eye(4).double()
    expected = np.stack([(trained(1 + change) - trained(1 - change)) / 2e-4 for change in small], axis=1)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_a_trainer_with_an_adapter_accumulation_and_clipping(tmp_path: Path) -> None:
    """Held against replays with other weights; that those are retraining is shown above."""
    settings = {"optim": "sgd", "learning_rate": 0.3, "num_train_epochs": 3, "max_grad_norm": 0.5}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    model = record(adapted(llama(), init_lora_weights=False), tmp_path, "tuned", **settings)
    programs = {"tuned": lambda model: trainer_of(model, tmp_path / "again", "tuned", [], **settings)}
    analyzer = Analyzer(tmp_path / "ledger", model)
    found = analyzer.influence([losses()], recipe=Unrolled(check=4), programs=programs, controls=())
    assert sorted(found.examples.ids) == [f"tuned-{i}" for i in range(8)]
    said = [caveat for caveat in found.caveats if caveat.startswith("stage")]
    assert len(said) == 1, said  # no drift, nothing outside
    assert float(said[0].split("correlation ")[1].rstrip(")")) >= 0.99


# ---- when it means something -----------------------------------------------------------------------------------------


def kinked() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).double()


def test_smooth_training_is_said_to_be_predicted(recorded: Any) -> None:
    found = scored(*recorded, "unrolled")
    assert any("these scores predict what 5 replays" in caveat for caveat in found.caveats)
    assert not any("not smooth enough" in caveat for caveat in found.caveats)


def test_kinks_are_found_by_what_they_do(tmp_path: Path) -> None:
    run = Weighted(lambda model: torch.optim.SGD(model.parameters(), lr=1.0), make_model=kinked)
    found = scored(run, run.analyzer(tmp_path), Unrolled())
    [said] = [caveat for caveat in found.caveats if "not smooth enough" in caveat]
    assert "stage 'only'" in said
    assert "kinks (2 ReLU)" in said
    assert "recipe='gauss_newton'" in said


def test_kinks_that_are_not_crossed_do_no_harm(tmp_path: Path) -> None:
    run = Weighted(lambda model: torch.optim.SGD(model.parameters(), lr=1e-3), make_model=kinked)
    found = scored(run, run.analyzer(tmp_path), Unrolled())
    assert any("these scores predict" in caveat for caveat in found.caveats)


def test_without_a_check_nothing_is_claimed(recorded: Any) -> None:
    assert any("was not checked" in caveat for caveat in scored(*recorded).caveats)


def test_correlations_are_of_changes_in_units_of_each_query() -> None:
    predicted = np.random.default_rng(0).standard_normal((4, 2))
    assert correlation(predicted, 5 + 2 * predicted) == pytest.approx(1)
    assert correlation(predicted * [1, 100], predicted * [1, -100]) == pytest.approx(0, abs=1e-12)
    assert correlation(predicted, np.full((4, 2), np.nan)) == 0.0
    assert correlation(predicted, np.ones((4, 2))) == 0.0
    assert correlation(np.zeros((4, 2)), np.ones((4, 2))) == 1.0


def test_kinked_modules_are_counted() -> None:
    assert kinks(nn.Sequential(nn.ReLU(), nn.GELU(), nn.Sequential(nn.ReLU(), nn.Hardtanh()))) == {
        "ReLU": 2,
        "Hardtanh": 1,
    }


def test_what_the_scores_leave_out_is_said(tmp_path: Path) -> None:
    run = Weighted(make_model=lambda: network(0.0, norm=True))
    analyzer = run.analyzer(tmp_path)
    assert any("training moved 2 buffers" in caveat for caveat in scored(run, analyzer).caveats)

    def penalized(model: Any) -> Loop:
        loop = run.loop("only", model)
        return replace(loop, loss=lambda m, b: loop.loss(m, b) + 0.1 * sum(p.square().sum() for p in m.parameters()))

    caveats = scored(run, analyzer, programs={"only": penalized}).caveats
    assert any("passes by the outputs" in caveat for caveat in caveats)
    assert any("ended beside the recorded weights" in caveat for caveat in caveats)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_programs_are_needed(tmp_path: Path) -> None:
    run = Weighted(stages=TWO)
    analyzer = run.analyzer(tmp_path)
    with pytest.raises(MissingProgramError, match=r"needs programs for \['second'\]"):
        scored(run, analyzer, programs={"first": run.programs["first"]})
    late = scored(run, analyzer, programs={"second": run.programs["second"]}, stages=["second"])
    assert {*late.examples.stages} == {"second"}
    with pytest.raises(MissingProgramError, match="cannot be run step by step"):
        scored(run, analyzer, programs={stage: lambda model: lambda: None for stage in TWO})
    with pytest.raises(ConfigurationError, match="carried back"):
        scored(run, analyzer, carry=Propagate())


@pytest.mark.parametrize("settings", [{"sample": 0.5}, {"every_n_steps": 2}])
def test_every_example_of_every_step_must_be_known(settings: Any, tmp_path: Path) -> None:
    run = Weighted(recording={"sketch": SketchConfig(rank=2, **settings)})
    with pytest.raises(NotComparableError, match="not known which examples each step"):
        scored(run, run.analyzer(tmp_path))


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.RMSprop(p, lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True)]
)
def test_optimizers_with_another_rule_are_refused(make: Any, tmp_path: Path) -> None:
    run = Weighted(lambda model: make(model.parameters()))
    with pytest.raises(NotComparableError, match="cannot be followed backwards"):
        scored(run, run.analyzer(tmp_path))


class Opaque(torch.autograd.Function):
    """Once differentiable."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Hidden(torch.autograd.Function):
    """Computes its gradient on the way forward, as fused losses do: what that depends on is lost."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ctx.found = (logits.softmax(1) - F.one_hot(labels, 3)) / len(labels)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * ctx.found, None


class Signs(Loop):
    """Clips in a way of its own."""

    def clip(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = parameter.grad.sign()


def test_programs_that_cannot_be_followed_are_refused(recorded: Any) -> None:
    run, analyzer = recorded

    def changed(loss: Any, kind: type[Loop] = Loop) -> Any:
        def program(model: Any) -> Loop:
            loop = run.loop("only", model)
            return kind(model, loss, loop.batches, loop.make_optimizer, loop.total_steps)

        return {"only": program}

    def plain(model: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(AnalysisError, match="cannot be differentiated twice"):
        scored(run, analyzer, programs=changed(lambda m, b: F.cross_entropy(Opaque.apply(m(b[0])), b[1])))
    with pytest.raises(NotComparableError, match="clipped its gradient in a way"):
        scored(run, analyzer, programs=changed(plain, Signs))
    with pytest.raises(NotComparableError, match="not computed from outputs of 2 rows"):
        scored(run, analyzer, programs=changed(lambda m, b: m(b[0].repeat(3, 1)).square().mean()))
    with pytest.raises(NotComparableError, match="diverged"):
        scored(run, analyzer, programs=changed(lambda m, b: plain(m, b) * float("inf")))


def test_functions_that_may_hide_something_are_named(recorded: Any) -> None:
    run, analyzer = recorded

    def fused(model: Any) -> Loop:
        return replace(run.loop("only", model), loss=lambda m, batch: Hidden.apply(m(batch[0]), batch[1]))

    assert any(
        "backward pass of their own (Hidden)" in c for c in scored(run, analyzer, programs={"only": fused}).caveats
    )
    assert not any("of their own" in caveat for caveat in scored(run, analyzer).caveats)


@pytest.mark.parametrize("settings", [{"check": 1}, {"check": -2}, {"spacing": 0}, {"at_once": 0}])
def test_settings_that_cannot_work_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigurationError, match="Unrolled got"):
        Unrolled(**settings)


def test_a_behavior_without_a_gradient_is_refused(recorded: Any) -> None:
    run, analyzer = recorded
    flat = Behavior("flat", [torch.ones(6).double()], lambda m, items: m(torch.stack(items)).detach()[:, 0])
    with pytest.raises(AnalysisError, match="no gradient"):
        analyzer.influence([flat], recipe="unrolled", programs=run.programs, controls=())
