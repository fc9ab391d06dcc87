"""Who may write: one recording of a stage at a time, and one pass over data."""

from __future__ import annotations

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path

from trainer_attrib.errors import StageExistsError
from trainer_attrib.ledger.storage import Storage

ROOM = 256 << 10
"""Bytes of disk that are kept free for a recording's last words."""


class Claim:
    """The right of this process to write into a folder, until it is released, forgotten, or the process ends.

    It is a lock on a hidden file, which the system lets go of however a process dies. Locks are between processes: in
    one process a recording that goes on takes over from one that was never closed. Object stores have no locks, nor do
    some network file systems: there, nobody is kept out.

    Raises:
        StageExistsError: another process is writing there.
        LedgerNotWritableError: the folder cannot be written.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self._release, self._path = lambda: None, ""
        if not storage.local:
            return
        with storage.writing(folder):
            lock = os.open(storage.path(f"{folder}/.writer"), os.O_RDWR | os.O_CREAT, 0o644)
        self._release = weakref.finalize(self, os.close, lock)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.release()
            raise StageExistsError(
                f"Another process is writing to {storage.path(folder)} now.",
                cause="the same script runs twice, or the run that is to be gone on with is still alive.",
                fix="wait until it ends, or end it; or give this run another stage name.",
            ) from None
        except OSError:
            return  # a file system without locks
        _clear(Path(storage.path(folder)))
        with suppress(OSError):  # a disk that is nearly full, or cannot reserve
            os.posix_fallocate(lock, 0, ROOM)
        self._path = storage.path(f"{folder}/.writer")

    def make_room(self) -> None:
        """Give the reserved room back to the disk: one that is full must not keep a recording from saying so."""
        if self._path:
            os.truncate(self._path, 0)

    def release(self) -> None:
        """Let others write; safe to call twice."""
        with suppress(OSError):
            self.make_room()
        self._path = ""
        self._release()


def stage_exists(storage: Storage, name: str) -> StageExistsError:
    """The error for a name that is taken."""
    return StageExistsError(
        f"Stage '{name}' is already recorded in {storage.url}.",
        cause="the training script ran before with the same ledger and stage name.",
        fix="give this run another name; if it broke off, resume it from a checkpoint; or remove "
        f"{storage.path(f'stages/{name}')} if it is not needed.",
    )


def claim_new(storage: Storage, name: str) -> Claim:
    """The right to record a new stage. A folder without ``stage.json`` is of one that died being opened: taken over.

    Raises:
        StageExistsError: the name is taken.
    """
    created = storage.create_folder(f"stages/{name}")
    claim = Claim(storage, f"stages/{name}")
    if storage.exists(f"stages/{name}/stage.json") or not (created or storage.local):
        claim.release()
        raise stage_exists(storage, name)
    return claim


def _clear(folder: Path) -> None:
    """Remove what a writer that was killed had begun to write. No reader sees it, and no writer is alive."""
    for path in folder.rglob(".writing-*"):
        path.unlink(missing_ok=True)
