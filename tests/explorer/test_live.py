"""Questions from a page that need the model: what is refused, what is kept, and that it is what Python would answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.analysis.test_forecasting import PlainRun, adamw, curved, examples, first_output, second_output
from tests.explorer.ledgers import recorded
from trainer_attrib import Analyzer, Behavior, Recorder, SketchConfig
from trainer_attrib.analysis.forecasting.forecast import forecast
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.explorer.catalog import Catalog
from trainer_attrib.explorer.live import ForecastDesk, InfluenceDesk
from trainer_attrib.ledger.kept import key_of


class Letters:
    """A tokenizer of letters."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - ord("A") + 2 for c in text]}


@pytest.fixture
def language(tmp_path: Path, tiny_gpt2: Callable[..., Any], token_rows: Callable[..., Any]) -> tuple[Catalog, Any]:
    """A ledger of one stage of a tiny language model."""
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Recorder(tmp_path, stage="one", model=model, optimizer=optimizer, sketch=SketchConfig(rank=4)) as recorder:
        for number, row in enumerate(token_rows(8)):
            tokens = torch.tensor([row["input_ids"]])
            optimizer.zero_grad()
            with recorder.batch([f"row-{number}"], texts=[str(row["input_ids"])]):
                model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    model.eval()
    return Catalog(tmp_path), model


def test_influence_is_the_analyzers(language: tuple[Catalog, Any]) -> None:
    catalog, model = language
    analyzer = Analyzer(catalog.ledger.storage.url, model)
    desk = InfluenceDesk(catalog, analyzer, Letters())
    work = desk.work({"prompt": "ABC", "completion": "D", "alternative": "E", "recipe": "grad_cos"})
    key = work.run()
    assert key == key_of(work.asked)
    [part] = catalog.answers.read(key)["parts"]
    behavior = Behavior.contrast("prefers", ["ABC"], ["D"], ["E"], Letters())
    found = analyzer.influence([behavior], recipe="grad_cos")
    assert [row["score"] for row in part["queries"][0]["top"]] == pytest.approx(found.top(8)["score"].to_pylist())
    assert catalog.answers.read(key)["title"] == "ABCD rather thanE"
    again = desk.work({"prompt": "ABC", "completion": "D", "alternative": "E", "recipe": "grad_cos"})
    assert key_of(again.asked) == key  # the page need not run it
    assert key_of(desk.work({"prompt": "ABC", "completion": "D"}).asked) != key


@pytest.mark.parametrize(
    ("fields", "what"),
    [({"prompt": "A"}, "no completion"), ({"completion": "A", "recipe": "unrolled"}, "choose among"),
     ({"completion": "A", "stage": "two"}, "choose among"), ({"completion": "A" * 20_001}, "20,001 characters")],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_before_it_runs(
    language: tuple[Catalog, Any], fields: dict[str, str], what: str
) -> None:
    catalog, model = language
    desk = InfluenceDesk(catalog, Analyzer(catalog.ledger.storage.url, model), Letters())
    with pytest.raises(ConfigurationError, match=what):
        desk.work(fields)


@pytest.mark.usefixtures("float64")
def test_a_run_that_has_not_begun_is_reshaped_and_forecast_again(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    ledger, _ = recorded(tmp_path)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(2)
    outlook = forecast(PlainRun(nn.Linear(4, 2), curved, examples(), adamw), [first_output(), second_output()])
    catalog = Catalog(ledger)
    desk = ForecastDesk(catalog, outlook)
    name = first_output().name
    assert desk.told()["behaviors"] == [name, second_output().name]
    below = outlook.of(name).predicted - 0.01
    key = desk.work({"behavior": name, "below": f"{below:.6f}"}).run()
    kept = catalog.answers.read(key)
    assert kept["title"] == f"{name} kept below {below:.6g} (reweight)"
    assert kept["parts"][0]["kind"] == "blocks"
    for fields, what in (({"behavior": "other"}, "choose among"), ({"behavior": name, "below": "low"}, "no number")):
        with pytest.raises(ConfigurationError, match=what):
            desk.work(fields)
