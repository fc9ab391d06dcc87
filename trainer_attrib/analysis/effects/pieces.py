"""A later stage cut into pieces of consecutive steps, with one thinned batch each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from trainer_attrib.analysis.programs import Step, Steps
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader

WINDOWS = 64
"""Steps that are taken of a stage, several recorded ones merged into one where it has more: two optimizers that take
every step of a long stage would cost more than the gradients do."""
SHORTER_FIRST = 1.5
"""Pieces end at steps that grow with this power of their number: gradients change fastest where data have just
changed."""


@dataclass(frozen=True)
class Effort:
    """What is spent on a later stage.

    Args:
        products: of curvature with a vector in every piece, where gradients are carried back.
        batches: whole batches' worth of examples in all pieces together, at least one.
        thin: a piece has one in so many of a batch's examples: there are about ``batches * thin`` pieces.
    """

    products: int
    batches: float
    thin: int

    def worth(self, stage: StageReader) -> float:
        """At most so many whole batches' worth of examples are used of a stage."""
        return min(max(self.batches, 1.0), float(stage.count("steps")))


@dataclass(frozen=True)
class Piece:
    """Steps ``first`` up to ``last`` of a stage (counted from 0), and a batch of one of them."""

    first: int
    last: int
    step: Step

    @property
    def middle(self) -> float:
        """Between its steps."""
        return (self.first + self.last) / 2


def steps_at_once(stage: StageReader) -> int:
    """Recorded steps that are merged into one."""
    return max(-(-stage.count("steps") // WINDOWS), 1)


def pieces_of(stage: StageReader, steps: Steps, effort: Effort) -> list[Piece]:
    """As many pieces as the effort allows, each with the batch in its middle; none of a stage without a step.

    Raises:
        NotComparableError: the program gave no batch.
    """
    found, limit, spent = list[Step](), effort.worth(stage) + 1e-9, 0.0
    wanted: set[int] = set()
    for number, step in zip(range(stage.count("steps")), steps.steps(effort.thin), strict=False):
        if number == 0:
            wanted = {(first + last) // 2 for first, last in _bounds(stage, max(int(limit / step.share), 1))}
        if number in wanted and spent + step.share <= limit:
            found.append(step)
            spent += step.share
    if not found and stage.count("steps"):
        raise NotComparableError(
            f"The program of stage '{stage.name}' gave no batch.",
            cause="its data are empty, or an iterator that was read before.",
            fix="build the program with the same data and arguments as the recorded stage.",
        )
    return [Piece(*bounds, step) for bounds, step in zip(_bounds(stage, len(found)), found, strict=True)]


def _bounds(stage: StageReader, count: int) -> list[tuple[int, int]]:
    """First and last step of at most so many pieces, whole merged steps each."""
    total, at_once = stage.count("steps"), steps_at_once(stage)
    windows = -(-total // at_once)
    count, ends = min(count, windows), [0]
    for number in range(1, count + 1):
        ends.append(max(round(windows * (number / count) ** SHORTER_FIRST), ends[-1] + 1))
    return [(first * at_once, min(last * at_once, total)) for first, last in pairwise(ends)]
