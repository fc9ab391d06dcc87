"""The micro-batches between two optimizer steps, and the ledger block they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer_attrib.capture.denominator import DenominatorProbe
from trainer_attrib.capture.example_ids import id_strings, sampled
from trainer_attrib.capture.messages import logger
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.schema import Block
from trainer_attrib.numerics.sketching import unit_rows
from trainer_attrib.tap.plan import SketchPlan, WeightPlan
from trainer_attrib.tap.record import Record
from trainer_attrib.types import SketchConfig

LIMIT, PILE = 2**28, 64
"""Captured numbers (1 GiB) that may wait for a step of their optimizer; micro-batches from one check to the next."""

Describe = Callable[[Tensor, Tensor | None], Sequence[str]]
"""(token rows [R, S], mask [R, S] or None) -> the text of each row."""

Names = Sequence[Any] | Tensor
"""One name per example: strings, integers or a tensor of integers, which is read on the writer's thread."""


_BETWEEN = ("", "\n— preferred to —\n", "\n— reference answer —\n")  # before the text of each side of an example


@dataclass(frozen=True)
class Known:
    """What the caller knows of a micro-batch's examples; whatever is None is derived from the batch itself."""

    ids: Names | None = None
    sources: Names | None = None
    texts: Sequence[str] | None = None
    denominator: float | None = None
    if_they_fit: bool = False  # ids and sources are of data rows, which need not be the forward pass's examples


def ids_given(known: Known) -> int | None:
    """How many ids the caller gave, if any."""
    return None if known.ids is None else known.ids.numel() if isinstance(known.ids, Tensor) else len(known.ids)


@dataclass
class MicroBatch:
    """One forward pass that training will backpropagate."""

    record: Record
    known: Known
    hashes: Tensor
    tokens: Tensor | None = None  # target tokens per row
    inputs: Tensor | None = None  # token rows, kept for their text
    mask: Tensor | None = None
    declared: Any = None  # num_items_in_batch as the model received it
    probe: DenominatorProbe | None = None

    @property
    def trained(self) -> bool:
        """Whether a backward pass reached any captured layer."""
        return bool(self.record.backwards)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that it holds on to."""
        beside = (self.hashes, self.tokens, self.inputs, self.mask)
        return self.record.nbytes + sum(tensor.nbytes for tensor in beside if tensor is not None)


@dataclass
class Window:
    """Everything between two executed updates."""

    micro_batches: list[MicroBatch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    norms: list[tuple[Tensor, float]] = field(default_factory=list)  # before clipping, threshold
    given_up: set[str] = field(default_factory=set)  # weights of which too much had piled up
    warned: bool = False

    def add(self, micro_batch: MicroBatch) -> None:
        """Append. Once they pile up, forwards that nothing backpropagated are forgotten, and memory is bounded."""
        if self.micro_batches and len(self.micro_batches) % PILE == 0:
            self._give_up()
            self.micro_batches = [m for m in self.micro_batches if m.trained]
        self.micro_batches.append(micro_batch)

    def _give_up(self) -> None:
        """Bound what waits for a step: weights that have waited longest lose all of it, and their next step its rows.

        A part of the rows would be worse than none: nothing would say that the others trained as well.
        """
        for micro in self.micro_batches:
            if sum(m.record.size for m in self.micro_batches) <= LIMIT:
                return
            if weights := micro.record.held:
                self._warn(weights)
                self.forget(weights)
                self.given_up |= {weight.name for weight in weights}

    def _warn(self, weights: Sequence[WeightPlan]) -> None:
        if not self.warned:
            logger.warning(
                "%d micro-batches wait for the optimizer of '%s' (and %d other weights) to step or to discard their "
                "gradients. What was captured of them is dropped to bound memory; its next step has no rows. "
                "Record only optimizers that step, or leave these weights out: SketchConfig(exclude=...).",
                len(self.micro_batches), weights[0].name, len(weights) - 1,
            )  # fmt: skip
        self.warned = True

    def take(self, weights: Sequence[WeightPlan] | None) -> Window:
        """What a step used, removed from here: everything, or what these weights took, if optimizers take turns."""
        taken = Window(losses=self.losses, norms=self.norms)
        self.losses, self.norms = [], []
        names = self.given_up if weights is None else {weight.name for weight in weights}
        lost, self.given_up = self.given_up & names, self.given_up - names
        if weights is None:
            taken.micro_batches, self.micro_batches = self.micro_batches, []
        else:
            taken.micro_batches = [replace(micro, record=micro.record.take(weights)) for micro in self.micro_batches]
        if lost:
            taken.micro_batches = []
        return taken

    def holds(self, weight: str) -> bool:
        """Whether anything of this weight is captured here, or was until it had to be given up."""
        return weight in self.given_up or any(micro.record.holds(weight) for micro in self.micro_batches)

    def forget(self, weights: Sequence[WeightPlan]) -> None:
        """Drop what was captured of some weights: training threw their gradients away."""
        self.given_up -= {weight.name for weight in weights}
        for micro in self.micro_batches:
            micro.record.take(weights)

    def used_norm(self) -> Tensor | None:
        """Norm of the gradient after clipping, if clipping told it once (``torch.nn.utils.clip_grad_norm_``)."""
        if len(self.norms) != 1:
            return None
        [(norm, threshold)] = self.norms
        return norm * (threshold / (norm + 1e-6)).clamp(max=1.0)

    def captured(self) -> Tensor | None:
        """Sum of all row sketches [width], or None if nothing was captured."""
        sums = [m.record.sketches.sum(0) for m in self.micro_batches if m.trained]
        return torch.stack(sums).sum(0) if sums else None


@dataclass(frozen=True)
class RowMaker:
    """Turns micro-batches into ledger rows on the writer's thread; remembers which examples were described."""

    expected: int  # modules that fire in a complete pass
    sketch: SketchConfig
    plan: SketchPlan
    describe: Describe | None
    rank: int = 0
    seen: set[str] = field(default_factory=set)

    def block(self, step: dict[str, Any], micro_batches: list[MicroBatch], keep: Tensor | None) -> Block:
        """The block of one step; ``keep`` [width] zeroes the columns of weights that cannot be captured in full."""
        block, sketches = Block(step), []
        for index, micro in enumerate(micro_batches):
            rows, sketch = self._rows(step, micro, index, len(micro_batches), keep)
            block.rows += rows
            block.examples += self._examples(micro, rows)
            sketches.append(sketch)
        if sketches:
            block.sketches = np.concatenate(sketches)
        step["rows"] = len(block.rows)
        return block

    def _rows(
        self, step: dict[str, Any], micro: MicroBatch, index: int, window: int, keep: Tensor | None
    ) -> tuple[list[dict[str, Any]], np.ndarray]:
        ids = _ids(micro)
        kept = [row for row, example in enumerate(ids) if sampled(example, self.sketch.sample)]
        sketches = micro.record.sketches if len(kept) == len(ids) else micro.record.sketches[kept]
        unit, norms = unit_rows(self.plan.pool(sketches if keep is None else sketches * keep))
        denominator, source = measured_denominator(micro, window)
        tokens = None if micro.tokens is None else _per_example(micro).tolist()
        shared = {
            "step": step["step"],
            "rank": self.rank,
            "epoch": step["epoch"],
            "micro_batch": index,
            "denominator": denominator,
            "denominator_source": source,
            "version": step["version"],
            "complete": len(micro.record.backwards) >= self.expected,
        }
        rows = [
            {"example": ids[r], "row": r, "norm": n * denominator, "tokens": tokens and tokens[r], **shared}
            for r, n in zip(kept, norms.tolist(), strict=True)
        ]
        return rows, unit.cpu().numpy()

    def _examples(self, micro: MicroBatch, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        fresh = {row["example"]: row["row"] for row in rows if row["example"] not in self.seen}
        if not fresh:
            return []
        self.seen.update(fresh)
        texts = self._texts(micro, list(fresh.values()))
        sources = None if micro.known.sources is None else _strings(micro.known.sources)
        return [
            {"example": i, "source": sources[row] if sources else None, "text": text}
            for (i, row), text in zip(fresh.items(), texts, strict=True)
        ]

    def _texts(self, micro: MicroBatch, rows: list[int]) -> Sequence[str | None]:
        if micro.known.texts is not None:
            return [micro.known.texts[row] for row in rows]
        if self.describe is None or micro.inputs is None:
            return [None] * len(rows)
        sides = [[row + k * micro.record.examples for row in rows] for k in range(micro.record.layout.sides)]
        mask = micro.mask
        described = [self.describe(micro.inputs[side], None if mask is None else mask[side]) for side in sides]
        return ["".join(map("".join, zip(_BETWEEN, parts, strict=False))) for parts in zip(*described, strict=True)]


def measured_denominator(micro: MicroBatch, window: int) -> tuple[float, str]:
    """What each example's loss was divided by, and how that is known.

    Measured from the gradient where the loss is a cross entropy, else given by the caller, else the count the model
    was called with, else assumed: a mean over the micro-batch's examples, averaged over the window.
    """
    measured = micro.probe.result() if micro.probe is not None else None
    if measured is not None:  # at the logits of the scaled loss
        scale = micro.record.loss_scale
        return measured if scale is None else measured * float(scale), "measured"
    if micro.known.denominator is not None:
        return float(micro.known.denominator), "given"
    if micro.declared is not None:
        return float(micro.declared), "num_items_in_batch"
    return float(micro.record.examples * window), "assumed mean"


def _ids(micro: MicroBatch) -> list[str]:
    if micro.known.ids is None:
        return id_strings(micro.hashes)
    ids = _strings(micro.known.ids)
    if len(ids) != micro.record.examples:
        raise ConfigurationError(
            f"{len(ids)} ids were given for {micro.record.examples} examples.",
            fix="give one id per example, or none; where a forward pass concatenates two sides of an example, say so: "
            "Recorder(..., loss=LossForm(layout=Layout.PAIRS)).",
        )
    return ids


def _strings(names: Names) -> list[str]:
    return [str(name) for name in (names.reshape(-1).tolist() if isinstance(names, Tensor) else names)]


def _per_example(micro: MicroBatch) -> Tensor:
    assert micro.tokens is not None
    return micro.tokens.reshape(micro.record.layout.sides, micro.record.examples).sum(0)
