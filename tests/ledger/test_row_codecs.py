"""What a row keeps of itself on disk, and that ledgers of every row format are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_attrib import Ledger, SketchConfig
from trainer_attrib.analysis.passes import PassFiles
from trainer_attrib.errors import CorruptPartError, LedgerFormatError
from trainer_attrib.ledger.row_codecs import SUFFIXES, row_codec, width_of
from trainer_attrib.ledger.schema import FORMAT, NEWEST, part_name
from trainer_attrib.ledger.stored_rows import StoredRows
from trainer_attrib.testing.zoo import LinearOnThreeAxes
from trainer_attrib.types import ROW_DTYPES

BLOCKS = [[2, 4, 3], [1, 1, 5], [3, 2, 2]]
sizes = st.floats(-6, 0)


def unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def of_rank(rank: int, blocks: list[list[int]], seed: int, size: float, rows: int = 5) -> np.ndarray:
    """Unit rows whose matrices have at most this rank and differ in size by powers of ten, and one row of zeros."""
    draw, parts = np.random.default_rng(seed), []
    for count, left, right in blocks:
        products = draw.normal(size=(rows, count, left, rank)) @ draw.normal(size=(rows, count, rank, right))
        parts.append((products * 10 ** (size * draw.random((rows, count, 1, 1)))).reshape(rows, -1))
    found = unit(np.concatenate(parts, axis=1))
    found[-1] = 0
    return found


def stored(dtype: str, rows: np.ndarray, blocks: list[list[int]] = BLOCKS) -> np.ndarray:
    """The rows after their way through bytes."""
    codec = row_codec(dtype, blocks)
    data = codec.encode(rows).tobytes()
    assert len(data) == len(rows) * codec.record.itemsize
    return np.asarray(codec.decode(np.frombuffer(bytearray(data), codec.record)), np.float32)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), sizes)
def test_int8_is_off_by_at_most_half_of_each_matrix_s_scale(seed: int, size: float) -> None:
    rows, first = of_rank(4, BLOCKS, seed, size), 0
    error = np.abs(stored("int8", rows) - rows)
    for count, left, right in BLOCKS:
        for _ in range(count):
            span = slice(first, first + left * right)
            largest = np.abs(rows[:, span]).max(axis=1, keepdims=True)
            assert (error[:, span] <= largest / 127 * (0.5 + 1e-4)).all()
            first = span.stop
    assert first == width_of(BLOCKS)


@pytest.mark.parametrize("rank", [1, 2])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), size=sizes)
def test_products_are_exact_where_there_are_no_more(rank: int, seed: int, size: float) -> None:
    """Up to the rounding of two float16 vectors, relative to the matrix: one that is small is kept as well."""
    rows = of_rank(rank, [[3, 5, 6]], seed, size)
    found = stored(f"rank{rank}", rows, [[3, 5, 6]]).reshape(-1, 3, 30)
    norms = np.linalg.norm(rows.reshape(-1, 3, 30), axis=2)
    assert (np.linalg.norm(found - rows.reshape(-1, 3, 30), axis=2) <= 4e-3 * norms + 1e-9).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2]))
def test_no_other_products_are_closer(seed: int, rank: int) -> None:
    """The singular value decomposition gives the closest ones; what is lost beyond those is below two percent."""
    rows = of_rank(6, [[1, 6, 6]], seed, 0.0)[:-1]
    left, values, right = np.linalg.svd(rows.reshape(-1, 6, 6))
    best = (left[:, :, :rank] * values[:, None, :rank]) @ right[:, :rank]
    cosine = (stored(f"rank{rank}", rows, [[1, 6, 6]]) * unit(best.reshape(-1, 36))).sum(axis=1)
    kept = (stored(f"rank{rank}", rows, [[1, 6, 6]]) * rows).sum(axis=1) ** 2
    assert (kept >= 0.98 * (values[:, :rank] ** 2).sum(axis=1)).all()
    assert np.median(cosine) > 0.999


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), sizes, st.sampled_from(ROW_DTYPES))
def test_rows_keep_unit_norm_and_zeros_are_zeros(seed: int, size: float, dtype: str) -> None:
    found = stored(dtype, of_rank(4, BLOCKS, seed, size))
    assert np.linalg.norm(found[:-1], axis=1) == pytest.approx(1, abs=3e-3)
    assert not found[-1].any()


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_what_is_no_number_stays_in_its_row(dtype: str) -> None:
    rows = of_rank(4, BLOCKS, 0, 0.0)
    expected = stored(dtype, rows)
    rows[1, 3] = np.nan
    found = stored(dtype, rows)
    assert np.isnan(found[1]).any()
    others = [0, 2, 3, 4]
    assert np.array_equal(found[others], expected[others])


def test_sizes_of_the_formats() -> None:
    """A matrix of rank 16 takes what the documentation says."""
    assert {dtype: row_codec(dtype, [[1, 16, 16]]).record.itemsize for dtype in ROW_DTYPES} == {
        "float32": 1024, "float16": 512, "int8": 260, "rank2": 128, "rank1": 64,
    }  # fmt: skip
    assert {row_codec(dtype, BLOCKS).suffix for dtype in ROW_DTYPES} == {*SUFFIXES}
    with pytest.raises(LedgerFormatError, match="cannot be read"):
        row_codec("rank1", [[1, -4, 4]])


@pytest.mark.parametrize("dtype", ["float16", "int8", "rank2"])
def test_stored_rows_are_indexed_as_an_array_is(dtype: str) -> None:
    rows, codec = of_rank(4, BLOCKS, 0, 0.0, rows=600), row_codec(dtype, BLOCKS)
    whole = codec.decode(codec.encode(rows))
    found = StoredRows(codec.encode(rows), codec)
    assert (found.shape, len(found), found.dtype) == (whole.shape, 600, whole.dtype)
    for key in (3, np.int64(-1), slice(2, 9), slice(None, None, 7), np.array([5, 1, 5]), (4, 2), (slice(1, 4), 0)):
        assert np.array_equal(found[key], whole[key]), key
    assert np.array_equal(np.asarray(found), whole)
    assert np.array_equal(np.stack(list(found)), whole)
    some = found.take(np.arange(1, 600, 2))
    assert np.array_equal(some[10:20], whole[21:41:2])
    assert np.array_equal(some.take(np.array([3]))[:], whole[[7]])


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("blocks", [None, 1])
def test_a_stage_is_recorded_and_read_in_every_format(
    dtype: str, blocks: int | None, tmp_path: Path, train: Callable
) -> None:
    for name, other in (("whole", "float32"), ("coded", dtype)):
        train(LinearOnThreeAxes(), tmp_path / name, sketch=SketchConfig(rank=4, dtype=other, blocks=blocks))
    whole, coded = (Ledger(tmp_path / name).stage("one") for name in ("whole", "coded"))
    assert coded.problems() == []
    for expected, found in zip(whole.rows(), coded.rows(), strict=True):
        assert found.table.equals(expected.table)  # norms too: what a row loses is its direction's
        made = coded.codec(dtype)
        assert np.array_equal(found.sketches[:], made.decode(made.encode(expected.sketches[:])))
    format_ = FORMAT if dtype.startswith("float") else NEWEST
    assert coded.meta["format"] == format_
    assert coded.storage.read_json("stages/one/manifest-0000.json")["format"] == format_


def test_encoded_rows_of_another_length_or_shape_are_corrupt(tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path, sketch=SketchConfig(rank=4, dtype="rank1"))
    stage = Ledger(tmp_path).stage("one")
    raw = tmp_path / "stages/one" / part_name("rows", 0, 0, "r1")
    data = raw.read_bytes()
    raw.write_bytes(data[:-1])
    with pytest.raises(CorruptPartError, match="were sealed"):
        next(stage.rows())
    raw.write_bytes(data)
    stage.meta["row_blocks"] = [[1, 1, stage.width]]
    with pytest.raises(CorruptPartError, match="does not fit"):
        next(stage.rows())
    stage.meta["row_blocks"] = [[1, 1, stage.width + 1]]
    with pytest.raises(LedgerFormatError, match="matrices of"):
        next(stage.rows())


def test_passes_have_the_rows_of_their_stage(tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path, sketch=SketchConfig(rank=4, dtype="int8"))
    stage = Ledger(tmp_path).stage("one")
    block = next(stage.rows())
    made = PassFiles(stage, "end")
    made.begin("data", 0, "int8", stage.examples())
    made.add(block.table, block.sketches[:])
    (again,) = map(made.block, made.parts())
    assert np.allclose(again.sketches[:], block.sketches[:], atol=1e-6)
    assert made.meta["format"] == NEWEST
