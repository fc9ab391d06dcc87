"""Configuration and small values that every floor shares. No tensor work happens here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from trainer_attrib.errors import ConfigurationError

ROW_DTYPES = ("float32", "float16", "int8", "rank2", "rank1")  # largest first; ledger/row_codecs.py has each


class Correction(StrEnum):
    """What is folded into the projections before a gradient is sketched."""

    NONE = "none"
    FACTORED = "factored"  # 1/sqrt of the factored second moment (Shazeer & Stern 2018, algorithm 1)


class Layout(StrEnum):
    """Which rows of a batch belong to one example."""

    ROWS = "rows"  # row i is example i
    PAIRS = "pairs"  # rows i and i + n/2 are the chosen and the rejected side of example i (TRL's concatenated forward)
    TRIPLES = "triples"  # rows i, i + n/3 and i + 2n/3: chosen, rejected and a reference answer
    SEGMENTS = "segments"  # a row may hold several examples, each counted by ``position_ids`` from its own start
    ONE = "one"  # every row of every forward belongs to one example (a query)

    @property
    def sides(self) -> int:
        """How many rows of a concatenated forward pass belong to one example."""
        return {Layout.PAIRS: 2, Layout.TRIPLES: 3}.get(self, 1)


@dataclass(frozen=True, kw_only=True)
class LossForm:
    """How a training loss is made of examples, and so what a row of the ledger stands for.

    Args:
        layout: which rows of a forward pass form one example.
        unit: what one example is, for people: ``"document"``, ``"pair"``, ...
        weighted: the loss weights each example by something of its own (an advantage, a preference margin), so that its
            denominator is not to be read off the gradient of the logits.
        per_token: it sums over target tokens and divides by the trainer's count of them (``num_items_in_batch``).
        coupled: reasons why an example's gradient depends on the other examples of its batch. Rows still add up to the
            batch's gradient, but they are not what the examples would give on their own.
        remarks: anything else to say before the first step.
    """

    layout: Layout = Layout.ROWS
    unit: str = "example"
    weighted: bool = False
    per_token: bool = False
    coupled: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    """How gradients are compressed. One setting per ledger is usual, since only equal settings can be compared.

    Args:
        rank: sketch dimension K of each side; a weight costs ``min(K, rows) * min(K, columns)`` numbers per example.
        modules: glob, or globs separated by commas, of the modules to capture.
        exclude: globs of modules to leave out.
        every_n_steps: capture examples of every n-th optimizer step only (steps and snapshots are always recorded).
        sample: share of the examples whose rows are kept, above 0 and at most 1. An example's id alone decides: its
            rows are kept in every epoch, stage and process or in none, and a smaller sample is part of a larger one.
            Saves storage, not computation: the audit of each step needs all rows.
        correction: ``"factored"`` folds AdamW's second moments into the projections, ``"none"`` keeps raw gradients.
        dtype: how unit-norm rows lie on disk; norms are always float32. Beside the numbers themselves (``"float16"``,
            ``"float32"``) these are ``"int8"``, with a scale for each weight, and ``"rank1"`` or ``"rank2"``: each
            weight's matrix as so many outer products (docs/recording.md has sizes and what they cost in accuracy).
        seed: of the projections.
        when_behind: what happens when the disk cannot keep up, and some 256 MB wait for it: ``"wait"``, training waits
            too; ``"skip"``, the rows of a step are left out once half of that waits, and the analyzer says of how many
            steps. A stage may be resumed with another choice.
        blocks: None: every weight has columns of its own. Otherwise weights whose sketches have the same shape are put
            into at most so many blocks, neighbors together, and the sketches in a block are added up, so that rows do
            not grow with the model's depth (Chang et al. 2024, "TrackStar", appendix A.1). Every weight has
            projections of its own, so products of rows stay those of the gradients in expectation, with more noise.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    rank: int = 16
    modules: str = "*"
    exclude: tuple[str, ...] = ()
    every_n_steps: int = 1
    sample: float = 1.0
    correction: str = "factored"
    dtype: str = "float16"
    seed: int = 0
    blocks: int | None = None
    when_behind: str = field(default="wait", compare=False)

    def __post_init__(self) -> None:
        _require(self.blocks is None or self.blocks >= 1, f"blocks={self.blocks}", "None or at least 1")
        _require(1 <= self.rank <= 1024, f"rank={self.rank}", "an integer from 1 to 1024")
        _require(self.every_n_steps >= 1, f"every_n_steps={self.every_n_steps}", "at least 1")
        _require(0 < self.sample <= 1, f"sample={self.sample}", "a share above 0 and at most 1")
        _require(self.correction in tuple(Correction), f"correction={self.correction!r}", f"one of {list(Correction)}")
        _require(self.dtype in ROW_DTYPES, f"dtype={self.dtype!r}", f"one of {list(ROW_DTYPES)}")
        _require(self.when_behind in ("wait", "skip"), f"when_behind={self.when_behind!r}", "'wait' or 'skip'")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Shadow:
    """Weights as they would be had an earlier stage not been executed, trained along with the stage being recorded.

    Args:
        of: name of the earlier stage.
        thin: the shadow's gradients are compared with the model's on 1/thin of each step's examples. Costs two passes
            over them: ``2 / (thin * every)`` of the training's, for all replicas together.
        every: compare at every n-th step; the steps between use the comparison before them.
        replicas: shadows of the same stage on disjoint examples, ``1 / (thin * replicas)`` of each step's. How much
            they differ tells how uncertain they are.
        device: where weights and optimizer state of the shadow are kept, for instance ``"cpu"``; None: with the
            model's.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    of: str
    thin: int = 4
    every: int = 1
    replicas: int = 1
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("thin", "every", "replicas"):
            value = getattr(self, name)
            whole = isinstance(value, int) and value >= 1
            _require(whole, f"{name}={value!r}", "an integer of at least 1", by="Shadow")
        _require(isinstance(self.of, str) and bool(self.of), f"of={self.of!r}", "the name of a stage", by="Shadow")


def _require(holds: bool, found: str, expected: str, by: str = "SketchConfig") -> None:
    if not holds:
        raise ConfigurationError(f"{by} got {found}, expected {expected}.", fix="correct this argument.")
