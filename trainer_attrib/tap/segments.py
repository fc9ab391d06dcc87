"""Several documents in one row of a batch: packed or padding-free training, where each document is an example."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_attrib.errors import CaptureError
from trainer_attrib.numerics.sketching import sketch_examples

_BLOCK = 32  # tokens per product; padding a document to a multiple of it wastes little, and one bmm does them all


@dataclass(frozen=True)
class Segments:
    """The documents of a batch [R, S], as stretches of its flattened tokens.

    Args:
        starts: of each document, in the flattened batch.
        lengths: of each document, in tokens.
        tokens: R * S.
        device: of the batch.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: int
    device: torch.device

    @staticmethod
    def of(position_ids: Tensor, expected: int | None = None) -> Segments:
        """The documents that ``position_ids`` [R, S] count: a new one wherever the count does not go on.

        Padding counts nothing, so it is single positions, and a document of one token has no target: both are left out,
        unless they are needed to make the ``expected`` number. Waits for the device once.

        Raises:
            CaptureError: the positions are not [R, S].
        """
        if position_ids.dim() != 2:
            raise CaptureError(
                f"position_ids {tuple(position_ids.shape)} do not tell the documents of a packed batch apart.",
                cause="they should be [rows, tokens], counting from 0 in every document.",
                fix="turn packing and padding_free off for this model.",
            )
        begins = torch.ones_like(position_ids, dtype=torch.bool)
        begins[:, 1:] = position_ids.diff(dim=1) != 1
        edges = [*begins.flatten().nonzero().flatten().tolist(), position_ids.numel()]
        found = [(start, end - start) for start, end in pairwise(edges)]
        longer = [(start, length) for start, length in found if length > 1]
        padding = found[expected:] if expected is not None else []
        fits = expected is not None and len(found) >= expected and all(length == 1 for _, length in padding)
        kept = found[:expected] if fits else longer
        starts, lengths = zip(*kept, strict=True) if kept else ((), ())
        return Segments(tuple(starts), tuple(lengths), position_ids.numel(), position_ids.device)

    def __len__(self) -> int:
        return len(self.starts)

    def sketch(self, left_TK: Tensor, right_TK: Tensor) -> Tensor:
        """Per-document sketches [N, K_l, K_r] from the projected factors of each token, [T, K_l] and [T, K_r]."""
        index_MS, absent, owner_M = self._blocks
        left_MSK, right_MSK = F.embedding(index_MS, left_TK), F.embedding(index_MS, right_TK)
        products_MKK = sketch_examples(left_MSK.flatten(0, 1).index_fill_(0, absent, 0.0).view_as(left_MSK), right_MSK)
        return products_MKK.new_zeros(len(self), *products_MKK.shape[1:]).index_add_(0, owner_M, products_MKK)

    def padded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values [R, S] by document: [N, L], zero where a document has ended, and the mask [N, L] of what it holds."""
        offset_L = torch.arange(max(self.lengths, default=0), device=self.device)
        starts_N1, lengths_N1 = (torch.tensor(x, device=self.device)[:, None] for x in (self.starts, self.lengths))
        mask_NL = offset_L < lengths_N1
        index_NL = torch.where(mask_NL, starts_N1 + offset_L, 0)
        return values.flatten()[index_NL] * mask_NL, mask_NL

    @cached_property
    def owners(self) -> Tensor:
        """The document of each of the batch's flattened tokens, [T]; ``len(self)`` for those in none."""
        owner_T = torch.full((self.tokens,), len(self))
        for document, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            owner_T[start : start + length] = document
        return owner_T.to(self.device)

    @cached_property
    def _blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token of each place of each block [M, S], the places that hold none, and each block's document [M].

        A place without a token holds its document's first one, so that nothing leaks even where that is not finite.
        """
        index, absent, owner = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)], []
        for document, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            count = -(-length // _BLOCK)
            places = torch.arange(start, start + count * _BLOCK)
            absent.append(torch.arange(len(owner) * _BLOCK + length, (len(owner) + count) * _BLOCK))
            index.append(places.masked_fill(places >= start + length, start))
            owner += [document] * count
        where = (torch.cat(index).view(-1, _BLOCK), torch.cat(absent), torch.tensor(owner, dtype=torch.long))
        index_MS, absent_A, owner_M = (x.to(self.device) for x in where)
        return index_MS, absent_A, owner_M
