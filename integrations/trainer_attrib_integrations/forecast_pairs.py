"""A forecast on the command line: what DPO on a file of preference pairs would do, who would do it, other data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.forecasting.forecast import Forecast
from trainer_attrib.analysis.forecasting.planning import Wish
from trainer_attrib.analysis.forecasting.reshaping import Reshaping
from trainer_attrib.errors import ConfigurationError
from trainer_attrib_integrations.cleaned_data import refuse_existing
from trainer_attrib_integrations.forecast_huggingface import forecast
from trainer_attrib_integrations.given_behaviors import given_behaviors
from trainer_attrib_integrations.given_data import is_text_or_chat, load_model, read_objects

_SIDES = ("prompt", "chosen", "rejected")
_PAIR = 'a "prompt", a "chosen" and a "rejected" answer, all texts or all conversations; "id" and "source" if there are'


@dataclass(frozen=True)
class PairsForecast:
    """A run of TRL's DPO on a file of pairs that has not begun, and what is asked about it.

    Args:
        trainer: of the run.
        behaviors: that it may change.
        rows: pairs as they are in their file.
        wish: what the changes should be, if the data are to be reshaped.
        options: of the command.
    """

    trainer: DPOTrainer
    behaviors: Sequence[Behavior]
    rows: Sequence[dict[str, Any]]
    wish: Wish | None
    options: argparse.Namespace

    @staticmethod
    def asked(options: argparse.Namespace, folder: str) -> PairsForecast:
        """Read what the command's options name. Weights are taken in float32: in half precision the small steps of
        preference training are lost to rounding.

        Args:
            options: of the command.
            folder: for what the trainer may write.

        Raises:
            ConfigurationError: options that belong together are apart, a folder that exists, or files that do not hold
                what they should; said before anything is computed.
        """
        if options.out:
            refuse_existing(options.out)
        rows = read_pairs(options.data)
        model, tokenizer = load_model(options.model, "float32")
        behaviors = given_behaviors(options, tokenizer)
        wish = _wish(options, [behavior.name for behavior in behaviors])
        reference, _ = load_model(options.model, "float32")
        trainer = preference_trainer(model, reference, tokenizer, rows, _settings(options, folder))
        return PairsForecast(trainer, behaviors, rows, wish, options)

    def outlook(self) -> Forecast:
        """What the run would do."""
        return forecast(self.trainer, self.behaviors, self.options.method, share=self.options.share)

    def reshaped(self, outlook: Forecast) -> Reshaping:
        """The data changed as was wished."""
        assert self.wish is not None
        wish, options = self.wish, self.options
        return outlook.reshape(wish.below, wish.above, drop_at_most=options.drop_at_most, how=options.how)

    def write(self, reshaped: Reshaping) -> Path:
        """Write the pairs with the plan as columns; returns the folder."""
        return reshaped.write(self.options.out, list(self.rows))


def read_pairs(file: str) -> list[dict[str, Any]]:
    """Preference pairs from a file, one JSON object a line, with all that a line has.

    Raises:
        ConfigurationError: there is no such file, it is empty, or a line is not a pair, or of another kind than the
            first: texts or conversations.
    """
    kinds: list[type] = []

    def holds(row: dict[str, Any]) -> bool:
        sides = [row.get(side) for side in _SIDES]
        kinds.extend(type(side) for side in sides)
        return all(is_text_or_chat(side) for side in sides) and len({*kinds}) == 1

    return read_objects(file, "pair", _PAIR, holds)


def preference_trainer(
    model: nn.Module, reference: nn.Module, tokenizer: Any, rows: Sequence[dict[str, Any]], settings: DPOConfig
) -> DPOTrainer:
    """TRL's DPO on pairs, ready to train.

    Args:
        model: to be trained.
        reference: the same model once more.
        tokenizer: of both.
        rows: pairs; ``id`` and ``source`` name them in the forecast.
        settings: of the run.
    """
    named = [
        {
            "id": str(number if row.get("id") is None else row["id"]),
            "source": None if row.get("source") is None else str(row["source"]),
            **{side: row[side] for side in _SIDES},
        }
        for number, row in enumerate(rows)
    ]
    return DPOTrainer(
        model=model,  # pyright: ignore[reportArgumentType]
        ref_model=reference,  # pyright: ignore[reportArgumentType]
        args=settings, train_dataset=datasets.Dataset.from_list(named), processing_class=tokenizer,
    )  # fmt: skip


def _settings(options: argparse.Namespace, folder: str) -> DPOConfig:
    return DPOConfig(
        folder, learning_rate=options.learning_rate, num_train_epochs=options.epochs, beta=options.beta,
        per_device_train_batch_size=options.batch_size, bf16=False, activation_checkpointing=False, save_strategy="no",
        report_to="none", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


def _wish(options: argparse.Namespace, names: Sequence[str]) -> Wish | None:
    below, above = (dict(_bound(given) for given in some or ()) for some in (options.keep_below, options.keep_above))
    if below or above:
        return Wish.of(names, below, above, None, options.drop_at_most)
    if options.out:
        raise ConfigurationError(
            "--out needs to know what the data should not do.", fix="--keep-below BEHAVIOR=VALUE or --keep-above."
        )
    return None


def _bound(given: str) -> tuple[str, float]:
    name, _, value = given.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigurationError(f"'{given}' is not BEHAVIOR=VALUE.", fix="--keep-below flattery=0.02") from None
