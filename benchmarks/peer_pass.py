"""What the closest peer's pass for rows costs on the same examples; run by its own Python from ``pass_cost_peer.py``.

The peer is bergson's ``InMemoryCollector``, which writes nothing, its settings the defaults but for the projection,
on a model whose weights are frozen as its own `build` freezes them. One JSON object is printed last.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from bergson import CollectorComputer, GradientProcessor, InMemoryCollector
from bergson.config import IndexConfig
from datasets import Dataset
from overhead_work import RANK, small_gpt2
from pass_work import batches, plain, ratios, tokens


def main() -> None:
    torch.set_num_threads(1)
    rounds, data = int(sys.argv[1]), Dataset.from_dict({"input_ids": tokens()})
    frozen = small_gpt2().eval().requires_grad_(False)
    frozen.get_input_embeddings().requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(run_path=str(Path(folder, "run")), projection_dim=RANK, loss_reduction="mean")
        config.partial_run_path.mkdir(parents=True)
        widths = set[int]()

        def rows() -> None:
            processor = GradientProcessor(projection_dim=RANK)
            collector = InMemoryCollector(model=frozen.base_model, data=data, cfg=config, processor=processor)
            computer = CollectorComputer(frozen, data, collector=collector, batches=batches(), cfg=config)
            computer.run_with_collector_hooks()
            widths.add(sum(part[0].numel() for part in collector.gradients.values()))

        found = ratios([(plain(small_gpt2().eval()), {"peer": rows})], rounds)
    print(json.dumps({"version": metadata.version("bergson"), "rows": found, "numbers": widths.pop()}))


if __name__ == "__main__":
    main()
