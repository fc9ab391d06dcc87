"""Adapters' rows are each example's own gradient, and what no layer computes is named as not covered."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

peft = pytest.importorskip("peft")

from tests.analysis.adapted import TARGETS, adapted, adapters_of, llama, record, rows_of  # noqa: E402
from tests.conftest import PadCollator  # noqa: E402
from tests.support import support  # noqa: E402
from trainer_attrib.capture.recorder import Recorder  # noqa: E402
from trainer_attrib.errors import UnsupportedLayerError  # noqa: E402
from trainer_attrib.ledger.reader import Ledger, StageReader  # noqa: E402
from trainer_attrib.tap.names import adapter_weights, parameters_by_name  # noqa: E402
from trainer_attrib.tap.plan import SketchPlan, plan_sketch  # noqa: E402
from trainer_attrib.tap.projections import Projections  # noqa: E402
from trainer_attrib.testing.oracle import example_gradients, project_gradient, tap_of  # noqa: E402
from trainer_attrib.types import Layout, SketchConfig  # noqa: E402

SKETCH = SketchConfig(rank=4, dtype="float32", correction="none")


def other_active() -> Any:
    model = adapted(llama())
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.set_adapter("other")
    return model


def summed_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)


def agree_with_autograd(
    model: Any, initial: dict[str, torch.Tensor], stage: StageReader, close: Callable
) -> SketchPlan:
    """The rows of the first step against one backward pass per example."""
    for name, p in parameters_by_name(model).items():
        p.data.copy_(initial[name])
    model.train()
    plan = SketchPlan.from_dict(stage.meta["plan"])
    assert stage.meta["coverage"]["partial"] == stage.meta["coverage"]["silent"] == {}
    projections, rows = Projections(plan, model), {row["id"]: row for row in rows_of("one")}
    (block,) = stage.rows()
    assert block.table["step"].to_pylist() == [1] * 4
    for row, sketch in zip(block.table.to_pylist(), block.sketches, strict=True):
        batch = PadCollator()([rows[row["example"]]])
        gradients = example_gradients(model, lambda batch=batch: summed_losses(model, batch))[0]
        exact = project_gradient(plan, projections, gradients)
        close(torch.from_numpy(np.array(sketch)) * row["norm"], exact, relative=1e-4)
    return plan


METHODS: dict[str, tuple[Callable[[], Any], str]] = {
    "LoRA": (lambda: adapted(llama()), ""),
    "rsLoRA": (lambda: adapted(llama(), use_rslora=True, r=4), ""),
    "DoRA: both matrices": (lambda: adapted(llama(), use_dora=True), "lora_magnitude_vector"),
    "LoRA on linear layers beside LoRA on embeddings": (
        lambda: adapted(llama(), target_modules=["embed_tokens", "q_proj"]), "lora_embedding",
    ),
    "modules_to_save": (lambda: adapted(llama(), modules_to_save=["lm_head"]), ""),
    "several adapters, one active": (other_active, ""),
    "PiSSA": (lambda: adapted(llama(), init_lora_weights="pissa"), ""),
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "bare"), [pytest.param(*case, marks=support("PEFT", name), id=name) for name, case in METHODS.items()]
)
def test_rows_are_the_gradients_of_the_adapters(make: Callable, bare: str, tmp_path: Path, close: Callable) -> None:
    model = make()
    with torch.no_grad():  # a fresh B is zero, and so is the gradient of A
        for name, p in parameters_by_name(model).items():
            if ".lora_B." in name:
                p.normal_(std=0.1)
    initial = {name: p.detach().clone() for name, p in parameters_by_name(model).items()}
    trainable = {name for name, p in parameters_by_name(model).items() if p.requires_grad}
    record(model, tmp_path, "one", max_steps=1)
    stage = Ledger(tmp_path / "ledger").stage("one")
    plan = agree_with_autograd(model, initial, stage, close)
    assert {w.name for w in plan.weights} | set(plan.uncovered) == trainable
    assert all(bare in name for name in plan.uncovered)
    assert bool(plan.uncovered) == bool(bare)
    assert max(stage.steps()["audit_residual"].to_pylist()) < 1e-4


@support("PEFT", "DoRA: both matrices")
def test_doras_call_on_an_identity_is_no_batch(close: Callable) -> None:
    """It has as many rows as the layer has inputs: 24, and here as many as the batch has examples."""
    model = adapted(llama(), use_dora=True)
    for name, p in parameters_by_name(model).items():
        if ".lora_B." in name:
            p.data.normal_(std=0.1)
    projections = Projections(plan_sketch(model, SKETCH), model)
    batch = PadCollator()(rows_of("one") * 3)
    with tap_of(model, projections) as tap:
        record_of_all = tap.open(24, Layout.ROWS)
        summed_losses(model, batch).sum().backward()
    exact = [project_gradient(projections.plan, projections, g)
             for g in example_gradients(model, lambda: summed_losses(model, batch))]  # fmt: skip
    close(record_of_all.sketches, torch.stack(exact), relative=1e-4)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        pytest.param(lambda: adapted(llama(), use_dora=True), "DoraLinearLayer is not a known layer type",
                     marks=support("PEFT", "DoRA: magnitudes", refused=True)),
        pytest.param(lambda: adapted(llama(), target_modules=["embed_tokens", "q_proj"]), "no layer of its own",
                     marks=support("PEFT", "LoRA on embeddings", refused=True)),
    ],
    ids=["dora", "embedding"],
)  # fmt: skip
def test_bare_parameters_are_named_as_not_covered(make: Callable, why: str) -> None:
    uncovered = plan_sketch(make(), SKETCH).uncovered
    assert len(uncovered) == (4 if "Dora" in why else 2)
    assert all(why in reason for reason in uncovered.values())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("IA3Config", {"feedforward_modules": ["down_proj"]}, marks=support("PEFT", "IA3", refused=True)),
        pytest.param("LoHaConfig", {}, marks=support("PEFT", "LoHa", refused=True)),
    ],
)
def test_methods_of_bare_parameters_alone_are_refused(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayerError, match="no layer of its own"):
        record(adapted(llama(), kind=kind, **settings), tmp_path, "one")
    assert not (tmp_path / "ledger" / "stages").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "bits",
    [
        pytest.param(4, marks=support("PEFT", "LoRA on a 4-bit base (bitsandbytes, CPU)")),
        pytest.param(8, marks=support("PEFT", "LoRA on an 8-bit base (bitsandbytes, CPU)")),
    ],
)
def test_rows_over_a_quantised_base(bits: int, tmp_path: Path, close: Callable) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, f"is_loaded_in_{bits}bit", True)  # as transformers says it
            made = bnb.nn.Linear4bit(64, 64) if bits == 4 else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
            made.load_state_dict(torch.nn.Linear(64, 64).state_dict())
            self.layer = made.to("cpu")
            self.head = torch.nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(x).tanh())

    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["layer"], r=8, init_lora_weights=False))
    x, y = torch.randn(6, 5, 64), torch.randint(0, 3, (6, 5))

    def losses() -> torch.Tensor:
        return F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").sum(1)

    initial = copy.deepcopy({n: p.detach() for n, p in parameters_by_name(model).items() if p.requires_grad})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with Recorder(tmp_path, stage="one", model=model, optimizer=optimizer, sketch=SKETCH, strict=True) as recorder:
        with recorder.batch([str(i) for i in range(6)], denominator=1):
            losses().sum().backward()
        optimizer.step()
    for name, value in initial.items():
        parameters_by_name(model)[name].data.copy_(value)
    stage = Ledger(tmp_path).stage("one")
    plan = SketchPlan.from_dict(stage.meta["plan"])
    assert {w.name for w in plan.weights} == {"layer.lora_A.default.weight", "layer.lora_B.default.weight"}
    projections = Projections(plan, model)
    exact = torch.stack([project_gradient(plan, projections, g) for g in example_gradients(model, losses)])
    (block,) = stage.rows()
    norms = torch.tensor(block.table["norm"].to_pylist())[:, None]
    close(torch.from_numpy(np.array(block.sketches)) * norms, exact, relative=1e-4)
    assert max(stage.steps()["audit_residual"].to_pylist()) < 1e-3


@support("PEFT", "LoRA in TRL's SFTTrainer (peft_config)")
def test_sft_trainer_makes_the_adapter_itself(tmp_path: Path, close: Callable) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from trainer_attrib.integrations.huggingface import AttributionCallback

    rows = Dataset.from_list(rows_of("one"))
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", bf16=False, disable_tqdm=True, max_length=32, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    )  # fmt: skip
    callback = AttributionCallback(tmp_path / "ledger", stage="one", strict=True, sketch=SKETCH)
    config = peft.LoraConfig(target_modules=TARGETS, r=2, init_lora_weights=False)

    class Collator(PadCollator):
        def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return super().__call__([{"input_ids": item["input_ids"]} for item in items])

    trainer = trl.SFTTrainer(llama(), arguments, train_dataset=rows, data_collator=Collator(), callbacks=[callback],
                             peft_config=config, processing_class=_tokenizer())  # fmt: skip
    initial = {name: p.detach().clone() for name, p in parameters_by_name(trainer.model).items()}
    trainer.train()
    stage = Ledger(tmp_path / "ledger").stage("one")
    plan = agree_with_autograd(trainer.model, initial, stage, close)
    assert {w.name for w in plan.weights} == set(adapters_of("default")) == adapter_weights(trainer.model)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 29)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")), pad_token="<pad>", eos_token="<eos>"
    )


@support("PEFT", "LoRA in Lightning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*:UserWarning")
def test_an_adapted_model_in_lightning(tmp_path: Path, close: Callable) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    callback = importlib.import_module("trainer_attrib.integrations.lightning").AttributionCallback

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = adapted(llama(), init_lora_weights=False)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return summed_losses(self.net, batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

    class Collator(PadCollator):
        def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
            return {**super().__call__(items), "id": [item["id"] for item in items]}

    module = Lit()
    initial = {name: p.detach().clone() for name, p in parameters_by_name(module.net).items()}
    loader = torch.utils.data.DataLoader(rows_of("one")[:4], batch_size=4, collate_fn=Collator())
    pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
               enable_model_summary=False, default_root_dir=str(tmp_path),
               callbacks=[callback(tmp_path / "ledger", stage="one", sketch=SKETCH, strict=True)],
               ).fit(module, loader)  # fmt: skip
    stage = Ledger(tmp_path / "ledger").stage("one")
    plan = SketchPlan.from_dict(stage.meta["plan"])
    assert [w.name for w in plan.weights] == [f"net.{w.name}" for w in plan_sketch(module.net, SKETCH).weights]
    for name, p in parameters_by_name(module.net).items():
        p.data.copy_(initial[name])
    projections, (block,) = Projections(plan, module), list(stage.rows())
    for row, sketch in zip(block.table.to_pylist(), block.sketches, strict=True):
        batch = PadCollator()([r for r in rows_of("one") if r["id"] == row["example"]])
        gradients = example_gradients(module, lambda batch=batch: summed_losses(module.net, batch))[0]
        exact = project_gradient(plan, projections, gradients) * row["denominator"]
        close(torch.from_numpy(np.array(sketch)) * row["norm"], exact, relative=1e-4)
