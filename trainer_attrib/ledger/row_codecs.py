"""How a row lies on disk: the only place that knows. Every row of a stage takes the same number of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trainer_attrib.errors import LedgerFormatError
from trainer_attrib.ledger.schema import FORMAT
from trainer_attrib.numerics.low_rank import leading_products, sum_of_products
from trainer_attrib.numerics.quantization import dequantize, quantize
from trainer_attrib.numerics.sketching import unit_rows

RowBlocks = Sequence[Sequence[int]]
"""``[count, left, right]``: so many matrices [left, right] in a row, one after the other; their entries are the row."""


class RowCodec(Protocol):
    """Rows [N, width] as records [N] of a fixed number of bytes, so that any range of rows is a range of bytes."""

    suffix: str
    """Of the parts' files."""
    format: int
    """The oldest format of the ledger that has such rows."""

    @property
    def record(self) -> np.dtype[Any]:
        """Of one row."""
        ...

    @property
    def width(self) -> int:
        """Numbers of a row."""
        ...

    def encode(self, rows_NK: np.ndarray) -> np.ndarray:
        """Records of unit-norm rows of any float type."""
        ...

    def decode(self, records: np.ndarray) -> np.ndarray:
        """Rows [N, width] as float16 or float32."""
        ...


@dataclass(frozen=True)
class FloatRows:
    """The numbers themselves."""

    kind: str
    width: int
    suffix: str
    format: int = FORMAT

    @property
    def record(self) -> np.dtype[Any]:
        """``width`` little-endian numbers."""
        return np.dtype((self.kind, (self.width,)))

    def encode(self, rows_NK: np.ndarray) -> np.ndarray:
        """Rounded."""
        return np.ascontiguousarray(rows_NK, self.kind)

    def decode(self, records: np.ndarray) -> np.ndarray:
        """As they are: no copy is made."""
        return records


@dataclass(frozen=True)
class QuantizedRows:
    """int8 with a float32 scale for each matrix: off by at most half a scale.

    A float16 scale would save 2 of some 260 bytes, and lose digits of matrices below 0.8 % of the row's norm.
    """

    blocks: RowBlocks
    suffix: str = "i8"
    format: int = 2

    @property
    def width(self) -> int:
        """See :class:`RowCodec`."""
        return width_of(self.blocks)

    @cached_property
    def record(self) -> np.dtype[Any]:
        """Scales of all matrices, then the numbers."""
        scales = sum(count for count, _, _ in self.blocks)
        return np.dtype([("scales", "<f4", (scales,)), ("numbers", "i1", (self.width,))])

    def encode(self, rows_NK: np.ndarray) -> np.ndarray:
        """Each matrix in whole numbers from -127 to 127."""
        records = np.zeros(len(rows_NK), self.record)
        rows, at = _tensor(rows_NK), 0
        for count, span, (left, right) in _groups(self.blocks):
            whole_NMK, scale_NM = quantize(rows[:, span].reshape(len(rows), count, left * right))
            records["numbers"][:, span] = whole_NMK.flatten(1).numpy()
            records["scales"][:, at : at + count] = scale_NM.numpy()
            at += count
        return records

    def decode(self, records: np.ndarray) -> np.ndarray:
        """float32."""
        numbers, scales = (np.array(records[name], order="C") for name in ("numbers", "scales"))
        rows, at = torch.empty(len(records), self.width), 0
        for count, span, (left, right) in _groups(self.blocks):
            whole_NMK = torch.from_numpy(numbers[:, span]).reshape(len(records), count, left * right)
            scale_NM = torch.from_numpy(scales[:, at : at + count])
            rows[:, span] = dequantize(whole_NMK, scale_NM).flatten(1)
            at += count
        return rows.numpy()


@dataclass(frozen=True)
class LowRankRows:
    """Each matrix as a sum of outer products, float16 ("LoRIF", arXiv 2601.21929): what they leave out is lost.

    Rows keep unit norm: factors are enlarged by what the products leave out.
    """

    blocks: RowBlocks
    rank: int
    format: int = 2

    @property
    def suffix(self) -> str:
        """See :class:`RowCodec`."""
        return f"r{self.rank}"

    @property
    def width(self) -> int:
        """See :class:`RowCodec`."""
        return width_of(self.blocks)

    @property
    def record(self) -> np.dtype[Any]:
        """For each matrix its left vectors, then its right ones."""
        numbers = sum(count * self._numbers(sides) for count, _, sides in _groups(self.blocks))
        return np.dtype(("<f2", (numbers,)))

    def encode(self, rows_NK: np.ndarray) -> np.ndarray:
        """The leading products of every matrix."""
        rows, parts = _tensor(rows_NK), list[Tensor]()
        for count, span, sides in _groups(self.blocks):
            matrices = rows[:, span].reshape(len(rows) * count, *sides)
            pairs = [vectors.flatten(1) for vectors in leading_products(matrices, self._products(sides))]
            parts.append(torch.cat(pairs, 1).reshape(len(rows), count * self._numbers(sides)))
        factors = torch.cat(parts, 1)
        _, norms_N = unit_rows(self._product_rows(factors))
        roots_N = torch.where(norms_N > 0, norms_N, torch.ones_like(norms_N)).sqrt()
        return (factors / roots_N[:, None]).half().numpy()

    def decode(self, records: np.ndarray) -> np.ndarray:
        """float32."""
        return self._product_rows(_tensor(records)).numpy()

    def _product_rows(self, factors: Tensor) -> Tensor:
        rows, at = torch.empty(len(factors), self.width), 0
        for count, span, sides in _groups(self.blocks):
            products, end = self._products(sides), at + count * self._numbers(sides)
            pairs = factors[:, at:end].reshape(len(factors) * count, self._numbers(sides))
            vectors = zip(pairs.split([products * side for side in sides], 1), sides, strict=True)
            left, right = (found.reshape(len(found), products, side) for found, side in vectors)
            rows[:, span] = sum_of_products(left, right).reshape(len(factors), span.stop - span.start)
            at = end
        return rows

    def _numbers(self, sides: Sequence[int]) -> int:
        return self._products(sides) * sum(sides)

    def _products(self, sides: Sequence[int]) -> int:
        return min(self.rank, *sides)  # so many are exact


def row_codec(dtype: str, blocks: RowBlocks) -> RowCodec:
    """The codec of ``SketchConfig(dtype=...)`` for rows that are made of these matrices.

    Raises:
        LedgerFormatError: there is no such dtype, or these are no matrices.
    """
    whole = all(len(block) == 3 and all(isinstance(n, int) and n > 0 for n in block) for block in blocks)
    if whole and dtype in _CODECS:
        return _CODECS[dtype](blocks)
    raise LedgerFormatError(
        f"Rows of dtype {dtype!r} and matrices {list(blocks)[:3]} cannot be read.",
        cause="stage.json was edited or damaged, or written by a newer trainer-attrib.",
        fix="pip install --upgrade trainer-attrib, or restore stage.json.",
    )


def width_of(blocks: RowBlocks) -> int:
    """Numbers in a row of these matrices."""
    return sum(count * left * right for count, left, right in blocks)


_CODECS = {
    "float16": lambda blocks: FloatRows("<f2", width_of(blocks), "f16"),
    "float32": lambda blocks: FloatRows("<f4", width_of(blocks), "f32"),
    "int8": QuantizedRows,
    "rank1": lambda blocks: LowRankRows(blocks, 1),
    "rank2": lambda blocks: LowRankRows(blocks, 2),
}
SUFFIXES = tuple(make([[1, 1, 1]]).suffix for make in _CODECS.values())


def _groups(blocks: RowBlocks) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """How many matrices there are of the same shape, the columns of a row that they take, and their shape."""
    first = 0
    for count, left, right in blocks:
        yield count, slice(first, first + count * left * right), (left, right)
        first += count * left * right


def _tensor(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).float()
