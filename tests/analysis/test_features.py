"""The feature view finds what pairs prefer, only where they prefer it, and nothing where they prefer nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainer_attrib.analysis.forecasting.features import feature_view
from trainer_attrib.analysis.forecasting.run import TrainingRow
from trainer_attrib.errors import ConfigurationError

LETTERS = "ABCDEFGH"


class Letters:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(c) for c in text]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(LETTERS[t] for t in tokens)


class Bag(nn.Module):
    """Its hidden states are the tokens' own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(len(LETTERS)))

    def forward(self, input_ids: Any, output_hidden_states: bool = False) -> Any:
        return SimpleNamespace(hidden_states=(self.weight[input_ids],))


def pairs(prefers: Callable[[str], str], count: int = 300) -> list[TrainingRow]:
    """Prompts A or B; answers of letters C to G, in pairs of two kinds, the chosen one changed."""
    draw, rows = random.Random(0), []
    for number in range(count):
        kind = "AB"[number // 2 % 2]
        answers = ["".join(draw.choice("CDEF"[:2] if kind == "A" else "CDEF"[2:]) for _ in range(4)) for _ in range(2)]
        rows.append(TrainingRow(str(number), None, kind, answers[0] + prefers(kind), answers[1]))
    return rows


def test_a_preference_of_one_kind_of_pairs_is_found_there() -> None:
    found = feature_view(Bag(), pairs(lambda kind: "G" if kind == "B" else ""), Letters(), features=8, clusters=2)
    assert found.rows
    assert all(row.tokens.startswith("'G'") for row in found.rows), "nothing else leans"
    clusters = {row.cluster: row.lean for row in found.rows}
    assert clusters["all"] == pytest.approx(0.5)
    inside = max((lean for name, lean in clusters.items() if name != "all"), default=0.0)
    assert inside == pytest.approx(1.0)
    assert len(set(found.clusters)) == 2
    assert found.to_table().num_rows == len(found.rows)
    assert "'G'" in repr(found)
    assert found.blocks()
    assert found.to_dict()["rows"]


def test_no_preference_no_lean() -> None:
    assert feature_view(Bag(), pairs(lambda kind: ""), Letters(), features=8, clusters=3).rows == ()


def test_a_given_autoencoder() -> None:
    def encoder(states_TD: torch.Tensor) -> torch.Tensor:
        return torch.stack([states_TD[:, LETTERS.index("G")], states_TD[:, LETTERS.index("C")]], 1)

    found = feature_view(Bag(), pairs(lambda kind: "G"), Letters(), encoder=encoder)
    assert {row.feature for row in found.rows if row.cluster == "all"} == {0}


def test_what_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="pairs"):
        feature_view(Bag(), [TrainingRow("0", None, "", "C")] * 40, Letters())
    with pytest.raises(ConfigurationError, match="no hidden states"):
        feature_view(Mute(), pairs(lambda kind: "G"), Letters())


class Mute(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, input_ids: Any, output_hidden_states: bool = False) -> Any:
        return SimpleNamespace(hidden_states=None)
