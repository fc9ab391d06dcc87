"""Drives ``transformers.Trainer`` and every TRL trainer one optimizer step at a time, without letting it train."""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trainer_attrib.analysis.programs import Step
from trainer_attrib.analysis.thinning import Thinning, windows
from trainer_attrib.errors import ConfigurationError, MissingExtraError

try:
    from transformers import Trainer, trainer_utils
except ImportError as error:
    raise MissingExtraError("transformers", "huggingface") from error

from trainer_attrib_integrations.training_step import loss_of_training_step


class TrainerSteps:
    """The steps of a Trainer: its data, its losses, its clipping; no optimizer step, callback, log or checkpoint.

    Losses are what the trainer's own ``training_step`` hands to ``accelerator.backward``, so that overridden losses,
    autocast and the division by the accumulated micro-batches are the trainer's. What only callbacks or evaluation
    would do during training is not done, and activation checkpointing is not switched on where it was off: gradients
    are the same without it.

    Args:
        trainer: as a program made it.

    Raises:
        ConfigurationError: its training depends on what cannot be driven from outside.
    """

    def __init__(self, trainer: Trainer) -> None:
        _refuse_what_cannot_be_driven(trainer)
        self.trainer: Any = trainer
        self.model: Any = trainer.model
        self._given: Any = trainer.optimizer  # by the user, to the constructor
        while hasattr(self._given, "optimizer"):  # accelerate's wrapper, once the trainer has trained
            self._given = self._given.optimizer

    def steps(self, thin: int = 1) -> Iterator[Step]:
        """The trainer's batches, without end; see :class:`~trainer_attrib.analysis.programs.Steps`.

        Rollouts are generated from the weights at a micro-batch's first evaluation, which must come in the order of
        training; later ones reuse them. They are not thinned, because their rewards are compared within a batch.
        Where a stream ends in mid-step, a model with dropout draws other random numbers than in training.
        """
        trainer, accumulate = self.trainer, self.trainer.args.gradient_accumulation_steps
        thinning = Thinning(1 if hasattr(trainer, "num_generations") else thin, accumulate)
        trainer.accelerator.free_memory()
        loader: Any = self._loader(thinning)
        model = self.prepared()
        length = length_of(loader)
        batches_in_epoch = self.announce(length)
        taken, waiting = 0, []
        for epoch in itertools.count():
            before = taken
            thinning.begin(epoch)
            _set_epoch(loader, epoch)
            for number, window in enumerate(windows(loader, accumulate, length)):
                kept, share = thinning.keep(window)
                batches, items = trainer.get_batch_samples(iter(kept), len(kept), trainer.args.device)
                facts = {"global_step": taken, "epoch": epoch + number * accumulate / batches_in_epoch}
                waiting += [MicroBatch(trainer, model, batch, items, len(batches), facts) for batch in batches]
                if length is None and len(window) < accumulate:
                    continue  # where a stream ends in mid-step, the Trainer keeps the gradients for the next epoch's
                yield Step(waiting, share)
                taken, waiting = taken + 1, []
            if taken == before:
                return

    def clip(self) -> None:
        """Clip the gradients to ``max_grad_norm``."""
        if self.trainer.args.max_grad_norm and self.trainer.args.max_grad_norm > 0:
            self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)

    def optimizer(self) -> Optimizer:
        """A new optimizer, ready to step; the trainer's own stays as it is."""
        if self._given is not None:
            made = copy.copy(self._given)
            made.state = defaultdict(dict)
            made.param_groups = [dict(group) for group in self._given.param_groups]
        else:
            before, self.trainer.optimizer = self.trainer.optimizer, None
            try:
                made = self.trainer.create_optimizer()
            finally:
                self.trainer.optimizer = before
        if callable(begin := getattr(made, "train", None)):  # schedule-free optimizers have two sets of weights
            begin()
        return made

    def _loader(self, thinning: Thinning) -> Any:
        loader: Any = self.trainer.get_train_dataloader()
        inner = loader
        while hasattr(inner, "base_dataloader"):  # accelerate's shard around the Trainer's loader
            inner = inner.base_dataloader
        if thinning.thin > 1:
            inner.collate_fn = thinning.collator(inner)
        return loader

    def prepared(self) -> Any:
        """The model as the Trainer would compute with it: on its device, under autocast."""
        trainer = self.trainer
        if hasattr(trainer.model, "config") and hasattr(trainer.processing_class, "pad_token_id"):
            trainer_utils.align_special_tokens(trainer.model, trainer.processing_class)
        return trainer.accelerator.prepare(trainer.model)

    def announce(self, length: int | None) -> int:
        """Put into the trainer's state what losses may read there; returns how many batches an epoch has."""
        args, state = self.trainer.args, self.trainer.state
        most = max(args.max_steps, 1)
        steps = most if length is None else max(math.ceil(length / args.gradient_accumulation_steps), 1)
        state.max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
        state.num_train_epochs = math.ceil(state.max_steps / steps)
        return most * args.gradient_accumulation_steps if length is None else length


class MicroBatch:
    """Computes one micro-batch's loss as ``training_step`` would, as often as it is called.

    Args:
        trainer: whose loss it is.
        model: prepared.
        batch: not yet prepared.
        items: ``num_items_in_batch`` of the step.
        count: micro-batches of the step.
        facts: what the trainer's state says during the step.
    """

    def __init__(self, trainer: Trainer, model: Any, batch: Any, items: Any, count: int, facts: dict[str, Any]) -> None:
        self._trainer, self._model, self._batch, self._items = trainer, model, batch, items
        self._count, self._facts = count, facts
        self._inputs: Any = None

    def __call__(self) -> Tensor:
        """The loss, 0-dim, with its gradient."""
        trainer: Any = self._trainer
        again = self._inputs is not None
        trainer.current_gradient_accumulation_steps = self._count
        for name, value in self._facts.items():
            setattr(trainer.state, name, value)
        counted = getattr(trainer, "_step", None)  # by trainers of rollouts, who generate at some of these
        prepare = self._prepare(trainer._prepare_inputs)
        loss = loss_of_training_step(trainer, trainer.training_step, self._model, self._batch, self._items, prepare)
        if again and counted is not None:
            trainer._step = counted
        _forget_metrics(trainer)
        return loss

    def _prepare(self, prepare: Any) -> Any:
        def prepared(batch: Any) -> Any:
            if self._inputs is None:
                self._inputs = prepare(batch)
            return copy.copy(self._inputs)  # losses take labels out of it

        return prepared


def _forget_metrics(trainer: Any) -> None:
    """TRL gathers numbers of every micro-batch for its next log, which never comes."""
    metrics = getattr(trainer, "_metrics", None)
    for numbers in metrics.values() if isinstance(metrics, dict) else ():
        numbers.clear()


def length_of(loader: Any) -> int | None:
    """How many batches a loader has; None where a stream does not tell."""
    return len(loader) if trainer_utils.has_length(loader) else None


def _set_epoch(loader: Any, epoch: int) -> None:
    """As the Trainer does: accelerate's loader does not tell a batch sampler that it wrapped."""
    inner = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    for owner in (loader, inner):
        if callable(tell := getattr(owner, "set_epoch", None)):
            tell(epoch)


def _refuse_what_cannot_be_driven(trainer: Any) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    reasons = {
        "fp16 training scales its losses and leaves steps out": accelerator.scaler is not None,
        "it trains on several devices or processes": args.n_gpu > 1 or args.world_size > 1,
        "DeepSpeed keeps the gradients": bool(args.deepspeed),
        "compiled code cannot be differentiated twice": bool(args.torch_compile),
        "a fused kernel would replace layers of the model": bool(args.use_liger_kernel),
        "model_init makes a model other than the program's": trainer.model_init is not None,
        "NEFTune draws noise for every batch": bool(trainer.neftune_noise_alpha),
        "the reference model is moved during training": bool(getattr(args, "sync_ref_model", False)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigurationError(
                f"This {type(trainer).__name__} cannot be driven step by step: {reason}.",
                fix="let the program make its trainer without this (bf16 for fp16, one process, no compilation), or "
                "use a method that trains the stage as a whole.",
            )


def steps_of(trainer: Trainer) -> TrainerSteps:
    """Drive a Trainer step by step; see :class:`TrainerSteps`."""
    return TrainerSteps(trainer)
