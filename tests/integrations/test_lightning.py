"""The Lightning callback: bit-identical training, the plain loop's rows, nothing left behind, both import names."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.support import support
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.errors import ConfigurationError, LedgerNotWritableError, StageExistsError
from trainer_attrib.integrations.lightning import AttributionCallback
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.types import SketchConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*:UserWarning", "ignore:.*Starting from v1.9.0.*:UserWarning"
)
SKETCH = SketchConfig(rank=4, dtype="float32", correction="none")
ROWS, BATCH = 12, 4
PACKAGES = ("lightning.pytorch", "pytorch_lightning")
both_packages = pytest.mark.parametrize(
    "package", [pytest.param(name, marks=support("Training loops", f"Lightning, as `{name}`")) for name in PACKAGES]
)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.dropout, self.head = nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(torch.tanh(self.body(x))))


def modules(package: str = "lightning.pytorch") -> Any:
    """A LightningModule of one of the packages."""
    base = importlib.import_module(package).LightningModule

    class Lit(base):
        calls_itself = False

        def __init__(self, manual: int = 0, breaks: BaseException | None = None) -> None:
            super().__init__()
            self.net, self.breaks, self.steps_per_batch = Classifier(), breaks, manual
            self.automatic_optimization = not manual

        def loss(self, batch: Any) -> torch.Tensor:
            x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
            return nn.functional.cross_entropy((self if self.calls_itself else self.net)(x), y)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            if self.breaks is not None and self.global_step == 2:
                raise self.breaks
            if self.automatic_optimization:
                loss = self.loss(batch)
                self.log("loss", loss, batch_size=BATCH)
                return loss
            optimizer = self.optimizers()
            for _ in range(self.steps_per_batch):
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                optimizer.step()
            self.log("loss", loss, batch_size=BATCH)
            return None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch), batch_size=BATCH)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Lit


def losses(package: str = "lightning.pytorch") -> Any:
    """A callback that keeps every logged loss."""

    class Losses(importlib.import_module(package).Callback):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.seen.append(trainer.callback_metrics["loss"].clone())

    return Losses()


def data(kind: str = "strings") -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    items: list[Any] = []
    for i in range(ROWS):
        x, y = torch.randn(6, generator=generator), i % 3
        name = {"strings": f"row-{i}", "ints": 100 + i, "tensors": torch.tensor(100 + i)}.get(kind)
        item = {"y": y, "id": name, "source": f"s{i % 2}", "x": x}
        items.append((x, y) if kind == "tuples" else {k: v for k, v in item.items() if v is not None})
    return DataLoader(items, batch_size=BATCH)


def trainer_of(package: str, tmp_path: Path, callbacks: list[Any], **settings: Any) -> Any:
    defaults = {
        "max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "default_root_dir": str(tmp_path), "log_every_n_steps": 1,
    }  # fmt: skip
    return importlib.import_module(package).Trainer(callbacks=callbacks, **{**defaults, **settings})


def fit(
    tmp_path: Path,
    callbacks: list[Any],
    *,
    package: str = "lightning.pytorch",
    loader: DataLoader | None = None,
    manual: int = 0,
    dropout: float = 0.2,
    calls_itself: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Everything that recording must not change, and the trainer."""
    torch.manual_seed(3)
    module, seen = modules(package)(manual=manual), losses(package)
    module.net.dropout.p, module.calls_itself = dropout, calls_itself
    trainer = trainer_of(package, tmp_path, [*callbacks, seen], **settings)
    trainer.fit(module, loader or data(), data())
    return {
        "trainer": trainer,
        "module": module,
        "losses": torch.stack(seen.seen),
        "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
        "random": torch.get_rng_state(),
    }


def callback(tmp_path: Path, **options: Any) -> AttributionCallback:
    return AttributionCallback(tmp_path / "ledger", stage="one", **{"sketch": SKETCH, "strict": True, **options})


def stage_of(tmp_path: Path, name: str = "one") -> StageReader:
    return Ledger(tmp_path / "ledger").stage(name)


def rows_of(stage: StageReader) -> tuple[list[dict[str, Any]], np.ndarray]:
    blocks = list(stage.rows())
    return [row for b in blocks for row in b.table.to_pylist()], np.concatenate([b.sketches for b in blocks])


def assert_nothing_left(trainer: Any, module: Any) -> None:
    hooks = [h for m in module.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values(),
             *m._backward_hooks.values())]  # fmt: skip
    for optimizer in trainer.optimizers:
        hooks += [*optimizer._optimizer_step_post_hooks.values(), *optimizer._optimizer_step_pre_hooks.values()]
    assert hooks == []


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "accumulation-clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "manual": {"manual": 1},
    "two-steps-per-batch": {"manual": 2},
    "bf16-mixed": {"precision": "bf16-mixed"},
}
PROVES = {
    "automatic": support("Training loops", "Lightning, automatic optimization"),
    "accumulation-clip": support("Training loops", "Lightning, accumulate_grad_batches and gradient_clip_val"),
    "manual": support("Training loops", "Lightning, manual optimization"),
    "two-steps-per-batch": support("Training loops", "Lightning, manual optimization"),
    "bf16-mixed": support("Precision and compilation", "Lightning, precision='bf16-mixed'"),
}


@both_packages
@pytest.mark.parametrize("name", [pytest.param(name, marks=PROVES[name]) for name in CONFIGURATIONS])
def test_training_is_bit_identical_and_audited(name: str, package: str, tmp_path: Path) -> None:
    settings = CONFIGURATIONS[name]
    plain = fit(tmp_path, [], package=package, **settings)
    recorded = fit(tmp_path, [callback(tmp_path)], package=package, **settings)
    assert torch.equal(plain["losses"], recorded["losses"])
    assert len(plain["losses"]) == 6
    assert all(torch.equal(p, recorded["weights"][key]) for key, p in plain["weights"].items())
    assert torch.equal(plain["random"], recorded["random"])
    assert_nothing_left(recorded["trainer"], recorded["module"])
    stage = stage_of(tmp_path)
    steps = stage.steps().to_pylist()
    assert stage.meta["status"] == "complete"
    assert (
        len(steps)
        == recorded["trainer"].global_step
        == (4 if "accumulation" in name else 6 * settings.get("manual", 1))
    )
    assert stage.count("rows") == ROWS * 2 * settings.get("manual", 1)
    limit = 1e-2 if name == "bf16-mixed" else 1e-5
    assert max(row["audit_residual"] for row in steps) < limit
    clip = settings.get("gradient_clip_val")
    for row in steps:
        assert row["clip_threshold"] == clip
        assert (row["audit_scale"] < 0.2) if clip else abs(row["audit_scale"] - 1) < limit
    assert all(row["complete"] for row in rows_of(stage)[0])


def test_the_audit_scale_is_the_clip_coefficient(tmp_path: Path) -> None:
    """Lightning clips after ``on_before_optimizer_step``, where this callback reads the norm before."""
    norms: list[float] = []

    class Norms(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()])))

    fit(tmp_path, [callback(tmp_path), Norms()], accumulate_grad_batches=2, gradient_clip_val=0.05)
    scales = stage_of(tmp_path).steps()["audit_scale"].to_pylist()
    assert scales == pytest.approx([0.05 / (norm + 1e-6) for norm in norms], rel=1e-4)


@pytest.mark.parametrize(("calls_model", "calls_itself"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("kind", ["strings", "tuples"])
def test_rows_are_those_of_the_plain_loop(kind: str, calls_model: bool, calls_itself: bool, tmp_path: Path) -> None:
    """Same ids, norms, directions and losses, whether the loop calls the model or says what the batch is."""
    fit(
        tmp_path,
        [callback(tmp_path)],
        accumulate_grad_batches=3,
        loader=data(kind),
        dropout=0.0,
        calls_itself=calls_itself,
    )
    torch.manual_seed(3)
    module = modules()()
    module.net.dropout.p = 0.0
    called = module if calls_model else module.net
    optimizer = module.configure_optimizers()
    with Recorder(tmp_path / "loop", stage="one", model=module, optimizer=optimizer, sketch=SKETCH) as recorder:
        for _ in range(2):
            for batch in data(kind):
                x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
                ids = batch["id"] if isinstance(batch, dict) else None
                with recorder.batch(ids, content=None if calls_model else batch):
                    loss = nn.functional.cross_entropy(called(x), y) / 3
                    loss.backward()
                recorder.note_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    stage, expected = stage_of(tmp_path), Ledger(tmp_path / "loop").stage("one")
    rows, sketches = rows_of(stage)
    expected_rows, expected_sketches = rows_of(expected)
    assert len(rows) == 2 * ROWS
    assert len({row["example"] for row in rows}) == ROWS
    if kind == "strings":
        assert [row["example"] for row in rows] == 2 * [f"row-{i}" for i in range(ROWS)]
    np.testing.assert_allclose(sketches, expected_sketches, rtol=0, atol=1e-6)
    for found, row in zip(rows, expected_rows, strict=True):
        assert found["norm"] == pytest.approx(row["norm"], rel=1e-6)
        assert {**found, "norm": 0, "epoch": 0} == {**row, "norm": 0, "epoch": 0}
        assert found["denominator"] == BATCH * 3
    assert stage.steps()["loss"].to_pylist() == pytest.approx(expected.steps()["loss"].to_pylist(), rel=1e-6)


@support("Training loops", "Lightning, automatic optimization")
def test_a_language_model_has_the_rows_of_the_hugging_face_trainer(
    tmp_path: Path, tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable
) -> None:
    """The usual wrapper, ``self.model(**batch).loss``: same content hashes, measured denominators, norms and rows."""
    transformers, collate = pytest.importorskip("transformers"), pad_collator()
    from trainer_attrib.integrations.huggingface import AttributionCallback as HuggingFaceCallback

    class Wrapper(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_gpt2().train()

        def forward(self, **inputs: Any) -> Any:  # only transformers calls it
            return self.model(**inputs)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(**batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    loader = DataLoader(token_rows(ROWS), batch_size=BATCH, collate_fn=collate)
    trainer_of("lightning.pytorch", tmp_path, [callback(tmp_path)], max_epochs=1).fit(Wrapper(), loader)
    model = Wrapper()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=BATCH, num_train_epochs=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, max_grad_norm=0.0, train_sampling_strategy="sequential",
        remove_unused_columns=False, lr_scheduler_type="constant",
    )  # fmt: skip
    recording = HuggingFaceCallback(tmp_path / "hf", stage="one", sketch=SKETCH, strict=True)
    transformers.Trainer(
        model, arguments, train_dataset=token_rows(ROWS), data_collator=collate, callbacks=[recording],
        optimizers=(model.configure_optimizers(), None),
    ).train()  # fmt: skip
    rows, sketches = rows_of(stage_of(tmp_path))
    expected, expected_sketches = rows_of(Ledger(tmp_path / "hf").stage("one"))
    np.testing.assert_allclose(sketches, expected_sketches, rtol=0, atol=1e-6)
    assert {row["denominator_source"] for row in rows} == {"measured"}
    for found, row in zip(rows, expected, strict=True):
        assert found["norm"] == pytest.approx(row["norm"], rel=1e-5)
        assert found["denominator"] == pytest.approx(row["denominator"], rel=1e-5)
        assert {k: found[k] for k in ("example", "step", "tokens")} == {
            k: row[k] for k in ("example", "step", "tokens")
        }


@pytest.mark.parametrize("kind", ["strings", "ints", "tensors", "none", "tuples"])
def test_ids_and_sources(kind: str, tmp_path: Path) -> None:
    fit(tmp_path, [callback(tmp_path)], loader=data(kind))
    rows, _ = rows_of(stage_of(tmp_path))
    found = [row["example"] for row in rows]
    assert found[:ROWS] == found[ROWS:]
    named = {"strings": [f"row-{i}" for i in range(ROWS)]}.get(kind, [str(100 + i) for i in range(ROWS)])
    if kind in ("none", "tuples"):
        assert len(set(found)) == ROWS
        assert all(len(name) == 16 for name in found)
    else:
        assert found[:ROWS] == named
    sources = stage_of(tmp_path).examples()["source"].to_pylist()
    assert sources == ([None] * ROWS if kind == "tuples" else [f"s{i % 2}" for i in range(ROWS)])
    assert [row["epoch"] for row in rows[::BATCH]] == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])


def test_ids_that_do_not_fit_end_capture_and_say_so(tmp_path: Path, caplog: Any) -> None:
    loader = data()
    original = loader.collate_fn
    loader.collate_fn = lambda items: {**original(items), "id": ["only one"]}
    fit(tmp_path, [callback(tmp_path, strict=False)], loader=loader)
    assert "1 ids were given for 4 examples" in caplog.text
    assert stage_of(tmp_path).meta["status"] == "incomplete"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda error: error.__name__)
@both_packages
def test_a_run_that_breaks_off_leaves_nothing_behind(
    package: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *args: None)  # Lightning ignores Ctrl+C for the rest of the process
    module = modules(package)(breaks=error("stopped"))
    trainer = trainer_of(package, tmp_path, [callback(tmp_path)])
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(module, data(), data())
    assert_nothing_left(trainer, module)
    stage = stage_of(tmp_path)
    assert (stage.meta["status"], stage.meta["reason"]) == ("incomplete", f"{error.__name__}: stopped")
    assert stage.steps().num_rows == 2
    assert stage.count("rows") == 2 * BATCH
    assert stage.problems() == []


@pytest.mark.parametrize("where", ["tap.record.sketch_examples", "capture.window.unit_rows",
                                   "capture.batch.hash_rows"])  # fmt: skip
def test_capture_faults_never_end_training(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    plain = fit(tmp_path, [])

    def injected(*args: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(f"trainer_attrib.{where}", injected)
    recorded = fit(tmp_path, [callback(tmp_path, strict=False)])
    assert torch.equal(plain["losses"], recorded["losses"])
    assert all(torch.equal(p, recorded["weights"][key]) for key, p in plain["weights"].items())
    assert_nothing_left(recorded["trainer"], recorded["module"])
    assert caplog.text.count("capture stopped at step") == 1
    assert "injected" in stage_of(tmp_path).meta["reason"]


@pytest.mark.parametrize("every", [2, 3])
def test_only_every_nth_step_is_captured(every: int, tmp_path: Path) -> None:
    """Also where a batch takes several steps: each row belongs to the step that it was trained in."""
    sketch = SketchConfig(rank=4, dtype="float32", correction="none", every_n_steps=every)
    fit(tmp_path, [callback(tmp_path, sketch=sketch)], manual=2)
    rows, _ = rows_of(stage_of(tmp_path))
    assert [row["step"] for row in rows[::BATCH]] == list(range(1, 13, every))


def test_a_second_fit_is_a_stage_of_its_own(tmp_path: Path) -> None:
    done = fit(tmp_path, [callback(tmp_path)], max_epochs=1)
    trainer = done["trainer"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(done["module"], data(), data())
    assert {s.name: s.parent for s in Ledger(tmp_path / "ledger").stages()} == {"one": None, "one.2": "one"}
    assert [s["step"] for s in stage_of(tmp_path, "one.2").meta["snapshots"]] == [0, 1, 2, 3]
    assert_nothing_left(trainer, done["module"])


def test_a_fast_dev_run_is_not_recorded(tmp_path: Path) -> None:
    fit(tmp_path, [callback(tmp_path)], fast_dev_run=True)
    fit(tmp_path, [callback(tmp_path)])
    assert [stage.name for stage in Ledger(tmp_path / "ledger").stages()] == ["one"]


def test_training_without_an_optimizer_is_refused(tmp_path: Path, files_of: Callable) -> None:
    trainer = SimpleNamespace(optimizers=[], world_size=1, fast_dev_run=0)
    with pytest.raises(ConfigurationError, match="no optimizer"):
        callback(tmp_path).on_train_start(trainer, modules()())
    assert files_of(tmp_path / "ledger") == {}


def test_a_bad_place_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(LedgerNotWritableError):
        AttributionCallback(tmp_path / "file", stage="one")
    fit(tmp_path, [callback(tmp_path)], max_epochs=1)
    with pytest.raises(StageExistsError):
        callback(tmp_path)
    with pytest.raises(ConfigurationError):
        AttributionCallback(tmp_path / "ledger", stage="../one")


@pytest.mark.parametrize("missing", [["lightning"], ["pytorch_lightning"], ["lightning", "pytorch_lightning"]])
def test_each_package_is_enough_and_without_both_the_error_says_what_to_install(missing: list[str]) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "from trainer_attrib.integrations.lightning import AttributionCallback as A; print(A.__base__.__module__)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    if len(missing) == 2:
        assert found.returncode != 0
        assert "MissingExtraError: 'lightning' is not installed." in found.stderr
        assert "pip install 'trainer-attrib[lightning]'" in found.stderr
    else:
        assert found.stdout.startswith({"lightning": "pytorch_lightning", "pytorch_lightning": "lightning"}[missing[0]])


def test_the_example_finds_the_wrong_labels(tmp_path: Path, capsys: Any) -> None:
    example = Path(__file__).parents[2] / "examples" / "lightning_classifier.py"
    runpy.run_path(str(example))["main"](str(tmp_path / "ledger"))
    found = capsys.readouterr().out.splitlines()[-1]
    assert int(found.split()[0]) >= 8  # of 10; 30 of all 600 are wrong
