"""What a trainer's rows stand for is known, or said to be unknown; never guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")

import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch import nn  # noqa: E402

from tests.support import support  # noqa: E402
from trainer_attrib.capture.loss_facts import couplings  # noqa: E402
from trainer_attrib.capture.recorder import Recorder  # noqa: E402
from trainer_attrib.errors import CaptureError, ConfigurationError  # noqa: E402
from trainer_attrib.ledger.reader import Ledger  # noqa: E402
from trainer_attrib.types import Layout, LossForm, SketchConfig  # noqa: E402
from trainer_attrib_integrations.loss_forms import loss_form  # noqa: E402


def _bare(kind: type, **settings: Any) -> Any:
    """A trainer without its constructor, as far as its form is read."""
    trainer = kind.__new__(kind)
    trainer.__dict__ |= settings
    return trainer


@support("TRL", "trainers that are not known: one row per forward row, with a warning")
def test_an_unknown_trainer_of_trl_gets_plain_rows_and_a_warning() -> None:
    unknown = type("OnlineDPOTrainer", (transformers.Trainer,), {"__module__": "trl.experimental.online_dpo"})
    form = loss_form(_bare(unknown))
    assert (form.layout, form.weighted) == (Layout.ROWS, True)
    assert "WARNING: OnlineDPOTrainer is not known here" in form.remarks[0]


def test_every_stable_trainer_of_trl_is_known() -> None:
    stable = [name for name in dir(trl) if name.endswith("Trainer")]
    assert len(stable) >= 7
    for name in stable:
        args = SimpleNamespace(packing=False, packing_strategy="bfd")
        settings = {"args": args, "padding_free": False, "loss_types": ["sigmoid"], "calculate_KL": True}
        form = loss_form(_bare(getattr(trl, name), **settings))
        assert not form.remarks, name
        assert (form.layout is Layout.PAIRS) is (name in ("DPOTrainer", "RewardTrainer")), name


def test_a_loss_of_ones_own_is_pointed_out() -> None:
    own = type("Mine", (trl.DPOTrainer,), {"__module__": "my_script", "compute_loss": lambda self: None})
    form = loss_form(_bare(own, loss_types=["sigmoid"]))
    assert form.layout is Layout.PAIRS
    assert "Mine has a compute_loss of its own; rows are made of examples as in DPOTrainer" in form.remarks[0]
    assert not loss_form(_bare(type("Same", (trl.DPOTrainer,), {"__module__": "x"}), loss_types=["sigmoid"])).remarks


def test_a_trainer_of_transformers_has_plain_rows() -> None:
    assert loss_form(_bare(transformers.Trainer)) == LossForm()


class Doubled(transformers.Trainer):
    """Sees each example twice in one forward pass, side by side."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Interleaved, so that rows i and i + n/2 have nothing to do with each other."""
        tokens = inputs["input_ids"].repeat_interleave(2, 0)
        return model(input_ids=tokens).logits.logsumexp(-1).mean()


@support("Data", "forward passes with other rows than the data set: named by content, with a warning")
def test_a_forward_pass_of_other_rows_is_not_taken_for_pairs(
    tiny_llama: Callable, settings: Callable, trained: Callable, caplog: Any
) -> None:
    rows = Dataset.from_list([{"id": f"row-{i}", "input_ids": [3, 4, 5 + i], "labels": [3, 4, 5]} for i in range(4)])
    model = tiny_llama()
    arguments = transformers.TrainingArguments(**settings(remove_unused_columns=True))
    run = trained(
        lambda callbacks: Doubled(
            model, arguments, train_dataset=rows, callbacks=callbacks,
            data_collator=transformers.default_data_collator,
        )
    )  # fmt: skip
    assert "names 2 rows per batch and the forward pass has 4 examples" in caplog.text
    assert caplog.text.count("names 2 rows") == 1
    assert len(run.table) == 8
    assert len({row["example"] for row in run.table}) == 4, "an example's two rows have its content"
    assert run.residual < 1e-5


def _record(place: Path, model: nn.Module, loss: LossForm, x: torch.Tensor, ids: list[str] | None = None) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sketch = SketchConfig(rank=4)
    recorder = Recorder(place, stage="one", model=model, optimizer=optimizer, sketch=sketch, strict=True, loss=loss)
    with recorder:
        with recorder.batch(ids):
            model(x).square().sum().backward()
        optimizer.step()
    return Ledger(place).stage("one")


def test_rows_that_do_not_make_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="5 rows does not divide into pairs"):
        _record(tmp_path, nn.Sequential(nn.Linear(3, 2)), LossForm(layout=Layout.PAIRS), torch.randn(5, 3))


def test_ids_of_a_loop_must_fit_and_the_error_says_how(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="2 ids were given for 4 examples"):
        _record(tmp_path, nn.Sequential(nn.Linear(3, 2)), LossForm(), torch.randn(4, 3), ["a", "b"])


def test_a_loop_may_say_that_its_rows_are_pairs(tmp_path: Path) -> None:
    stage = _record(
        tmp_path,
        nn.Sequential(nn.Linear(3, 2)),
        LossForm(layout=Layout.PAIRS, unit="pair"),
        torch.randn(4, 3),
        ["a", "b"],
    )
    (block,) = stage.rows()
    assert block.table["example"].to_pylist() == ["a", "b"]
    assert (stage.meta["layout"], stage.meta["unit"]) == ("pairs", "pair")


@support("Layers", "BatchNorm in train mode: reported as coupling the examples of a batch")
def test_batch_statistics_couple_examples(tmp_path: Path, caplog: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).train()
    stage = _record(tmp_path, model, LossForm(), torch.randn(6, 3))
    assert stage.meta["coupled_loss"] == ["1 BatchNorm layers normalize by the batch's statistics"]
    assert "coupled loss: 1 BatchNorm layers" in caplog.text
    model[1].eval()
    assert couplings(model) == [], "frozen statistics are constants"


@support("Layers", "load-balancing losses of MoE routers: reported as coupling the examples of a batch")
def test_a_load_balancing_loss_couples_examples() -> None:
    sizes = {"vocab_size": 28, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    config = transformers.MixtralConfig(**sizes, **heads, output_router_logits=True, router_aux_loss_coef=0.02)
    model = transformers.MixtralForCausalLM(config)
    assert "load-balancing loss of the routers (weight 0.02)" in couplings(model)[0]
    config.output_router_logits = False
    assert couplings(model) == []
