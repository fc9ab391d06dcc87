"""Keeping a part of each step's examples when a stage is run again: cheaper steps, whose losses are means over it.

Whole micro-batches are left out first, because those cost nothing; only then are examples taken out of a batch, before
it is collated where that is possible: a collator copes with any number of examples, be they pairs or packed rows.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader

from trainer_attrib.errors import ConfigurationError


class Thinned(NamedTuple):
    """A micro-batch with ``kept`` of its ``total`` examples. The batch comes first: loaders look there for tensors."""

    batch: Any
    kept: int
    total: int


class ThinningCollator:
    """Collates every ``thin``-th example of a batch, at least one, beginning elsewhere in every batch.

    Args:
        collate: the loader's own, also picklable if the loader has workers.
        thin: keep one in so many.
        hold: begin elsewhere only after so many batches.
        alone: the loader does not batch: its items are batches already, whose rows are thinned.
    """

    def __init__(self, collate: Callable[[Any], Any], thin: int, hold: int = 1, *, alone: bool = False) -> None:
        self.collate, self.thin, self.hold, self.alone = collate, thin, hold, alone
        self._seen = 0

    def begin(self, offset: int) -> None:
        """Set where to begin in the next batch."""
        self._seen = offset * self.hold

    def __call__(self, samples: Any) -> Thinned:
        """Collate what is kept."""
        offset = self._seen // self.hold
        self._seen += 1
        if self.alone or not isinstance(samples, list):
            return thin_rows(self.collate(samples), self.thin, offset)
        kept = _part(samples, self.thin, offset)
        return Thinned(self.collate(kept), len(kept), len(samples))


def thin_rows(batch: Any, thin: int, offset: int) -> Thinned:
    """Every ``thin``-th row of a ready batch, at least one.

    Rows are cut from every tensor [B, ...] in any nesting of mappings, lists and tuples, B being the first dimension of
    the first tensor that has one. What has another first dimension stays whole.
    """
    size = next((t.shape[0] for t in _tensors(batch) if t.ndim), 0)
    if size <= 1:
        return Thinned(batch, 1, 1)
    rows = _part(range(size), thin, offset)

    def cut(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[rows.start :: rows.step] if part.ndim and part.shape[0] == size else part
        if isinstance(part, Mapping):
            changed = copy.copy(part)  # keeps the class: trainers' batches are mappings of their own
            for key, value in part.items():
                changed[key] = cut(value)  # type: ignore[index]
            return changed
        if isinstance(part, list | tuple):
            parts = [cut(value) for value in part]
            return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)
        return part

    return Thinned(cut(batch), len(rows), size)


class Thinning:
    """How about one in ``thin`` examples of every step is kept.

    Args:
        thin: 1 keeps everything and touches nothing.
        accumulate: micro-batches of a step.

    Raises:
        ConfigurationError: ``thin`` is not a whole number from 1 on.
    """

    def __init__(self, thin: int, accumulate: int = 1) -> None:
        if not isinstance(thin, int) or thin < 1:
            raise ConfigurationError(
                f"thin is {thin!r}; it must be a whole number, 1 or more.", fix="thin=1 keeps all."
            )
        self.thin = thin
        self._drop = min(thin, accumulate)
        self._each = max(1, round(thin / self._drop))
        self._accumulate = accumulate
        self._collator: ThinningCollator | None = None
        self._epoch = self._window = 0

    def collator(self, loader: DataLoader[Any]) -> ThinningCollator:
        """What ``loader`` is to collate with instead of its own collator; its batches become :class:`Thinned`."""
        alone = loader.batch_sampler is None
        hold = self._accumulate * self._drop  # else a step's first micro-batch would always lose the same rows
        self._collator = ThinningCollator(loader.collate_fn, self._each, hold, alone=alone)
        return self._collator

    def of(self, batches: Iterable[Any]) -> Iterable[Any]:
        """What is to be iterated over instead of the user's own batches, which stay as they are."""
        if self.thin == 1 or not isinstance(batches, DataLoader):
            return batches
        changed = copy.copy(batches)
        changed._iterator = None  # of workers that are kept alive and have the other collator
        changed.collate_fn = self.collator(batches)
        return changed

    def begin(self, epoch: int) -> None:
        """Tell that an epoch (counted from 0) is about to begin.

        Every epoch begins elsewhere: of data in a fixed order, all is seen after ``thin`` epochs.
        """
        self._epoch, self._window = epoch, 0
        if self._collator is not None:
            self._collator.begin(epoch // self._drop)

    def keep(self, window: Sequence[Any]) -> tuple[list[Any], float]:
        """The micro-batches of the next step that are kept, and the share of its examples in them."""
        if self.thin == 1:
            return list(window), 1.0
        offset = self._epoch // self._drop + self._window // self._drop
        thinned = [b if isinstance(b, Thinned) else thin_rows(b, self._each, offset) for b in window]
        kept = _part(thinned, self._drop, self._epoch + self._window)
        self._window += 1
        share = sum(batch.kept for batch in kept) / sum(batch.total for batch in thinned)
        return [batch.batch for batch in kept], share


def windows(batches: Iterable[Any], size: int, limit: int | None = None) -> Iterator[list[Any]]:
    """One epoch's batches, ``size`` at a time, the last time perhaps fewer; none is fetched beyond ``limit``."""
    rest = itertools.islice(batches, limit)
    while window := list(itertools.islice(rest, size)):
        yield window


def _part(items: Any, thin: int, offset: int) -> Any:
    """Every ``thin``-th item from ``offset`` on, at least one of any items."""
    step = min(thin, len(items))
    return items[offset % step :: step]


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from itertools.chain.from_iterable(map(_tensors, batch.values()))
    elif isinstance(batch, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, batch))
