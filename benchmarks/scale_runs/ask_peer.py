"""The same question to the peer's index of the same rows, by the peer's own Python; prints what it took as JSON.

`ask_peer.py STAGE WIDTH QUERIES KEEP TIMES`. The peer is bergson's ``Attributor``, its settings the defaults but for
unit norm.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from bergson.data import create_index
from bergson.gradients import GradientProcessor
from bergson.query.attributor import Attributor
from memory import peak


def indexed(stage: Path, width: int, folder: Path) -> None:
    """Write the rows of a stage as the peer stores them."""
    parts = [np.fromfile(part, np.float16).reshape(-1, width) for part in sorted((stage / "rows").glob("*.f16"))]
    index = create_index(folder, sum(map(len, parts)), {"layer": width}, np.float16)
    np.concatenate(parts, out=index)
    index.flush()
    GradientProcessor(projection_dim=None).save(folder)


def main() -> None:
    stage, (width, queries, keep, times) = Path(sys.argv[1]), map(int, sys.argv[2:])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "index"
        if os.fork() == 0:  # what writing takes is not what asking takes
            indexed(stage, width, folder)
            os._exit(0)
        os.wait()
        asked = {"layer": -torch.randn(queries, width, generator=torch.Generator().manual_seed(1))}
        size = sum(file.stat().st_size for file in folder.iterdir())
        before, spent = peak(), []
        for turn in range(times):
            began = time.process_time()
            if turn == 0:
                attributor = Attributor(folder, unit_norm=True)
            best = attributor.search(asked, keep).indices
            attributor.search(asked, keep, reverse=True)
            spent.append(time.process_time() - began)
        found = {"spent": spent, "grown": peak() - before, "best": best.tolist(), "bytes": size}
    print(json.dumps(found | {"peer": f"bergson {metadata.version('bergson')}"}))


if __name__ == "__main__":
    main()
