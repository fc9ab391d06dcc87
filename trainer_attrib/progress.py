"""Progress of long work: in the terminal, and for whoever watches from another thread and may want it to stop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

from trainer_attrib.errors import CancelledError

Item = TypeVar("Item")


class Watch(Protocol):
    """Sees how far work is."""

    cancelled: bool
    """Set by the watcher: the work stops at its next item."""

    def advanced(self, title: str, done: int, total: int | None) -> None:
        """So many items of a piece of work are done; ``total`` where it is known."""
        ...


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Whatever runs inside the block, in this thread, tells a watch how far it is."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def progress(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on a terminal.

    Raises:
        CancelledError: whoever watches does not want the rest.
    """
    total = total if total is not None else _length(items)
    with Bar(title, total) as bar:
        for item in items:
            yield item
            bar.update()


class Bar:
    """A bar that is moved by hand, inside ``with``."""

    def __init__(self, title: str, total: int | None, *, silent: bool = False) -> None:
        from tqdm.auto import tqdm  # looks for a notebook: not while this library is imported

        self._title, self._total, self._done = title, total, 0
        self._bar = tqdm(total=total, desc=title, leave=False, disable=True if silent else None)

    def __enter__(self) -> Bar:
        self._tell()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        """So many items more are done.

        Raises:
            CancelledError: whoever watches does not want the rest.
        """
        self._done += count
        self._bar.update(count)
        self._tell()

    def _tell(self) -> None:
        if watch := _watch.get():
            watch.advanced(self._title, self._done, self._total)
            if watch.cancelled:
                raise CancelledError(f"{self._title} was cancelled after {self._done} items.")


def _length(items: Iterable[object]) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None
