"""A Trainer that follows a plan for its data: weights, offsets, flips, left-out examples and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer_attrib.analysis.cleaning import Rows
from trainer_attrib.analysis.forecasting.plan import COLUMNS, Plan
from trainer_attrib.errors import ConfigurationError
from trainer_attrib_integrations.riding_ids import RidingIds
from trainer_attrib_integrations.wrapped import Wrapped

KEY = "trainer_attrib_planned"
_SIDES = (("chosen_ids", "rejected_ids"), ("ref_chosen_logps", "ref_rejected_logps"), ("chosen", "rejected"))
_OUTPUTS = ("log_probs", "logits")


class FollowedPlan:
    """Makes a trainer that has not begun follow a plan, until :meth:`remove`.

    Examples of weight 0 leave the data set, flipped ones change sides there. The gradients of the others' rows of the
    model's output are multiplied by their weights, which multiplies each example's loss, whatever the loss is; in the
    logs it stays unweighted. Offsets are added to the log-probability of the chosen answer, over beta. Tokens that are
    masked count neither for the model nor for its reference.

    Args:
        trainer: of preference pairs (TRL's DPO); of anything else if the plan only leaves examples out.
        plan: for its data set.
        id_column: that names its rows; a row without it is called by its number.

    Raises:
        ConfigurationError: the plan is for other data, or asks for what this trainer's loss cannot do.
        MissingDataError: rows of the data set are not in the plan.
    """

    def __init__(self, trainer: Any, plan: Plan, id_column: str = "id") -> None:
        dataset = trainer.train_dataset
        _refuse(trainer, plan)
        if len(dataset) != len(plan.ids):
            raise ConfigurationError(
                f"The plan is for {len(plan.ids)} examples; the trainer's data set has {len(dataset)}.",
                fix="apply the plan to the trainer that was forecast, or to one built in the same way.",
            )
        plan = plan.of_rows(Rows(dataset, id_column).ids)
        self._trainer, self._plan = trainer, plan
        self._kept = [number for number, dropped in enumerate(plan.dropped.tolist()) if not dropped]
        self._wrapped, self._rides = Wrapped(), list[RidingIds]()
        self._now: list[int] | None = None
        self._counted = True  # whether the last step's loss was computed from what was weighed
        self._hook: Any = None
        self._dataset = dataset
        if not self._kept:
            raise ConfigurationError("The plan leaves out every example.", fix="ask for less.")
        trainer.train_dataset = _arranged(dataset, plan, self._kept)
        kept = self._kept
        if plan.masked or bool((plan.offsets[kept] != 0).any()) or bool((plan.weights[kept] != 1).any()):
            self._loader, self._step = trainer.get_train_dataloader, trainer.training_step
            self._wrapped.put(trainer, "get_train_dataloader", self._named_loader)
            self._wrapped.put(trainer, "training_step", self._planned_step)
            self._hook = trainer.model.register_forward_hook(self._weigh)

    def remove(self) -> None:
        """Leave the trainer as it was; safe to call twice."""
        if self._hook is not None:
            self._hook.remove()
        for ride in self._rides:
            ride.remove()
        self._rides.clear()
        self._wrapped.remove()
        self._trainer.train_dataset = self._dataset

    def _named_loader(self, *args: Any, **kwargs: Any) -> Any:
        loader = self._loader(*args, **kwargs)
        ride = RidingIds(loader, self._kept, None, KEY)
        if not ride.install():
            raise ConfigurationError(
                "The loader's rows are not the data set's: a plan cannot be followed.",
                cause="the data are a stream, packed, or filtered by the trainer.",
                fix="use a plan that only leaves examples out (how='drop').",
            )
        self._rides.append(ride)
        return loader

    def _planned_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self._counted:
            raise _inside(model)
        inputs = dict(inputs)
        names, _ = RidingIds.take(inputs, KEY)
        self._now = None if names is None else [int(name) for name in names]
        if self._now is not None and self._plan.masked:
            inputs["completion_mask"] = self._unmasked(inputs["completion_mask"], self._now)
        return self._step(model, inputs, *args, **kwargs)

    def _unmasked(self, mask_BS: Tensor, numbers: Sequence[int]) -> Tensor:
        """[2B, S], chosen answers first."""
        mask_BS = mask_BS.clone()
        for place, number in enumerate(numbers):
            for row, tokens in zip((place, place + len(numbers)), self._plan.masked.get(number, ()), strict=False):
                answer = mask_BS[row].nonzero()[:, 0]
                mask_BS[row, answer[[token for token in tokens if token < len(answer)]]] = 0
        return mask_BS

    def _weigh(self, model: Any, inputs: Any, output: Any) -> None:
        if self._now is None or not torch.is_grad_enabled():
            return  # the reference model's pass, or someone else's
        name = next((n for n in _OUTPUTS if isinstance(getattr(output, n, None), Tensor)), None)
        if name is None:
            raise _inside(model)
        value: Tensor = getattr(output, name)
        if value.shape[0] % len(self._now) or not value.requires_grad:
            raise _inside(model)
        sides = value.shape[0] // len(self._now)
        weights = value.new_tensor(self._plan.weights[self._now]).repeat(sides)
        weights = weights.view(-1, *[1] * (value.dim() - 1))
        planned = weights * value + (1 - weights) * value.detach()
        offsets = self._plan.offsets[self._now]
        if (offsets != 0).any():
            added = torch.zeros_like(planned)
            added[: len(self._now), -1] = value.new_tensor(offsets / self._trainer.beta)
            planned = planned + added
        self._counted = False
        planned.register_hook(self._count)
        setattr(output, name, planned)

    def _count(self, gradient: Tensor) -> None:
        self._counted = True


def plan_of(dataset: Any, id_column: str = "id") -> Plan:
    """The plan in the columns of a data set, as ``Reshaping.columns`` wrote them.

    Raises:
        ConfigurationError: they are not there.
    """
    names = getattr(dataset, "column_names", None) or []
    if missing := [name for name in COLUMNS if name not in names]:
        raise ConfigurationError(
            f"The data set has no columns {missing}.", fix="write them by reshaping.columns(dataset), or pass a plan."
        )
    weights, offsets, flipped = (torch.tensor(list(dataset[name])).double().numpy() for name in COLUMNS[:3])
    masks = {number: tuple(tuple(side) for side in sides) for number, sides in enumerate(dataset["plan_mask"])}
    masked = {number: (sides[0], sides[1]) for number, sides in masks.items() if any(sides)}
    ids = Rows(dataset, id_column).ids
    return Plan(tuple(ids), weights, offsets, flipped.astype(bool), masked)


def _inside(model: Any) -> ConfigurationError:
    return ConfigurationError(
        f"The loss is not computed from outputs of {type(model).__name__} with a row for each example.",
        cause="the model computes the loss itself, as transformers' models do from labels.",
        fix="use a plan that only leaves examples out (how='drop').",
    )


def _refuse(trainer: Any, plan: Plan) -> None:
    pairs = "chosen_ids" in (getattr(trainer.train_dataset, "column_names", None) or [])
    reasons = {
        "flips need pairs of a chosen and a rejected answer": bool(plan.flipped.any()) and not pairs,
        "offsets need a preference loss with a beta": bool((plan.offsets != 0).any()) and not hasattr(trainer, "beta"),
        "tokens are masked for pairs": bool(plan.masked) and not pairs,
        "the reference's log-probabilities were computed before, of all tokens": bool(plan.masked)
        and bool(getattr(trainer, "precompute_ref_logps", False)),
        "its data set cannot be selected from": not hasattr(trainer.train_dataset, "select"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigurationError(
                f"This {type(trainer).__name__} cannot follow the plan: {reason}.",
                fix="reshape in another way (how='reweight' or 'drop').",
            )


def _arranged(dataset: Any, plan: Plan, kept: Sequence[int]) -> Any:
    if plan.flipped.any():
        pairs = [pair for pair in _SIDES if set(pair) <= set(dataset.column_names)]

        def flip(row: dict[str, Any], number: int) -> dict[str, Any]:
            if not plan.flipped[number]:
                return row
            return row | {a: row[b] for a, b in pairs} | {b: row[a] for a, b in pairs}

        dataset = dataset.map(flip, with_indices=True, load_from_cache_file=False)
    return dataset if len(kept) == len(dataset) else dataset.select(kept)
