"""What a predictor says, and what it may look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from torch import nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.forecasting.gradient_pass import GradientPass, gradient_pass
from trainer_attrib.analysis.forecasting.path import Along, path_slopes
from trainer_attrib.analysis.forecasting.reading import Reading, Readings, mean_gradient
from trainer_attrib.analysis.forecasting.run import Run
from trainer_attrib.analysis.training_state import buffers_kept, fingerprint_of


@dataclass(frozen=True)
class Prediction:
    """Predicted changes of behaviors by one predictor.

    Args:
        changes: one reading per behavior.
        displacement: of the weights, if the predictor moves them.
        cost: in gradients of a whole batch, as a share of the run's.
        scaled: whether the changes are in the behaviors' units; a baseline's are not, and tell only more from less.
    """

    changes: Sequence[Reading]
    displacement: Displacement | None = None
    cost: float = 0.0
    scaled: bool = True


@dataclass
class View:
    """A run, behaviors of its model, and what several predictors need, computed once.

    Args:
        run: undisturbed while the view is used.
        behaviors: that are asked about.
        share: of the run's batches that may be differentiated.
        known: readings of the same behaviors of the same model, if there are.
    """

    run: Run
    behaviors: Sequence[Behavior]
    share: float = 1.0
    known: Readings | None = None
    weights: str = field(init=False)
    """Fingerprint of the weights that the run begins with."""
    _slopes: dict[int, Displacement] = field(default_factory=dict, repr=False)
    _on_the_way: dict[int, Displacement] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.weights = fingerprint_of(self.model)

    @property
    def model(self) -> nn.Module:
        """At the weights that the run begins with."""
        return self.run.steps.model

    @cached_property
    def readings(self) -> Readings:
        """Of the behaviors."""
        return self.known or Readings(self.model, self.behaviors)

    @cached_property
    def gradients(self) -> GradientPass:
        """Over the run's batches."""
        with buffers_kept(self.model):
            return gradient_pass(self.run, self.share)

    @cached_property
    def frozen(self) -> list[Reading]:
        """What the optimizer simulated on frozen gradients changes about every behavior."""
        return self.readings.of(self.gradients.moved)

    @cached_property
    def warm(self) -> list[Reading]:
        """What one warm jump changes about every behavior."""
        return self.readings.of(self.gradients.warm)

    def slope(self, number: int) -> Displacement:
        """Gradient of a behavior's mean.

        Raises:
            BehaviorError: it has none.
        """
        if number not in self._slopes:
            self._slopes[number] = mean_gradient(self.model, self.behaviors[number])
        return self._slopes[number]

    def slopes(self, chosen: Sequence[int], along: Along) -> list[Displacement]:
        """Gradients of some behaviors' means, at the first weights or averaged over the way to those of ``warm``.

        Raises:
            BehaviorError: a behavior has none.
        """
        if along == "start":
            return [self.slope(number) for number in chosen]
        new = [number for number in chosen if number not in self._on_the_way]
        found = path_slopes(self.model, [self.behaviors[number] for number in new], self.gradients.warm)
        self._on_the_way |= dict(zip(new, found, strict=True))
        return [self._on_the_way[number] for number in chosen]


class Predictor(Protocol):
    """A way to predict. ``caveat`` is said with its predictions."""

    name: str
    caveat: str

    def predict(self, view: View) -> Prediction:
        """Predict the change of every behavior; the model is left as it is.

        Raises:
            AnalysisError, ConfigurationError: the run or a behavior lacks what is needed.
        """
        ...
