"""Names, tables and version of the on-disk format."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.errors import ConfigurationError, LedgerFormatError

FORMAT, NEWEST = 1, 2  # of what every version reads; of a stage whose rows or shards only this one and later ones read
WEIGHTS = "weights.json"  # shapes and fingerprints of every weight at a stage's start and end

ROWS = pa.schema(
    [
        ("example", pa.string()),
        ("step", pa.int64()),  # executed optimizer update that the row took part in, counted from 1
        ("rank", pa.int16()),  # process that trained on the row
        ("micro_batch", pa.int32()),
        ("row", pa.int32()),  # position in the micro-batch
        ("epoch", pa.float32()),
        ("tokens", pa.int32()),  # target tokens, null where unknown
        ("norm", pa.float32()),  # of the example's own loss gradient: what the backward gave times the denominator
        ("denominator", pa.float32()),
        ("denominator_source", pa.string()),
        ("version", pa.int16()),  # second moment that scaled the row; 0 is a raw row
        ("complete", pa.bool_()),  # every expected layer fired
    ]
)

STEPS = pa.schema(
    [
        ("step", pa.int64()),
        ("skipped", pa.bool_()),  # by a gradient scaler, after ``step`` executed steps: it trained nothing
        ("rank", pa.int16()),  # process that wrote this; readers put the rows of all processes together
        ("optimizer", pa.int16()),  # whose update it was, where several take turns
        ("epoch", pa.float32()),
        ("micro_batches", pa.int32()),
        ("rows", pa.int32()),
        ("captured", pa.bool_()),
        ("loss", pa.float64()),
        ("learning_rate", pa.list_(pa.float64())),  # per parameter group, like the next three
        ("weight_decay", pa.list_(pa.float64())),
        ("beta1", pa.list_(pa.float64())),  # momentum for SGD
        ("beta2", pa.list_(pa.float64())),
        ("gradient_norm", pa.float64()),  # of the gradient the optimizer used, after clipping
        ("clip_threshold", pa.float64()),
        ("audit_weight", pa.string()),
        ("audit_scale", pa.float64()),
        ("audit_residual", pa.float64()),
        (
            "captured_sketch",
            pa.binary(),
        ),  # float32, of the audited weight, where several processes train: the sum of this
        ("gradient_sketch", pa.binary()),  # process's rows and the gradient, or the process's part of it
        ("version", pa.int16()),
        ("projected_weights", pa.binary()),  # float32, the row layout; differences are the executed update
    ]
)

EXAMPLES = pa.schema([("example", pa.string()), ("source", pa.string()), ("text", pa.string())])

_PART_NAME = re.compile(r"(rows|steps|examples)/part-[0-9]{4}-[0-9]{6}\.(parquet|f16|f32|i8|r1|r2)")
_PASS_NAME = re.compile(r"part-[0-9]{6}\.(parquet|raw)")
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass
class Block:
    """What one optimizer step adds to a stage, on the CPU: a step row, its example rows, newly seen examples."""

    step: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    sketches: np.ndarray | None = None  # [len(rows), width], unit norm, not encoded yet
    examples: list[dict[str, Any]] = field(default_factory=list)


def check_stage_name(name: str) -> str:
    """The name, if it can be a folder everywhere.

    Raises:
        ConfigurationError: it is empty, too long or could leave the ledger's directory.
    """
    if not isinstance(name, str) or not _STAGE_NAME.fullmatch(name):
        raise ConfigurationError(
            f"stage={name!r} is not a stage name.",
            cause="a stage name becomes a folder: letters, digits, '.', '_' and '-', starting with a letter or digit.",
            fix="rename the stage, for instance 'pretrain' or 'sft-2'.",
        )
    return name


def check_format(data: dict[str, Any], where: str) -> None:
    """Refuse files of a newer format.

    Raises:
        LedgerFormatError: the format is missing or newer than this library reads.
    """
    found = data.get("format")
    if not isinstance(found, int) or not 1 <= found <= NEWEST:
        raise LedgerFormatError(
            f"{where} has format {found!r}, this version reads formats 1 to {NEWEST}.",
            cause="it was written by a newer trainer-attrib." if isinstance(found, int) else "it is not a ledger.",
            fix="pip install --upgrade trainer-attrib",
        )


def part_name(kind: str, rank: int, part: int, suffix: str) -> str:
    """Relative name of a part's file inside its stage."""
    return f"{kind}/part-{rank:04d}-{part:06d}.{suffix}"


def pass_part(name: str) -> str:
    """The name of a file of a pass, if it can be one.

    Raises:
        LedgerFormatError: it could lead out of the pass's folder.
    """
    if not _PASS_NAME.fullmatch(name):
        raise LedgerFormatError(f"A pass lists a file '{name}'.", cause="pass.json was edited or damaged.")
    return name


def snapshot_name(name: str) -> str:
    """Relative name of a snapshot's file inside its stage."""
    return f"snapshots/{name}.safetensors"


def beside_name(name: str, kind: str) -> str:
    """Relative name of the file with what is stored beside a snapshot: ``moments``, ``buffers`` or ``optimizer``."""
    return f"snapshots/{name}.{kind}.safetensors"


def shard_name(file: str, rank: int) -> str:
    """Relative name of the file with what one process holds of the tensors that would be in ``file``."""
    return f"{file.removesuffix('.safetensors')}.rank-{int(rank):04d}.safetensors"


def rank_of(key: str) -> int:
    """The rank that a key of ``shards`` names.

    Raises:
        LedgerFormatError: it names none.
    """
    if not re.fullmatch(r"[0-9]{4,6}", key):
        raise LedgerFormatError(f"'{key}' is not the rank of a process.", cause="stage.json was edited or damaged.")
    return int(key)


def ending_name(rank: int) -> str:
    """Each process but the first says in a file of its own that its recording broke off, and why."""
    return f"ending-{rank:04d}.json"


def shadow_name(of: str, replica: int, kind: str = "") -> str:
    """Relative name of the file with a shadow's weights at the end of a stage, or its ``buffers`` or ``optimizer``."""
    return f"snapshots/shadow-{check_stage_name(of)}-{int(replica)}{kind and '.'}{kind}.safetensors"


def shadow_state_name(of: str, replica: int, step: int) -> str:
    """Relative name of the file with everything of a shadow after a step that a checkpoint was taken at."""
    return f"shadows/{check_stage_name(of)}-{int(replica)}-step-{int(step)}.safetensors"


def version_name(version: int) -> str:
    """Relative name of a second-moment version's file inside its stage."""
    return f"second_moment/version-{version:04d}.safetensors"


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse file names from a manifest that this library would not have written: they could lead anywhere.

    Raises:
        LedgerFormatError: a name is not that of a part.
    """
    for name in names:
        if not isinstance(name, str) or not _PART_NAME.fullmatch(name):
            raise LedgerFormatError(
                f"{where} names {name!r}, which is not the name of a part.",
                cause="the manifest was edited, or the ledger comes from someone who wants other files to be read.",
                fix="do not use this ledger unless you trust where it comes from.",
            )


def manifest_name(rank: int) -> str:
    """Each writer has a manifest of its own, so that ranks never coordinate."""
    return f"manifest-{rank:04d}.json"


def part_files(part: dict[str, Any], kind: str, count: int) -> list[str]:
    """The names of a part's files of one kind, its table first.

    Args:
        part: its entry in a manifest.
        kind: ``rows``, ``steps`` or ``examples``.
        count: how many files it has of them.

    Raises:
        LedgerFormatError: the manifest lists others.
    """
    names = [name for name in part["files"] if name.startswith(f"{kind}/")]
    tables = [name for name in names if name.endswith(".parquet")]
    if len(names) != count or len(tables) != 1:
        raise LedgerFormatError(
            f"A part lists {names} as its {kind}, expected a table{' and raw rows' if count > 1 else ''}.",
            cause="its manifest was edited or damaged.",
            fix="restore the manifest from a backup.",
        )
    return sorted(names, key=lambda name: name not in tables)
