"""Forecasts for Lightning's trainer, of either of its packages, before it fits a module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.forecasting.forecast import Forecast
from trainer_attrib.analysis.forecasting.forecast import forecast as forecast_run
from trainer_attrib.analysis.forecasting.plan import Plan
from trainer_attrib.analysis.forecasting.prediction import Predictor
from trainer_attrib.analysis.forecasting.run import TrainingRow
from trainer_attrib.analysis.training_state import random_states_kept
from trainer_attrib.errors import ConfigurationError
from trainer_attrib_integrations.stepping_lightning import Fit, FitBatch, batches_of_an_epoch
from trainer_attrib_integrations.undisturbed_model import model_undisturbed


class FitRun:
    """A fit that has not begun; see :class:`~trainer_attrib.analysis.forecasting.run.Run`.

    Args:
        trainer: that has not fitted anything.
        module: that it would fit.
        train_dataloaders: one loader.

    Raises:
        ConfigurationError: the fit cannot be followed from outside.
    """

    def __init__(self, trainer: Any, module: Any, train_dataloaders: Any) -> None:
        self.steps = Fit(trainer, module, train_dataloaders)
        self._trainer, self._module, self._loader = trainer, module, train_dataloaders
        with self.undisturbed():
            self.rates: Sequence[Sequence[float]] = self._rates()

    @property
    def batch_size(self) -> int:
        """See :attr:`~trainer_attrib.analysis.forecasting.run.Run.batch_size`."""
        return (getattr(self._loader, "batch_size", None) or 1) * self._trainer.accumulate_grad_batches

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """See :meth:`~trainer_attrib.analysis.forecasting.run.Run.undisturbed`."""
        logged = dict(self._module.__dict__)
        with random_states_kept(), model_undisturbed(self._module):
            try:
                yield
            finally:
                for name in self._module.__dict__.keys() - logged.keys():
                    del self._module.__dict__[name]

    def rows(self) -> list[TrainingRow]:
        """See :meth:`~trainer_attrib.analysis.forecasting.run.Run.rows`."""
        return [_row(number, item) for number, item in enumerate(self._dataset())]

    def example_loss(self, number: int) -> Tensor:
        """See :meth:`~trainer_attrib.analysis.forecasting.run.Run.example_loss`."""
        batch = self._loader.collate_fn([self._dataset()[number]])
        return FitBatch(self._trainer, self._module, batch, number, 1.0, (0, 0))()

    @contextmanager
    def arranged(self, plan: Plan) -> Iterator[None]:
        """See :meth:`~trainer_attrib.analysis.forecasting.run.Run.arranged`. Examples are left out where the loader
        stands; it begins anew for the fit itself."""
        kept = [number for number, weight in enumerate(plan.weights.tolist()) if weight]
        if not kept or any(plan.effective[number] != 1 for number in kept) or plan.masked:
            raise ConfigurationError(
                "A Lightning fit can leave examples out, not weigh, flip or mask them.",
                cause="what a module makes of an example is its own business.",
                fix="reshape with how='drop', or weigh losses in training_step by a column of the data.",
            )
        before, rates, steps = self._loader, self.rates, self.steps
        with self.undisturbed():
            self._loader = without(before, kept)
            self.steps = Fit(self._trainer, self._module, self._loader)
            try:
                self.rates = self._rates()
                yield
            finally:
                self._loader, self.rates, self.steps = before, rates, steps

    def _dataset(self) -> Any:
        dataset = getattr(self._loader, "dataset", None)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ConfigurationError(
                "The loader's examples cannot be listed: it has no data set of a known length.",
                fix="pass a DataLoader over a map-style data set, or forecast without contributions.",
            )
        return dataset

    def _rates(self) -> list[list[float]]:
        accumulate = self._trainer.accumulate_grad_batches
        batches = batches_of_an_epoch(self._loader, self._trainer.limit_train_batches)
        total, epochs = self._trainer.max_steps, self._trainer.max_epochs
        in_epoch = None if batches is None else max(math.ceil(batches / accumulate), 1)
        if in_epoch is not None and epochs is not None and epochs >= 0:
            total = in_epoch * epochs if total < 0 else min(total, in_epoch * epochs)
        if total < 1:
            raise ConfigurationError(
                f"The fit has no known end: max_steps={self._trainer.max_steps}, max_epochs={epochs}.",
                fix="give the trainer max_steps or max_epochs.",
            )
        optimizer, schedule = self.steps.configured()
        scheduler, by_step, every = _schedule(schedule)
        found = []
        for taken in range(1, total + 1):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()  # without gradients: nothing moves
            ends = taken if by_step else taken / in_epoch if in_epoch and taken % in_epoch == 0 else 0
            if scheduler is not None and ends and ends % every == 0:
                scheduler.step()
        return found


def forecast(
    trainer: Any,
    module: Any,
    train_dataloaders: Any,
    behaviors: Sequence[Behavior],
    method: str | Predictor | list[str | Predictor] = "frozen",
    *,
    share: float = 1.0,
) -> Forecast:
    """What ``trainer.fit(module, train_dataloaders)`` would change about behaviors of the module, before it fits.
    Trainer and module are left as they are. Behaviors call the module itself: its ``forward``.

    Args:
        trainer: that has not fitted anything.
        module: that it would fit.
        train_dataloaders: one loader.
        behaviors: of the module, such as :meth:`Behavior.margin`.
        method: one or several of "frozen", "warm", "look_ahead" and "gradient"; see the same function of
            ``trainer_attrib.integrations.huggingface``.
        share: of the batches that are differentiated; the error bar says what that costs.

    Raises:
        ConfigurationError: the fit cannot be followed from outside, an unknown method, no behaviors.
        BehaviorError: a behavior that cannot be measured.
    """
    return forecast_run(FitRun(trainer, module, train_dataloaders), behaviors, method, share=share)


def without(loader: Any, kept: Sequence[int]) -> Any:
    """A loader of some of the examples of a ``DataLoader``, which shuffles if that did.

    Raises:
        ConfigurationError: its batches are made by a sampler of the user's own.
    """
    from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

    if type(loader.sampler) not in (RandomSampler, SequentialSampler) or loader.batch_size is None:
        raise ConfigurationError(
            f"Examples cannot be left out of batches made by {type(loader.sampler).__name__}.",
            fix="leave them out of the data set.",
        )
    shuffles = isinstance(loader.sampler, RandomSampler)
    return DataLoader(
        Subset(loader.dataset, list(kept)), batch_size=loader.batch_size, shuffle=shuffles,
        collate_fn=loader.collate_fn, drop_last=loader.drop_last, generator=loader.generator,
    )  # fmt: skip


def _schedule(schedule: Any) -> tuple[Any, bool, int]:
    """The scheduler, whether it goes by steps, and how often."""
    config = schedule if isinstance(schedule, Mapping) else {"scheduler": schedule}
    scheduler = config["scheduler"]
    if "Plateau" in type(scheduler).__name__:
        raise ConfigurationError(
            "ReduceLROnPlateau reads a metric that only training gives.", fix="forecast with another schedule."
        )
    return scheduler, config.get("interval", "epoch") == "step", int(config.get("frequency", 1))


def _row(number: int, item: Any) -> TrainingRow:
    if not isinstance(item, Mapping):
        return TrainingRow(str(number), None, "", f"example {number}")
    text = item.get("text", f"example {number}")
    source = item.get("source")
    return TrainingRow(str(item.get("id", number)), None if source is None else str(source), "", str(text))
