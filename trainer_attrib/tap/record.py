"""The sketches of one forward pass, whichever way they were captured."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer_attrib.numerics.sketching import sketch_examples, sketch_owned
from trainer_attrib.tap.layers import LayerRule, Rule
from trainer_attrib.tap.plan import SketchPlan, WeightPlan
from trainer_attrib.tap.segments import Segments
from trainer_attrib.types import Layout

NO_BATCH = "its output does not start with the batch"


class Record:
    """The sketches of one forward pass, filled during its backward pass.

    Eager layers add theirs. Compiled ones leave theirs as the gradients of ``leaves``, which are by module name.

    Args:
        rows: of the forward pass.
        layout: which of them form one example.
        plan: the weights of a sketch.
        like: a tensor with the sketches' device and dtype.
        segments: the documents in the rows, for ``Layout.SEGMENTS``.
    """

    def __init__(
        self, rows: int, layout: Layout, plan: SketchPlan, like: Tensor, segments: Segments | None = None
    ) -> None:
        self.rows, self.layout, self.segments = rows, layout, segments
        self.examples = len(segments) if segments is not None else 1 if layout is Layout.ONE else rows // layout.sides
        self._plan, self._like = plan, like
        self._parts: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        self.forwards: Counter[str] = Counter()
        self._backwards: Counter[str] = Counter()
        self.skipped: dict[str, str] = {}
        self.reached = False  # by a backward pass, through a layer that is not compiled
        self.loss_scale: Tensor | None = None  # by which the loss had been multiplied

    def add(self, module: str, weight: WeightPlan, left_BSK: Tensor, right_BSK: Tensor) -> None:
        """Add one layer call's contribution, rows folded into examples."""
        if self.segments is None:
            sketch_BK = sketch_rows(self.layout, left_BSK, right_BSK)
        else:
            sketch_BK = self.segments.sketch(left_BSK.flatten(0, 1), right_BSK.flatten(0, 1)).flatten(1)
        self._add(module, weight, sketch_BK)

    def owners(self, tokens: int) -> Tensor | None:
        """The example of each of the batch's flattened tokens, [T]; None if that many cannot be told apart.

        Tokens of a packed row that belong to no document have the number after the last.
        """
        if self.segments is not None:
            return self.segments.owners if tokens == self.segments.tokens else None
        if tokens % self.rows:
            return None
        rows = torch.arange(self.rows, device=self._like.device) % self.examples
        return rows.repeat_interleave(tokens // self.rows)

    def add_routed(self, module: str, weight: WeightPlan, left_PK: Tensor, right_PK: Tensor, owner_P: Tensor) -> None:
        """Add the contribution of tokens in any order, whose examples are given as :meth:`owners` numbers them."""
        sketch_BKK = sketch_owned(left_PK, right_PK, owner_P, self.examples + (self.segments is not None))
        self._add(module, weight, sketch_BKK[: self.examples].flatten(1))

    def _add(self, module: str, weight: WeightPlan, sketch_BK: Tensor) -> None:
        known = self._parts.get(weight.name)
        self._parts[weight.name] = sketch_BK if known is None else known + sketch_BK
        self._backwards[module] += 1

    def _gather(self) -> None:
        """Add what compiled layers have left in the leaves."""
        for weight in self._plan.weights if self.leaves else ():
            for module in weight.modules:
                leaf = self.leaves.get(module)
                if leaf is not None and leaf.grad is not None:
                    self._add(module, weight, leaf.grad)
                    leaf.grad = None

    @property
    def backwards(self) -> Counter[str]:
        """How often each module's gradient was seen; several calls in one compiled backward pass count as one."""
        self._gather()
        return self._backwards

    def take(self, weights: Sequence[WeightPlan]) -> Record:
        """What was captured of some weights, as a record of its own that forgets the rest; removed from this one."""
        self._gather()
        taken = copy.copy(self)
        names, modules = {w.name for w in weights}, {m for w in weights for m in w.modules}
        taken.leaves = {}
        taken._parts = {name: part for name, part in self._parts.items() if name in names}
        taken._backwards = Counter({name: count for name, count in self._backwards.items() if name in modules})
        self._parts = {name: part for name, part in self._parts.items() if name not in names}
        self._backwards = Counter({name: count for name, count in self._backwards.items() if name not in modules})
        return taken

    def why_not(self, rule: Rule, x: Tensor, output: Tensor) -> str:
        """Why a layer call cannot be told apart by example, or ``""``."""
        if self.layout is Layout.ONE:
            return ""
        if self.segments is not None:
            by_token = isinstance(rule, LayerRule) and rule.channels == -1
            if by_token and output.shape[:-1].numel() == self.segments.tokens:
                return ""
            return "it does not act token by token, and a row holds several documents"
        if output.shape[0] != self.rows:
            return NO_BATCH
        if self.rows > 1 and _counts_positions(x):
            return "its input counts positions, the same for every example"
        return ""

    @property
    def sketches(self) -> Tensor:
        """[examples, width], of the loss before scaling; zeros for weights that nothing reached. Made at each use."""
        self._gather()
        scaled = torch.cat([self._part(weight) for weight in self._plan.weights], dim=1)
        return scaled if self.loss_scale is None else scaled / self.loss_scale

    @property
    def held(self) -> list[WeightPlan]:
        """The weights of which anything is captured here."""
        self._gather()
        return [weight for weight in self._plan.weights if weight.name in self._parts]

    @property
    def size(self) -> int:
        """How many numbers are captured here."""
        self._gather()
        return sum(part.numel() for part in self._parts.values())

    @property
    def nbytes(self) -> int:
        """Bytes of what is captured here."""
        self._gather()
        return sum(part.nbytes for part in self._parts.values())

    def holds(self, weight: str) -> bool:
        """Whether anything of this weight is captured here."""
        self._gather()
        return weight in self._parts

    def _part(self, weight: WeightPlan) -> Tensor:
        part = self._parts.get(weight.name)
        return self._like.new_zeros(self.examples, weight.size) if part is None else part


def sketch_rows(layout: Layout, left_BSK: Tensor, right_BSK: Tensor) -> Tensor:
    """Sketches [examples, K_l * K_r] from the projected factors of a batch's rows, which examples may share."""
    if layout is Layout.ONE:
        left_BSK, right_BSK = left_BSK.flatten(0, 1)[None], right_BSK.flatten(0, 1)[None]
    sketch_BK = sketch_examples(left_BSK, right_BSK).flatten(1)
    if layout.sides > 1:
        sketch_BK = sketch_BK.unflatten(0, (layout.sides, -1)).sum(0)
    return sketch_BK


def _counts_positions(x: Tensor) -> bool:
    """Whether these are the indices 0, 1, 2, ...: positions, which as many examples would make look like a batch.

    Looking at the values waits for the device, so only inputs that cannot be told apart by their shape are looked at.
    """
    return x.dim() == 1 and not x.is_floating_point() and bool((x == torch.arange(len(x), device=x.device)).all())
