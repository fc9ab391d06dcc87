"""What the closest peer's callback costs on the same work; run by the peer's own Python from ``capture_overhead.py``.

The peer is bergson's ``GradientCollectorCallback``, its settings the defaults but for the run's name: sketches of
16 x 16 per module, written as float16 on the training thread. One JSON object goes to the file named first.
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
from typing import Any

from bergson.huggingface import GradientCollectorCallback, prepare_for_gradient_collection
from overhead_work import RANK, StepClock, ratios, small_gpt2, take_turns, trainer_for

RUNS = {"plain": None, "plain again": None, "raw": False, "corrected": True}  # whether the optimizer's state is used


class Peer:
    """Makes the runs' trainers; keeps the callbacks, which know what they cover and hold."""

    def __init__(self, steps: int, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self.callbacks: dict[str, GradientCollectorCallback] = {}

    def trainer(self, clock: StepClock) -> Any:
        """The trainer of the clock's run."""
        correction = RUNS[clock.run]
        if correction is None:
            return trainer_for(clock, None, self.steps, self.folder)
        callback = GradientCollectorCallback(
            self.folder / clock.run, projection_dim=RANK, use_optimizer_state=correction
        )
        self.callbacks[clock.run] = callback
        return prepare_for_gradient_collection(trainer_for(clock, callback, self.steps, self.folder))

    def coverage(self) -> float:
        """Share of the parameters that its rows cover."""
        parameters = small_gpt2().base_model.named_parameters()
        covered = {f"{name}.weight" for name in self.callbacks["raw"].collector.target_info}
        count = sum(parameter.numel() for name, parameter in parameters if name in covered)
        return count / sum(parameter.numel() for parameter in small_gpt2().parameters())

    def correction_bytes(self) -> int:
        """What it holds for the correction between two steps."""
        normalizers = self.callbacks["corrected"].collector.processor.normalizers.values()
        tensors = [
            value for normalizer in normalizers for value in vars(normalizer).values() if hasattr(value, "nbytes")
        ]
        return sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    out, steps = Path(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as temporary:
        peer = Peer(steps, Path(temporary))
        rows = list(ratios(take_turns(list(RUNS), peer.trainer)))
        found = {
            "version": metadata.version("bergson"),
            "rows": rows,
            "coverage": peer.coverage(),
            "bytes_per_example": 2 * sum(peer.callbacks["raw"].grad_sizes.values()),
            "correction_bytes": peer.correction_bytes(),
        }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
