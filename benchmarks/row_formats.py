"""What rows in fewer bytes cost in accuracy: one recording in float32, stored again in every format of SketchConfig.

Scores of each format beside those of the float32 rows, means over queries: Pearson's and Spearman's correlation over
the examples, and how many of the ten best are the same. `cosine`: of a stored row with the float32 one, mean. `LDS`:
how well the scores predict retraining on halves (benchmarks/influence_lds.py), of the digits only. `encode` and
`decode`: CPU microseconds per row. float16 is the default. The digits model sees one vector per example, so that its
gradients are single outer products; in the language model each is a sum over 64 characters.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from lds_runs import chargpt, digits, digits_truth
from lds_runs.testbed import STAGE, Trained, Truth

from trainer_attrib import Analyzer, Ledger
from trainer_attrib.evaluation.adapters import scores_of
from trainer_attrib.evaluation.correlation import pearson, spearman
from trainer_attrib.evaluation.datamodeling import datamodeling_score
from trainer_attrib.ledger.row_codecs import RowCodec
from trainer_attrib.ledger.storage import digest
from trainer_attrib.numerics.low_rank import leading_products
from trainer_attrib.types import ROW_DTYPES

RECIPES, BEST, HALVES = ("grad_cos", "trackstar"), 10, 100
TESTBEDS: dict[str, Callable[[Path], Trained]] = {
    "digits adamw": lambda cache: digits.trained("adamw", 0, cache, dtype="float32"),
    "chargpt": lambda cache: chargpt.trained("chargpt", 0, cache, dtype="float32"),
}


def stored_again(ledger: Path, dtype: str, folder: Path) -> tuple[Path, dict[str, float]]:
    """A copy of a ledger with its rows in another format, and what that took and kept."""
    copy = Path(shutil.copytree(ledger, folder / dtype))
    stage = Ledger(copy).stage(STAGE)
    codec, blocks = stage.codec(dtype), [block.sketches[:] for block in stage.rows()]
    manifest = stage.storage.read_json(f"stages/{STAGE}/manifest-0000.json")
    costs = [_store(copy, part, codec, rows) for part, rows in zip(manifest["parts"], blocks, strict=True)]
    stage.storage.write_json(f"stages/{STAGE}/manifest-0000.json", manifest | {"format": codec.format})
    meta = stage.meta | {"format": codec.format, "sketch": stage.meta["sketch"] | {"dtype": dtype}}
    stage.storage.write_json(f"stages/{STAGE}/stage.json", meta)
    assert Ledger(copy).stage(STAGE).problems() == []
    rows = sum(map(len, blocks))
    told = {name: sum(cost[name] for cost in costs) / rows for name in ("cosine", "encode us", "decode us")}
    return copy, {"bytes per row": codec.record.itemsize} | told


def _store(copy: Path, part: dict[str, Any], codec: RowCodec, rows_NK: np.ndarray) -> dict[str, float]:
    (old,) = (name for name in part["files"] if name.endswith(".f32"))
    begun = time.process_time()
    records = codec.encode(rows_NK)
    encoded = time.process_time()
    decoded_NK = codec.decode(records).astype(np.float32)
    done = time.process_time()
    (copy / "stages" / STAGE / old).unlink()
    name, data = old.replace(".f32", f".{codec.suffix}"), records.tobytes()
    (copy / "stages" / STAGE / name).write_bytes(data)
    part["files"] = {key: entry for key, entry in part["files"].items() if key != old}
    part["files"][name] = {"bytes": len(data), "blake2b": digest(data)}
    cosine = float((decoded_NK * rows_NK).sum())
    return {"cosine": cosine, "encode us": 1e6 * (encoded - begun), "decode us": 1e6 * (done - encoded)}


def scores(run: Trained, ledger: Path, recipe: str) -> np.ndarray:
    """Of every query and example, [Q, N]."""
    found = Analyzer(ledger, run.model).influence([run.behavior], recipe=recipe, controls=())
    return scores_of(found, run.ids)


def measured(name: str, cache: Path, folder: Path, truth: Truth | None) -> list[dict[str, Any]]:
    """Rows of every format and recipe on one testbed."""
    run, found, exact = TESTBEDS[name](cache), [], dict[str, np.ndarray]()
    for dtype in ROW_DTYPES:
        ledger, kept = stored_again(run.ledger, dtype, folder / f"again-{name.replace(' ', '-')}")
        for recipe in RECIPES:
            here_QN = scores(run, ledger, recipe)
            full_QN = exact.setdefault(recipe, here_QN)
            lds = truth and datamodeling_score(here_QN, truth.masks, truth.values).mean.value
            found.append(
                {
                    "testbed": name, "rows": dtype, "recipe": recipe, "bytes per row": int(kept["bytes per row"]),
                    "cosine": kept["cosine"], "Pearson": float(pearson(here_QN, full_QN).mean()),
                    "Spearman": float(spearman(here_QN, full_QN).mean()), "same of top 10": overlap(here_QN, full_QN),
                    "LDS": lds, "encode us": kept["encode us"], "decode us": kept["decode us"],
                }
            )  # fmt: skip
    return found


def overlap(one_QN: np.ndarray, other_QN: np.ndarray) -> float:
    """How much of the best ten examples two scores have in common, mean over queries."""
    best = [np.argsort(-scores_QN, axis=1, kind="stable")[:, :BEST] for scores_QN in (one_QN, other_QN)]
    return float(np.mean([len({*one} & {*other}) / BEST for one, other in zip(*best, strict=True)]))


def times_faster() -> float:
    """Power iteration over torch's singular value decomposition, one product of 16 x 16 matrices, CPU time."""
    matrices = torch.randn(2000, 16, 6) @ torch.randn(2000, 6, 16)
    spent = []
    for work in (lambda: torch.linalg.svd(matrices, full_matrices=False), lambda: leading_products(matrices, 1)):
        work()
        begun = time.process_time()
        work()
        spent.append(time.process_time() - begun)
    return spent[0] / spent[1]


def checks_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """float16 and int8 must not change what is found; of the products only that they are in order is asked."""
    worst = {dtype: min(row["Spearman"] for row in rows if row["rows"] == dtype) for dtype in ROW_DTYPES}
    return {
        "float16_spearman": report.check(worst["float16"], 0.999, most=False),
        "int8_spearman": report.check(worst["int8"], 0.99, most=False),
        "rank2_spearman": report.check(worst["rank2"], 0.9, most=False),
        "rank1_spearman": report.check(worst["rank1"], 0.8, most=False),
    }


def main() -> None:
    parser = report.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=None, help="folder where trainings and retrainings are kept")
    arguments = parser.parse_args()
    logging.getLogger("trainer_attrib").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        halves = 10 if arguments.quick else HALVES
        truth = digits_truth.ground_truth("adamw", "half", cache, halves=halves)
        rows = measured("digits adamw", cache, Path(temporary), truth)
        if not arguments.quick:
            rows += measured("chargpt", cache, Path(temporary), None)
    notes = [f"power iteration takes 1/{times_faster():.1f} of the time of torch.linalg.svd for 16 x 16 matrices"]
    report.publish("row_formats", rows, checks_of(rows), quick=arguments.quick, notes=notes)


if __name__ == "__main__":
    main()
