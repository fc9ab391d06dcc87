"""A background thread that turns optimizer steps into sealed, immutable parts."""

from __future__ import annotations

import io
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer_attrib.ledger.row_codecs import RowCodec
from trainer_attrib.ledger.schema import EXAMPLES, ROWS, STEPS, Block, manifest_name, part_name
from trainer_attrib.ledger.storage import Storage

ROLL_BYTES = 32 << 20
ROLL_SECONDS = 60.0
QUEUED_STEPS = 64


class StageWriter:
    """Writes one rank's parts of one stage, its rows as the codec encodes them.

    ``put`` takes a function that makes the step's :class:`Block`; it runs on the writer's thread, so that copying to
    the CPU, normalising and decoding text cost the training loop nothing. At most ``QUEUED_STEPS`` wait; then ``put``
    blocks, which bounds memory. A crash loses at most the part being filled.
    """

    def __init__(self, storage: Storage, folder: str, codec: RowCodec, rank: int = 0) -> None:
        self._storage, self._folder, self._rank, self._codec = storage, folder, rank, codec
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUED_STEPS)
        self._buffer: list[Block] = []
        self._records: list[np.ndarray] = []  # of the rows of the buffered blocks
        self._buffered, self._opened = 0, time.monotonic()
        self._parts = self._sealed_before()
        self._fault: BaseException | None = None
        sealed = self.sealed()
        self._lock, self._rows, self._sealed_bytes = threading.Lock(), sealed["rows"], sealed["bytes"]
        self._loss, self._losses = 0.0, 0  # their sum and number since somebody asked
        self._thread = threading.Thread(target=self._run, name="trainer-attrib-writer", daemon=True)
        self._thread.start()

    def put(self, make: Callable[[], Block]) -> None:
        """Queue a step. Raises the fault that stopped the writer, if one did."""
        if self._fault is not None:
            raise self._fault
        self._queue.put(lambda: self._add(make()))

    def flush(self) -> None:
        """Write and seal everything queued, and wait for it. Raises the writer's fault, if any."""
        if self._fault is None and self._thread.is_alive():
            self._queue.put(self._seal)
            self._queue.join()
        if self._fault is not None:
            raise self._fault

    def close(self) -> None:
        """Write everything queued, seal the last part and stop the thread. Raises the writer's fault, if any."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        if self._fault is not None:
            raise self._fault

    def sealed(self) -> dict[str, int]:
        """Steps, rows and bytes of the parts that are sealed."""
        size = sum(file["bytes"] for part in self._parts for file in part["files"].values())
        return {"bytes": size, **{kind: sum(part[kind] for part in self._parts) for kind in ("steps", "rows")}}

    def so_far(self) -> tuple[int, int, float | None]:
        """Rows and bytes up to the last step that the thread has taken in, sealed or about to be, and the mean loss of
        the steps with rows since the last call. Waits for nothing."""
        with self._lock:
            loss = self._loss / self._losses if self._losses else None
            self._loss, self._losses = 0.0, 0
            return self._rows, self._sealed_bytes + self._buffered, loss

    def _sealed_before(self) -> list[dict[str, Any]]:
        """Parts of an earlier attempt at this stage: a resumed stage appends, it never overwrites."""
        name = f"{self._folder}/{manifest_name(self._rank)}"
        return self._storage.read_json(name)["parts"] if self._storage.exists(name) else []

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._fault is None:  # after a fault the queue is only drained, so that put never blocks for ever
                self._guarded(work)
            self._queue.task_done()
        if self._fault is None:
            self._guarded(self._seal)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as fault:
            self._fault = fault

    def _add(self, block: Block) -> None:
        self._buffer.append(block)
        if block.sketches is not None:
            self._records.append(self._codec.encode(block.sketches))
            self._buffered += self._records[-1].nbytes
            block.sketches = None
        self._buffered += len(block.step["projected_weights"] or b"")
        self._count(block)
        if self._buffered >= ROLL_BYTES or time.monotonic() - self._opened > ROLL_SECONDS:
            self._seal()

    def _count(self, block: Block) -> None:
        with self._lock:
            self._rows += len(block.rows)
            if block.rows and "loss" in block.step:
                self._loss, self._losses = self._loss + block.step["loss"], self._losses + 1

    def _seal(self) -> None:
        """Write the buffered steps as one part: its files first, then the manifest that makes them count."""
        if not self._buffer:
            return
        blocks, records, self._buffer, self._records, self._buffered = self._buffer, self._records, [], [], 0
        rows = [row for block in blocks for row in block.rows]
        examples = [example for block in blocks for example in block.examples]
        files = dict(
            [
                self._file("steps", "parquet", _parquet([block.step for block in blocks], STEPS)),
                self._file("rows", "parquet", _parquet(rows, ROWS)),
                self._file("rows", self._codec.suffix, b"".join(found.tobytes() for found in records)),
                self._file("examples", "parquet", _parquet(examples, EXAMPLES)),
            ]
        )
        executed = sum(not block.step.get("skipped") for block in blocks)
        self._parts.append({"rows": len(rows), "steps": executed, "examples": len(examples), "files": files})
        self._sealed_bytes += sum(file["bytes"] for file in files.values())
        name = f"{self._folder}/{manifest_name(self._rank)}"
        self._storage.write_json(name, {"format": self._codec.format, "rank": self._rank, "parts": self._parts})
        self._opened = time.monotonic()

    def _file(self, kind: str, suffix: str, data: bytes) -> tuple[str, dict[str, Any]]:
        name = part_name(kind, self._rank, len(self._parts), suffix)
        return name, self._storage.write(f"{self._folder}/{name}", data)


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink)
    return sink.getvalue()
