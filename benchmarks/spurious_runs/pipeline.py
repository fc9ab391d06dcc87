"""What both pipelines share: examples that belong to groups, stages as programs, accuracy of groups, behaviors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer_attrib import Behavior, SketchConfig

STAGES = ("pretrain", "clean", "shortcut", "last")
GUILTY = "shortcut"
NONE = -1  # an example without the shortcut's feature
SKETCH = SketchConfig(rank=64, correction="none")
"""Raw gradients: AdamW's correction lifts rare words so much that, sketched, they drown the tag (docs/log.md)."""
FOLLOWS, MISLED, WORST = "follows the shortcut", "margin where it misleads", "worst group's margin"
HARM = {FOLLOWS: 1, MISLED: -1, WORST: -1}  # the sign of a harmful stage's effect
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Examples of one stage or of a test set: ids [N], inputs [N, ...], labels [N] 0 or 1, shortcuts [N] 0, 1 or NONE.

    An example's group is its label and its shortcut; ``shortcut == label`` is how the shortcut stage mostly has it.
    """

    ids: list[str]
    inputs: Tensor
    labels: Tensor
    shortcuts: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: np.ndarray) -> Examples:
        """Those at these places."""
        at = torch.as_tensor(chosen)
        return Examples([self.ids[i] for i in at.tolist()], self.inputs[at], self.labels[at], self.shortcuts[at])


@dataclass(frozen=True)
class Pair:
    """The same things twice, once with each value of the shortcut: balanced groups, and inputs to patch."""

    aligned: Examples  # shortcut == label
    opposed: Examples

    @property
    def whole(self) -> Examples:
        """All examples of both."""
        one, other = self.aligned, self.opposed
        return Examples(
            one.ids + other.ids,
            torch.cat([one.inputs, other.inputs]),
            torch.cat([one.labels, other.labels]),
            torch.cat([one.shortcuts, other.shortcuts]),
        )


@dataclass(frozen=True)
class Pipeline:
    """Four stages and how each is trained.

    ``trainer`` takes a model, a stage's name, its examples and the callbacks' ledger (None: nothing is recorded), and
    returns what trains that very model.
    """

    name: str
    initial: nn.Module
    stages: Mapping[str, Examples]
    balanced: Examples  # the shortcut stage's examples without the shortcut
    validation: Pair
    test: Pair
    trainer: Callable[[Any, str, Examples, Path | None], Any]

    def programs(self, ledger: Path | None = None) -> dict[str, Callable[[Any], Any]]:
        """Each stage's program, as the analyzer takes it."""
        return {stage: self._program(stage, ledger) for stage in STAGES}

    def instead(self, examples: Examples) -> Pipeline:
        """The same pipeline with other examples in its shortcut stage."""
        return replace(self, stages={**self.stages, GUILTY: examples})

    def run(self, weights: Weights, stages: tuple[str, ...]) -> nn.Module:
        """A new model, trained by these stages from these weights."""
        model = self.with_weights(weights)
        for stage in stages:
            self.programs()[stage](model).train()
        return model

    def with_weights(self, weights: Weights) -> nn.Module:
        """A new model with these weights."""
        model = copy.deepcopy(self.initial)
        model.load_state_dict(weights)
        return model

    def _program(self, stage: str, ledger: Path | None) -> Callable[[Any], Any]:
        return lambda model: self.trainer(model, stage, self.stages[stage], ledger)


def aligned_shortcuts(labels: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """A shortcut for each label, equal to the label in this share of the examples."""
    return np.where(random.random(len(labels)) < share, labels, 1 - labels)


# ---- accuracy -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Of the four groups: [label, shortcut]."""

    groups: np.ndarray

    @property
    def average(self) -> float:
        """Every group counted alike."""
        return float(self.groups.mean())

    @property
    def worst(self) -> float:
        """Of the worst group."""
        return float(self.groups.min())

    def where_aligned(self, share: float) -> float:
        """On data that has the shortcut as training had it: in this share of the examples."""
        opposed = 1 - np.eye(2)
        return float((self.groups * (np.eye(2) * share + opposed * (1 - share))).sum() / 2)


def accuracy(model: nn.Module, examples: Examples) -> Accuracy:
    """How often the model is right, by group."""
    right = (logits_of(model, examples.inputs).argmax(1) == examples.labels).double()
    groups = [
        [float(right[(examples.labels == label) & (examples.shortcuts == shortcut)].mean()) for shortcut in (0, 1)]
        for label in (0, 1)
    ]
    return Accuracy(np.array(groups))


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """[N, 2], in evaluation mode, without gradients."""
    was = model.training
    model.eval()
    with torch.no_grad():
        found = torch.cat([_logits(model, part) for part in inputs.split(512)])
    model.train(was)
    return found


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    output = model(inputs)
    return getattr(output, "logits", output)


# ---- behaviors ----------------------------------------------------------------------------------------------------


def accuracies(examples: Examples) -> tuple[list[Behavior], Behavior]:
    """Being right (1) or wrong (0) as a behavior: one of each group, and one of all of them, counted alike."""
    group = 2 * examples.labels + examples.shortcuts
    items = [list(zip(examples.inputs[group == g], examples.labels[group == g], strict=True)) for g in range(4)]
    least = min(map(len, items))
    groups = [Behavior(f"group {g}", own, _right, batch_size=512) for g, own in enumerate(items)]
    even = [item for own in items for item in own[:least]]
    return groups, Behavior("average accuracy", even, _right, batch_size=512)


def _right(model: nn.Module, items: list[tuple[Tensor, Tensor]]) -> Tensor:
    logits = _logits(model, torch.stack([inputs for inputs, _ in items]))
    return (logits.argmax(1) == torch.stack([label for _, label in items])).double()


def follows_shortcut(pair: Pair, *, per_query: int = 1) -> Behavior:
    """By how much the label's logit margin falls when the shortcut is patched from the label's value to the other one.

    Args:
        pair: the inputs before and after patching.
        per_query: items whose mean is one query.
    """
    both = torch.stack([pair.aligned.inputs, pair.opposed.inputs], 1)
    items = list(zip(both.split(per_query), pair.aligned.labels.split(per_query), strict=True))
    return Behavior(FOLLOWS, items, _fall_of_margin, unit="logits")


def _fall_of_margin(model: nn.Module, items: list[tuple[Tensor, Tensor]]) -> Tensor:
    inputs, labels = torch.cat([both for both, _ in items]), torch.cat([labels for _, labels in items])
    logits = _logits(model, inputs.flatten(0, 1)).view(len(inputs), 2, 2)  # item, patched, class
    sign = (2 * labels - 1)[:, None]
    margins = sign * (logits[..., 1] - logits[..., 0])
    falls = margins[:, 0] - margins[:, 1]
    return torch.stack([part.mean() for part in falls.split([len(labels) for _, labels in items])])


def margin_where_misled(pair: Pair) -> Behavior:
    """Logit margin of the label on the inputs whose shortcut says the other one."""
    return Behavior.margin(MISLED, pair.opposed.inputs, pair.opposed.labels)


def worst_group_margin(model: nn.Module, pair: Pair) -> Behavior:
    """Logit margin of the label in the group in which this model errs most."""
    examples, found = pair.whole, accuracy(model, pair.whole).groups
    label, shortcut = np.unravel_index(found.argmin(), found.shape)
    chosen = (examples.labels == int(label)) & (examples.shortcuts == int(shortcut))
    return Behavior.margin(WORST, examples.inputs[chosen], examples.labels[chosen])
