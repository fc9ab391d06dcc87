"""Carries each example's id from the data set to the training step, whatever lies between.

Columns that a model does not know are dropped before collation, and a batch reaches the model through code of the
framework's choosing. So the id joins the example where it is fetched, is set aside while the user's collator runs, and
leaves the batch before the trainer looks into it. Loader workers, shuffling and skipping do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

KEY = "trainer_attrib_example"


class WithIds:
    """A map-style data set whose items carry ``(id, source)`` under a key; picklable for loader workers."""

    def __init__(self, dataset: Any, ids: Sequence[Any], sources: Sequence[Any] | None, key: str = KEY) -> None:
        self.dataset, self.ids, self.sources, self.key = dataset, ids, sources, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in self.__dict__:  # unpickling asks before __init__ ran
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._named(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if fetch is not None else [self.dataset[i] for i in indices]
        return [self._named(item, index) for item, index in zip(items, indices, strict=True)]

    def _named(self, item: dict[str, Any], index: int) -> dict[str, Any]:
        source = None if self.sources is None else self.sources[int(index)]
        return {**item, self.key: (str(self.ids[int(index)]), source)}


class SetAside:
    """A collator that hides the ids from the collator it wraps, then adds them to its batch."""

    def __init__(self, collate: Callable[[list[Any]], Any], key: str = KEY) -> None:
        self.collate, self.key = collate, key

    def __call__(self, items: list[Any]) -> Any:
        """Collate without the ids, then add them."""
        if not (items and isinstance(items[0], dict) and self.key in items[0]):
            return self.collate(items)
        names = [item[self.key] for item in items]
        batch = self.collate([{k: v for k, v in item.items() if k != self.key} for item in items])
        if isinstance(batch, MutableMapping):
            batch[self.key] = names
        return batch


class RidingIds:
    """Installs both on one loader for the time of a training run, and takes the ids out of its batches. Several may
    ride along under keys of their own."""

    def __init__(self, loader: Any, ids: Sequence[Any], sources: Sequence[Any] | None, key: str = KEY) -> None:
        self._key = key
        while hasattr(loader, "base_dataloader"):  # accelerate's shard around the user's loader
            loader = loader.base_dataloader
        self._loader: DataLoader[Any] = loader
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        self._fits = not isinstance(loader.dataset, IterableDataset) and len(loader.dataset) == len(ids)
        self._named = WithIds(loader.dataset, ids, sources, key) if self._fits else None

    def install(self) -> bool:
        """Start; False where the loader's rows are not the named rows (streams, packed or filtered data)."""
        if self._named is not None:
            # DataLoader forbids assigning `dataset`, because samplers depend on its length, which does not change here.
            self._loader.__dict__["dataset"] = self._named
            self._loader.collate_fn = SetAside(self._collate, self._key)
        return self._fits

    def remove(self) -> None:
        """Leave the loader as it was; safe to call twice."""
        self._loader.__dict__["dataset"] = self._dataset
        self._loader.collate_fn = self._collate

    @staticmethod
    def take(batch: Any, key: str = KEY) -> tuple[list[str] | None, list[str] | None]:
        """Ids and sources of a batch, removed from it; None where they did not ride along."""
        if not isinstance(batch, MutableMapping) or key not in batch:
            return None, None
        names = batch.pop(key)
        sources = [source for _, source in names]
        return [name for name, _ in names], None if None in sources else [str(source) for source in sources]
