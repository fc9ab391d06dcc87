"""Reading ahead: what is far away is fetched while what is here is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Read = TypeVar("Read")


def ahead(reads: Iterable[Callable[[], Read]]) -> Iterator[Read]:
    """What each of them returns, in order, while the next one is running on another thread.

    One result is ahead of the one in use, never more. What a read raises is raised where its result would be.
    """
    with ThreadPoolExecutor(1, "trainer-attrib-reader") as thread:
        coming: Future[Read] | None = None
        for read in reads:
            here, coming = coming, thread.submit(read)
            if here is not None:
                yield here.result()
        if coming is not None:
            yield coming.result()
