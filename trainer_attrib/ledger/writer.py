"""A background thread that turns optimizer steps into sealed, immutable parts."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer_attrib.ledger.backlog import Backlog
from trainer_attrib.ledger.row_codecs import RowCodec
from trainer_attrib.ledger.schema import EXAMPLES, ROWS, STEPS, Block, manifest_name, part_name
from trainer_attrib.ledger.storage import Storage

ROLL_BYTES = 32 << 20
ROLL_SECONDS = 60.0
WAITING_BYTES = 256 << 20


class StageWriter:
    """Writes one rank's parts of one stage, its rows as the codec encodes them.

    ``put`` takes a function that makes the step's :class:`Block`; it runs on the writer's thread, so that copying to
    the CPU, normalising and decoding text cost the training loop nothing. What waits holds at most ``WAITING_BYTES`` of
    the training's tensors, then ``put`` blocks; the part being filled takes ``ROLL_BYTES``, twice that while it is
    sealed. A crash loses at most the part being filled.
    """

    def __init__(self, storage: Storage, folder: str, codec: RowCodec, rank: int = 0) -> None:
        self._storage, self._folder, self._rank, self._codec = storage, folder, rank, codec
        self._backlog = Backlog(WAITING_BYTES)
        self.left_out = 0  # steps whose rows are not recorded, of this process since it began
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

    def put(self, make: Callable[[], Block], size: int = 0) -> None:
        """Queue a step, and wait until there is room for it. Raises the fault that stopped the writer, if one did.

        Args:
            make: the step's block.
            size: bytes of tensors that it holds on to.
        """
        if self._fault is not None:
            raise self._fault
        self._backlog.put(lambda: self._add(make()), size)

    def keeps_up(self, size: int) -> bool:
        """Whether there is room for a step of so many bytes, and as much again for what must not be left out."""
        return self._backlog.fits(size)

    def leave_out(self, step: int) -> None:
        """Note that the rows of a step are not recorded because of what waits."""
        if not self.left_out:
            logging.getLogger("trainer_attrib").warning(
                "step %d: %s takes longer to write than training to make rows. The step's rows are left out, as are "
                "those of others while it is behind; SketchConfig(when_behind='wait') lets training wait instead.",
                step, self._storage.url,
            )  # fmt: skip
        self.left_out += 1

    def flush(self) -> None:
        """Write and seal everything queued, and wait for it. Raises the writer's fault, if any."""
        if self._fault is None and self._thread.is_alive():
            self._backlog.put(self._seal)
            self._backlog.join()
        if self._fault is not None:
            raise self._fault

    def close(self) -> None:
        """Write everything queued, seal the last part and stop the thread. Raises the writer's fault, if any."""
        if self._thread.is_alive():
            self._backlog.put(None)
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
        self._backlog.run(self._guarded)
        self._guarded(self._seal)

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._fault is not None:
            return  # after a fault what waits is only dropped, so that put never blocks for ever
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
    repeated: Any = [name for name in schema.names if name != "example"]  # a dictionary of ids has all of them
    pq.write_table(pa.Table.from_pylist(rows, schema), sink, use_dictionary=repeated)
    return sink.getvalue()
