"""Ids ride from the data set to the batch and leave the loader as it was."""

from __future__ import annotations

import pickle
from collections import Counter, UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from trainer_attrib_integrations.riding_ids import KEY, RidingIds, SetAside, WithIds


class Rows:
    """A data set as plain as it gets."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.owner = "user"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"value": index * 10}


class Fetching(Rows):
    """One that fetches a whole batch at once, as ``datasets`` does."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, int]]:
        return [self[i] for i in indices]


class Stream(IterableDataset):
    """One without rows to name."""

    def __iter__(self) -> Any:
        return iter([{"value": 1}])


def stack(items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    """A collator that would choke on anything but numbers."""
    return {key: torch.tensor([item[key] for item in items]) for key in items[0]}


IDS = [f"id-{i}" for i in range(10)]


def _epoch(loader: DataLoader) -> list[tuple[str, int]]:
    found = []
    for batch in loader:
        ids, _ = RidingIds.take(batch)
        assert KEY not in batch
        found += list(zip(ids, batch["value"].tolist(), strict=True))
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Rows, Fetching])
def test_every_example_arrives_once_per_epoch_under_its_name(kind: type, workers: int) -> None:
    loader = DataLoader(kind(10), batch_size=3, shuffle=True, num_workers=workers, collate_fn=stack)
    ids = RidingIds(loader, IDS, None)
    assert ids.install()
    for _ in range(2):
        found = _epoch(loader)
        assert Counter(name for name, _ in found) == Counter(IDS)
        assert all(value == 10 * int(name.removeprefix("id-")) for name, value in found)


def test_removing_restores_the_loader_and_can_be_repeated() -> None:
    data = Rows(10)
    loader = DataLoader(data, batch_size=3, collate_fn=stack)
    before = [batch["value"].tolist() for batch in loader]
    ids = RidingIds(loader, IDS, None)
    ids.install()
    ids.remove()
    ids.remove()
    assert loader.dataset is data
    assert loader.collate_fn is stack
    assert [batch["value"].tolist() for batch in loader] == before
    assert all(KEY not in batch for batch in loader)


def test_shuffling_is_the_same_with_and_without_ids() -> None:
    orders = []
    for named in (False, True):
        loader = DataLoader(
            Rows(10), batch_size=3, collate_fn=stack, generator=torch.Generator().manual_seed(1), shuffle=True
        )
        if named:
            RidingIds(loader, IDS, None).install()
        orders.append([batch["value"].tolist() for batch in loader])
    assert orders[0] == orders[1]


def test_sources_ride_along_or_not_at_all() -> None:
    sources = ["web" if i % 2 else "books" for i in range(10)]
    loader = DataLoader(Rows(10), batch_size=10, collate_fn=stack)
    RidingIds(loader, range(10), sources).install()
    ids, found = RidingIds.take(next(iter(loader)))
    assert ids == [str(i) for i in range(10)]
    assert found == sources
    loader = DataLoader(Rows(10), batch_size=10, collate_fn=stack)
    RidingIds(loader, range(10), [None, *sources[1:]]).install()
    assert RidingIds.take(next(iter(loader)))[1] is None


@pytest.mark.parametrize("data", [Stream(), Rows(9)], ids=["stream", "filtered"])
def test_rows_that_are_not_the_named_ones_are_left_alone(data: Any) -> None:
    loader = DataLoader(data, batch_size=3, collate_fn=stack)
    assert not RidingIds(loader, IDS, None).install()
    assert loader.dataset is data
    assert loader.collate_fn is stack


def test_the_loader_inside_a_wrapper_is_used() -> None:
    class Wrapper:
        def __init__(self, base: DataLoader) -> None:
            self.base_dataloader = base

    loader = DataLoader(Rows(10), batch_sampler=BatchSampler(RandomSampler(range(10)), 5, False), collate_fn=stack)
    assert RidingIds(Wrapper(Wrapper(loader)), IDS, None).install()
    assert len(_epoch(loader)) == 10


def test_wrappers_survive_pickling_and_show_the_data_sets_own_attributes() -> None:
    named = pickle.loads(pickle.dumps(WithIds(Rows(10), IDS, None)))  # noqa: S301
    assert (len(named), named.owner) == (10, "user")
    assert named[3] == {"value": 30, KEY: ("id-3", None)}
    assert named.__getitems__([1, 2])[1][KEY] == ("id-2", None)
    with pytest.raises(AttributeError):
        _ = named.nothing
    batch = pickle.loads(pickle.dumps(SetAside(stack)))([named[0], named[1]])  # noqa: S301
    assert RidingIds.take(batch)[0] == ["id-0", "id-1"]


@pytest.mark.parametrize("collate", [lambda items: [1, 2], lambda items: (torch.zeros(2),)], ids=["list", "tuple"])
def test_batches_that_cannot_carry_ids_pass_untouched(collate: Callable) -> None:
    batch = SetAside(collate)([{"value": 1, KEY: ("a", None)}])
    assert RidingIds.take(batch) == (None, None)
    assert type(batch) is type(collate([]))


def test_items_without_ids_and_mappings_of_other_kinds_are_fine() -> None:
    assert SetAside(stack)([{"value": 1}])["value"].tolist() == [1]
    assert SetAside(len)([]) == 0
    batch = SetAside(lambda items: UserDict(stack(items)))([{"value": 1, KEY: ("a", "web")}])
    assert RidingIds.take(batch) == (["a"], ["web"])
    assert list(batch) == ["value"]
