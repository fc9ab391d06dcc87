"""What an answer weighs, and how many of them ranks collect before they wait for each other."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from trainer_attrib.analysis.retrieval.groups import StageSums
from trainer_attrib.analysis.retrieval.part_scores import TopK
from trainer_attrib.errors import BehaviorError
from trainer_attrib.execution.outcome import Outcome
from trainer_attrib.execution.size import held_bytes
from trainer_attrib.execution.torchrun import _HELD, _LONG, _SHORT, _next_round
from trainer_attrib.numerics.row_curvature import SecondMoments


@pytest.mark.parametrize(
    ("answer", "size"),
    [
        (None, 8),
        (1.5, 8),
        ("text", 4),
        (np.zeros((3, 5), np.float32), 60),
        (np.float64(1), 8),
        (torch.zeros(7, dtype=torch.float16), 14),
        (pa.array([1, 2, 3], pa.int64()), 24),
        ({"a": [torch.zeros(2), 3]}, 17),
    ],
)
def test_an_answer_weighs_what_is_in_it(answer, size):
    assert held_bytes(answer) == size


def test_what_is_not_known_may_be_of_any_size():
    assert held_bytes((1, lambda: None)) == math.inf
    assert held_bytes(object()) == math.inf


def test_answers_of_scans_are_known_and_those_of_curvature_not_taken_for_small():
    sums = StageSums("one")
    sums.add([None], np.zeros(2, int), np.array([1, 1]), np.ones((3, 2)))
    numbers = (np.zeros(2), np.zeros((2, 3, 4), np.float32), np.zeros((2, 3, 4)), np.zeros((3, 0)), np.zeros(0))
    best = TopK(pa.array(["a", "b"]), *numbers, sums)
    assert 16 + 96 + 192 < held_bytes(best) < 1000
    assert held_bytes(SecondMoments([slice(0, 100)])) >= 100 * 100 * 4


@pytest.mark.parametrize(
    ("answer", "each"),
    [
        (0, _LONG),
        ((), _LONG),
        (np.zeros(_HELD // 2 // 10, np.int8), 10),
        (np.zeros(_HELD, np.int8), _SHORT),
        (object(), _SHORT),
    ],
)
def test_rounds_are_long_where_answers_are_small(answer, each):
    assert _next_round([[Outcome(answer=0), Outcome(answer=answer)], [Outcome(answer=None)]]) == each


def test_a_fault_weighs_nothing():
    assert _next_round([[Outcome(fault=BehaviorError("no queries"))], []]) == _LONG
