"""A plain training loop as a program's answer: it trains by itself, and can be driven step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from trainer_attrib.analysis.programs import Loss, Step
from trainer_attrib.analysis.thinning import Thinning, windows
from trainer_attrib.errors import ConfigurationError


@dataclass
class Loop:
    """A plain loop: ``programs={"sft": lambda model: Loop(model, loss, loader, make_optimizer, total_steps=100)}``.

    The model trains in the mode in which it is given. Nothing is drawn at random beside what ``batches`` and ``loss``
    draw.

    Args:
        model: that the program was given.
        loss: ``(model, batch)`` -> the batch's mean loss, 0-dim.
        batches: a ``DataLoader``, or anything else that can be iterated over again and again; begun anew when it ends.
        make_optimizer: ``model`` -> its optimizer.
        total_steps: how many optimizer steps :meth:`train` takes.
        accumulate: micro-batches of a step, of whose losses it takes the mean; an epoch's last step may have fewer.
        max_norm: gradients are clipped to this norm before a step.
        make_schedule: ``optimizer`` -> its learning rate schedule, advanced after every step of :meth:`train`. Whoever
            drives the steps has the recorded learning rates instead.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    batches: Iterable[Any]
    make_optimizer: Callable[[Any], Optimizer]
    total_steps: int
    accumulate: int = 1
    max_norm: float | None = None
    make_schedule: Callable[[Optimizer], Any] | None = None

    def train(self) -> None:
        """Train the model."""
        optimizer = self.optimizer()
        schedule = None if self.make_schedule is None else self.make_schedule(optimizer)
        for _, step in zip(range(self.total_steps), self.steps(), strict=False):
            optimizer.zero_grad()
            for loss in step.losses:
                loss().backward()
            self.clip()
            optimizer.step()
            if schedule is not None:
                schedule.step()

    def steps(self, thin: int = 1) -> Iterator[Step]:
        """The loop's batches, without end; see :class:`~trainer_attrib.analysis.programs.Steps`.

        Rows of ready batches are cut as :func:`~trainer_attrib.analysis.thinning.thin_rows` says.

        Raises:
            ConfigurationError: the batches cannot be iterated over again.
        """
        thinning, taken, epoch = Thinning(thin, self.accumulate), 0, 0
        batches = thinning.of(self.batches)
        while True:
            before = taken
            thinning.begin(epoch)
            set_epoch(batches, epoch)
            for window in windows(batches, self.accumulate):
                kept, share = thinning.keep(window)
                yield Step([self._loss_of(batch, len(kept)) for batch in kept], share)
                taken += 1
            epoch += 1
            if taken == before:
                raise ConfigurationError(
                    f"The batches ended after {taken} steps and gave none when they were begun anew.",
                    cause="a generator can be read only once, or there are no batches.",
                    fix="pass a DataLoader, a list, or an object whose __iter__ begins anew.",
                )

    def clip(self) -> None:
        """Clip the gradients to ``max_norm``."""
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)

    def optimizer(self) -> Optimizer:
        """A new optimizer."""
        return self.make_optimizer(self.model)

    def _loss_of(self, batch: Any, count: int) -> Loss:
        return lambda: self.loss(self.model, batch) / count


def set_epoch(batches: Any, epoch: int) -> None:
    """Tell the samplers that shuffle by the epoch's number (those for several processes do) which one begins."""
    if isinstance(batches, DataLoader):
        for sampler in (batches.sampler, getattr(batches.batch_sampler, "sampler", None)):
            if callable(tell := getattr(sampler, "set_epoch", None)):
                tell(epoch)
