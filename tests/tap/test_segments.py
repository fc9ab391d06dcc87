"""Documents of one row: found by their positions, sketched as if each were alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_attrib.errors import CaptureError
from trainer_attrib.tap.layers import capture_norms
from trainer_attrib.tap.plan import plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.tap.segments import Segments
from trainer_attrib.testing.oracle import tap_of
from trainer_attrib.types import Layout, SketchConfig


def _positions(*lengths: int, padding: int = 0) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths] + [torch.zeros(padding, dtype=torch.long)])[None]


def test_a_document_begins_where_positions_do_not_go_on() -> None:
    found = Segments.of(_positions(3, 2, 5))
    assert (found.starts, found.lengths, found.tokens) == ((0, 3, 5), (3, 2, 5), 10)


def test_rows_of_a_batch_begin_documents_whatever_their_positions() -> None:
    found = Segments.of(torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 1, 2]]))
    assert list(zip(found.starts, found.lengths, strict=True)) == [(0, 3), (3, 2), (5, 2), (7, 3)]


def test_padding_and_single_tokens_are_no_documents() -> None:
    """They have no target; a data set's own one-token document is kept where its place is needed."""
    assert Segments.of(_positions(3, 1, 4, padding=3)).lengths == (3, 4)
    assert Segments.of(_positions(3, 1, 4, padding=3), expected=3).lengths == (3, 1, 4)
    assert Segments.of(_positions(3, 1, 4), expected=2).lengths == (3, 4)
    assert len(Segments.of(_positions(padding=5))) == 0


def test_positions_of_several_axes_are_refused() -> None:
    with pytest.raises(CaptureError, match="do not tell the documents"):
        Segments.of(torch.zeros(3, 1, 5, dtype=torch.long))


@given(st.lists(st.integers(2, 90), min_size=1, max_size=7), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_sketches_are_sums_over_each_documents_tokens(lengths: list[int], padding: int) -> None:
    segments = Segments.of(_positions(*lengths, padding=padding))
    left, right = torch.randn(2, segments.tokens, 3, dtype=torch.float64)
    found, start = segments.sketch(left, right), 0
    assert len(found) == len(lengths)
    for document, length in enumerate(lengths):
        tokens = slice(start, start + length)
        torch.testing.assert_close(found[document], left[tokens].T @ right[tokens])
        start += length


def test_values_are_cut_into_documents() -> None:
    padded, mask = Segments.of(_positions(3, 2)).padded(torch.tensor([[5, 6, 7, 8, 9]]))
    assert padded.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize("flat", [False, True], ids=["[1, T, D]", "[T, D]"])
def test_layers_may_see_the_row_with_or_without_its_axis(flat: bool, float64: None, close: Callable) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    projections = Projections(plan_sketch(model, SketchConfig(rank=3)), model)
    segments, x = Segments.of(_positions(4, 7)), torch.randn(1, 11, 5)

    def sketches(inputs: torch.Tensor, layout: Layout, segments: Segments | None) -> torch.Tensor:
        with tap_of(model, projections) as tap:
            record = tap.open(len(inputs) if segments is None else 1, layout, segments)
            model(inputs).square().sum().backward()
        return record.sketches

    found = sketches(x[0] if flat else x, Layout.SEGMENTS, segments)
    close(found, torch.cat([sketches(part, Layout.ROWS, None) for part in x.split([4, 7], dim=1)]))


def test_layers_that_mix_tokens_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_attrib.tap.layers._RULES", dict(__import__("trainer_attrib").tap.layers._RULES))
    capture_norms()
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.LayerNorm(6), torch.nn.Conv1d(11, 11, 1))
    projections = Projections(plan_sketch(model, SketchConfig(rank=3)), model)
    with tap_of(model, projections) as tap:
        record = tap.open(1, Layout.SEGMENTS, Segments.of(_positions(4, 7)))
        model(torch.randn(1, 11, 5)).square().sum().backward()
    assert set(record.backwards) == {"0"}
    assert set(record.skipped) == {"1", "2"}
    assert "does not act token by token" in record.skipped["1"]
