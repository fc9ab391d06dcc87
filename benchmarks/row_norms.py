"""How steady row norms are over the first ten AdamW steps, where second moments are folded in after the fourth.

The spread is the largest over the smallest of the steps' median row norms. Two-layer GPT-2 and Llama models read
torch's own source text; raw rows beside corrected ones, which hold raw rows for four steps.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trainer_attrib import Ledger, Recorder, SketchConfig

STEPS, LENGTH = 10, 64
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )
    ),
}  # fmt: skip


def spread(name: str, rate: float, batch: int, correction: str) -> float:
    """Of one training."""
    text = torch.frombuffer(
        bytearray(Path(torch.nn.modules.transformer.__file__).read_bytes()[:60_000]), dtype=torch.uint8
    )
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(1)
    norms: dict[int, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with Recorder(
            folder, stage="one", model=model, optimizer=optimizer, sketch=SketchConfig(correction=correction)
        ):
            for _ in range(STEPS):
                starts = torch.randint(0, len(text) - LENGTH, (batch,), generator=generator).tolist()
                tokens = torch.stack([text[start : start + LENGTH] for start in starts]).long()
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        for block in Ledger(folder).stage("one").rows():
            for row in block.table.select(["step", "norm"]).to_pylist():
                norms[row["step"]].append(row["norm"])
    medians = [median(found) for found in norms.values()]
    return max(medians) / min(medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="write nothing")
    quick = parser.parse_args().quick
    logging.getLogger("trainer_attrib").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        for rate in (1e-5, 3e-4):
            for batch in (4, 16):
                found = {kind: spread(name, rate, batch, kind) for kind in ("none", "factored")}
                row = {"model": name, "learning rate": f"{rate:g}", "batch": batch}
                rows.append(row | {"raw": found["none"], "corrected": found["factored"]})
    report.publish(
        "row_norms", rows, {"corrected_spread": report.check(max(row["corrected"] for row in rows), 2.0)}, quick=quick
    )


if __name__ == "__main__":
    main()
