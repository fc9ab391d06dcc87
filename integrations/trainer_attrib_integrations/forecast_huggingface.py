"""Forecasts for ``transformers.Trainer`` and TRL's trainers, before they train."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.cleaning import Rows
from trainer_attrib.analysis.forecasting.forecast import Forecast
from trainer_attrib.analysis.forecasting.forecast import forecast as forecast_run
from trainer_attrib.analysis.forecasting.plan import Plan
from trainer_attrib.analysis.forecasting.prediction import Predictor
from trainer_attrib.analysis.forecasting.reshaping import Reshaping
from trainer_attrib.analysis.forecasting.run import TrainingRow
from trainer_attrib.errors import ConfigurationError
from trainer_attrib_integrations.following_plan import FollowedPlan, plan_of
from trainer_attrib_integrations.stepping_huggingface import MicroBatch, TrainerSteps, length_of
from trainer_attrib_integrations.undisturbed_huggingface import trainer_undisturbed


class TrainerRun:
    """A Trainer's run that has not begun; see :class:`~trainer_attrib.analysis.forecasting.run.Run`.

    Args:
        trainer: ready to train.
        id_column: column with a unique name per example; else examples are called by their numbers.
        source_column: column that says where an example comes from.

    Raises:
        ConfigurationError: it has trained, or its training cannot be followed from outside.
    """

    def __init__(self, trainer: Any, *, id_column: str = "id", source_column: str = "source") -> None:
        if trainer.state.global_step > 0:
            raise ConfigurationError(
                f"This {type(trainer).__name__} has trained {trainer.state.global_step} steps.",
                cause="a forecast begins where training begins.",
                fix="build the trainer anew, on the model as it was before.",
            )
        self.trainer, self._columns = trainer, (id_column, source_column)
        self.steps = TrainerSteps(trainer)
        with self.undisturbed():
            self.rates: Sequence[Sequence[float]] = self._rates()

    @property
    def batch_size(self) -> int:
        """See :attr:`~trainer_attrib.analysis.forecasting.run.Run.batch_size`."""
        args = self.trainer.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """See :meth:`~trainer_attrib.analysis.forecasting.run.Run.undisturbed`."""
        with trainer_undisturbed(self.trainer):
            try:
                yield
            finally:
                self.__dict__.pop("_parts", None)  # how the model was prepared is undone

    def rows(self) -> list[TrainingRow]:
        """See :meth:`~trainer_attrib.analysis.forecasting.run.Run.rows`."""
        dataset = self.trainer.train_dataset
        if not hasattr(dataset, "__len__"):
            raise ConfigurationError(
                "The trainer's data are a stream: its examples cannot be listed.",
                fix="forecast without contributions, or take the first rows of the stream as a data set.",
            )
        names = getattr(dataset, "column_names", None) or []
        sources = dataset[self._columns[1]] if self._columns[1] in names else [None] * len(dataset)
        named = zip(Rows(dataset, self._columns[0]).ids, sources, dataset, strict=True)
        return [self._row(example, source, row) for example, source, row in named]

    def example_loss(self, number: int) -> Tensor:
        """See :meth:`~trainer_attrib.analysis.forecasting.run.Run.example_loss`. Losses that are means over the tokens
        of a batch weigh an example by its tokens, as training does."""
        dataset, collate, model = self._parts
        return MicroBatch(self.trainer, model, collate([dataset[number]]), self._items, 1, {})()

    def answer_tokens(self, number: int) -> tuple[list[int], list[int], list[int]]:
        """Tokens of a pair's prompt, chosen and rejected answer."""
        row = self.trainer.train_dataset[number]
        return list(row["prompt_ids"]), list(row["chosen_ids"]), list(row["rejected_ids"])

    @contextmanager
    def arranged(self, plan: Plan) -> Iterator[None]:
        """See :meth:`~trainer_attrib.analysis.forecasting.run.Run.arranged`."""
        rates = self.rates
        with self.undisturbed():
            followed = FollowedPlan(self.trainer, plan, self._columns[0])
            try:
                self.rates = self._rates()
                yield
            finally:
                self.rates = rates
                followed.remove()

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        """Data set and collator as the loader has them, and the model as losses use it."""
        loader: Any = self.trainer.get_train_dataloader()
        while hasattr(loader, "base_dataloader"):
            loader = loader.base_dataloader
        return loader.dataset, loader.collate_fn, self.steps.prepared()

    @cached_property
    def _items(self) -> Any:
        """Tokens that count per example, on average, where the loss divides by their number in the whole batch."""
        dataset, collate, _ = self._parts

        def items(number: int) -> Any:
            batches = iter([collate([dataset[number]])])
            return self.trainer.get_batch_samples(batches, 1, self.trainer.args.device)[1]

        first = items(0)
        if first is None:
            return None
        return torch.stack([torch.as_tensor(items(number)) for number in range(len(dataset))]).double().mean().float()

    def _rates(self) -> list[list[float]]:
        trainer = self.trainer
        self.steps.announce(length_of(trainer.get_train_dataloader()))
        optimizer, found = self.steps.optimizer(), []
        schedule = self._schedule(optimizer)
        for _ in range(trainer.state.max_steps):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()  # without gradients: nothing moves
            schedule.step()
        return found

    def _schedule(self, optimizer: Any) -> Any:
        trainer = self.trainer
        if trainer.lr_scheduler is None:
            return trainer.create_scheduler(num_training_steps=trainer.state.max_steps, optimizer=optimizer)
        given = copy.copy(trainer.lr_scheduler)
        given.optimizer = optimizer
        given._step_count += 1  # at its first step it would ask whether this optimizer's steps are counted
        return given

    def _row(self, example: str, source: Any, row: dict[str, Any]) -> TrainingRow:
        decode = self._decode
        source = None if source is None else str(source)
        if "chosen_ids" in row:
            prompt = decode(row.get("prompt_ids", []))
            return TrainingRow(example, source, prompt, decode(row["chosen_ids"]), decode(row["rejected_ids"]))
        if "prompt_ids" in row and "completion_ids" in row:
            return TrainingRow(example, source, decode(row["prompt_ids"]), decode(row["completion_ids"]))
        return TrainingRow(example, source, "", decode(row["input_ids"]) if "input_ids" in row else str(row))

    def _decode(self, tokens: Sequence[int]) -> str:
        tokenizer = self.trainer.processing_class
        return tokenizer.decode(list(tokens), skip_special_tokens=True) if hasattr(tokenizer, "decode") else str(tokens)


def forecast(
    trainer: Any,
    behaviors: Sequence[Behavior],
    method: str | Predictor | list[str | Predictor] = "frozen",
    *,
    share: float = 1.0,
    id_column: str = "id",
    source_column: str = "source",
) -> Forecast:
    """What training would change about behaviors of the model, before it trains. Trainer and model are left as they
    are: training afterwards gives the same bits.

    Args:
        trainer: ready to train: any ``transformers.Trainer`` or trainer of TRL.
        behaviors: of its model, usually :meth:`Behavior.rate`, ``completion`` or ``contrast``.
        method: one or several of "frozen" (the optimizer simulated on the first weights' gradients, then measured),
            "warm" (one jump, then measured), "linearised" (for runs that go far), "look_ahead" (a few real steps),
            "gradient" (a straight line), and the baselines "counts" and "projection".
        share: of the batches that are differentiated; the error bar says what that costs.
        id_column: column with a unique name per example; else examples are called by their numbers.
        source_column: column that says where an example comes from.

    Raises:
        ConfigurationError: the trainer has trained or cannot be followed from outside, an unknown method, no behaviors.
        BehaviorError: a behavior that cannot be measured.
    """
    run = TrainerRun(trainer, id_column=id_column, source_column=source_column)
    return forecast_run(run, behaviors, method, share=share)


def apply_plan(trainer: Any, plan: Plan | Reshaping | None = None, *, id_column: str = "id") -> FollowedPlan:
    """Make a trainer that has not begun follow a plan for its data; then call ``trainer.train()``.

    Args:
        trainer: of the data that were forecast.
        plan: of ``forecast(...).reshape(...)``; None takes the columns of its data set (``Reshaping.columns``).
        id_column: that names its rows; a row without it is called by its number.

    Returns:
        With ``remove()``, after which the trainer is as it was.

    Raises:
        ConfigurationError: the plan is for other data, or asks for what this trainer's loss cannot do.
        MissingDataError: rows of the data set are not in the plan.
    """
    found = plan_of(trainer.train_dataset, id_column) if plan is None else plan
    return FollowedPlan(trainer, found.plan if isinstance(found, Reshaping) else found, id_column)
