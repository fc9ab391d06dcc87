"""Shadows: weights as they would be without an earlier stage, trained along with the stage that is being recorded.

Per step, on a part of its batch, gradients are computed at the model's weights and at the shadow's, with the same
random numbers. By how much the part errs at the model's weights is known, and what of it is in the shadow's gradient
too is taken out (``control.py``), so that a small part does; with the whole batch the shadow is the training without
the earlier stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture.shadows.control import Compared, Control
from trainer_attrib.capture.shadows.origin import Origin
from trainer_attrib.capture.shadows.parts import PartLoss, Turns
from trainer_attrib.capture.shadows.same_gradients import Norms, clip_factor, clipping
from trainer_attrib.capture.shadows.second_pass import Surroundings, gradients, random_kept, weights_at
from trainer_attrib.capture.shadows.twin import Twin, initial_state
from trainer_attrib.errors import CaptureError
from trainer_attrib.ledger.shadowed import nested
from trainer_attrib.types import Shadow


@dataclass(frozen=True)
class Trained:
    """What training has: all shadows of a stage share it.

    Args:
        model: being trained.
        parameters: all of its parameters, by name.
        updated: those that the optimizer updates.
        optimizer: the only one.
        surroundings: what passes must leave alone.
        companions: parameters of other models that hold the weights that the stage began with, and their names: a
            reference model's, which without the earlier stage would be another one too.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    updated: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    surroundings: Surroundings
    companions: Sequence[tuple[str, nn.Parameter]] = ()

    @property
    def devices(self) -> set[torch.device]:
        """Where the weights are."""
        return {parameter.device for parameter in self.parameters.values()}


class Replica:
    """One shadow: its weights, buffers and optimizer."""

    def __init__(self, asked: Shadow, number: int, trained: Trained, origin: Origin, *, carries: bool) -> None:
        self.asked, self.number, self.trained = asked, number, trained
        self.status, self.reason = "recording", ""
        self.steps = self.used = self.seen = 0
        own = {name: self._placed(value, trained.parameters[name]) for name, value in origin.weights.items()}
        for name, parameter in trained.updated.items():
            own.setdefault(name, self._placed(parameter.data, parameter))
        self.twin = Twin(trained.optimizer, {name: own[name] for name in trained.updated}, trained.updated)
        self._still = {name: value for name, value in own.items() if name not in trained.updated}
        self._companions = [
            (parameter, self._placed(origin.weights[name], parameter))
            for name, parameter in trained.companions
            if name in origin.weights
        ]
        state = origin.state if carries else initial_state(trained.optimizer, trained.updated)
        self.twin.load(state, trained.optimizer, trained.updated)
        self.buffers = trained.surroundings.buffers()
        self.buffers |= {n: b.to(self.buffers[n].device) for n, b in origin.buffers.items() if n in self.buffers}
        self._control = Control()
        self._sums = Compared({}, {})  # over the step's micro-batches so far
        self._last: Compared | None = None
        self._compared = 0

    @property
    def weights(self) -> dict[str, Tensor]:
        """All weights that may differ from the model's."""
        return {name: tensor.data for name, tensor in self.twin.tensors.items()} | self._still

    def compare(self, part: Any, count: int, loss: PartLoss, factual: dict[str, Tensor], scale: Tensor | None) -> None:
        """Add the gradient of a part of a micro-batch at the model's weights, and at the shadow's."""
        trained = self.trained
        values = [(trained.parameters[name], value) for name, value in self.weights.items()] + self._companions
        with trained.surroundings.guarded(self.buffers), weights_at(values):
            found = gradients(loss.loss_of, part, trained.updated, scale)
        if scale is not None and not all(bool(g.isfinite().all()) for g in (*factual.values(), *found.values())):
            return  # it overflowed on this part alone
        self.used += count
        self._compared += 1
        for sums, gradients_there in ((self._sums.factual, factual), (self._sums.shadow, found)):
            for name, gradient in gradients_there.items():
                wide = _wide(gradient).to(self._device(name))
                sums[name] = sums[name] + wide if name in sums else wide

    def step(self, micro_batches: int, norms: Norms, settings: Sequence[dict[str, Any]], *, compared: bool) -> None:
        """Follow the model's step; the gradients it used are in ``.grad``.

        Args:
            micro_batches: of the step.
            norms: of its clipping.
            settings: of the optimizer's groups.
            compared: whether the gradients were to be compared at this step.
        """
        fresh = compared and self._compared > 0
        if fresh:
            self._last = self._sums.times(micro_batches / self._compared)
        if self._last is None:
            raise CaptureError(
                "No loss was computed again for the first step.",
                cause="the loop does not say how its loss is computed, steps before the block ends, or has fewer "
                "examples in a step than there are replicas.",
                fix="with recorder.batch(loss=..., of=batch): around the forward and backward pass.",
            )
        self.forget()
        clipped = clipping(norms)
        used = {name: p.grad for name, p in self.trained.updated.items() if p.grad is not None}
        whole = {}
        for name, gradient in used.items():
            before = _wide(gradient) if clipped is None else _wide(gradient) / clipped[0].to(gradient.device)
            whole[name] = before.to(self._device(name))
        own = self._control.applied(self._last, whole, learn=fresh)
        if clipped is not None and own:
            norm = torch.nn.utils.get_total_norm(list(own.values()))
            factor = clip_factor(norm, clipped[1])
            own = {name: gradient * factor.to(gradient.device) for name, gradient in own.items()}
        own = {name: gradient.to(used[name].dtype) for name, gradient in own.items()}
        with random_kept(self.trained.devices):  # rounding may be drawn
            self.twin.step(own, settings)
        self.steps += 1

    def forget(self) -> None:
        """What was compared since the last step is of no use."""
        self._sums, self._compared = Compared({}, {}), 0

    def drop(self, reason: str) -> None:
        """Go on without this shadow; its memory is freed."""
        self.status, self.reason = "incomplete", reason
        self.forget()
        self._last = None
        self.buffers, self._still, self._companions = {}, {}, []
        del self.twin

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def entry(self, broken: str) -> dict[str, Any]:
        """What ``stage.json`` says of it; ``broken``: why the stage broke off, if it did."""
        status, reason = self.status, self.reason
        if broken and status == "recording":
            status, reason = "incomplete", broken
        share = self.used / self.seen if self.seen else None
        return {
            "of": self.asked.of, "replica": self.number, "thin": self.asked.thin, "every": self.asked.every,
            "steps": self.steps, "share": share, "status": status, "reason": reason,
        }  # fmt: skip

    def stored(self, persistent: set[str]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        """Weights, buffers and optimizer state for the stage's end; what of the state cannot be stored."""
        state, left_out = self.twin.state()
        buffers = {name: buffer for name, buffer in self.buffers.items() if name in persistent}
        return {"weights": self.weights, "buffers": buffers, "optimizer": state}, left_out

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that a resumed stage needs to go on with it."""
        state, left_out = self.twin.state()
        last = self._last if self.asked.every > 1 and self._last else Compared({}, {})
        parts = {"weights": self.weights, "buffers": self.buffers, "optimizer": state}
        parts |= {"last-factual": last.factual, "last-shadow": last.shadow, "control": self._control.sums}
        tensors = {f"{kind}/{name}": value for kind, values in parts.items() for name, value in values.items()}
        counts = {"of": self.asked.of, "replica": self.number, "steps": self.steps, "used": self.used}
        return counts | {"seen": self.seen, "left_out": left_out}, tensors

    def load(self, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        parts: dict[str, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            kind, _, name = path.partition("/")
            parts.setdefault(kind, {})[name] = value
        for name, value in self.weights.items():
            value.copy_(parts["weights"][name])
        for name, value in parts.get("buffers", {}).items():
            self.buffers[name] = value.to(self.buffers[name].device if name in self.buffers else "cpu")
        last = [
            {name: value.to(self._device(name)) for name, value in parts.get(kind, {}).items()}
            for kind in ("last-factual", "last-shadow")
        ]
        self._last = Compared(*last) if any(last) else None
        self._control.sums.update(parts["control"])
        state = nested(parts.get("optimizer", {})).get(0, {})
        self.twin.load(state, self.trained.optimizer, self.trained.updated)
        self.steps, self.used, self.seen = (entry[key] for key in ("steps", "used", "seen"))

    @property
    def bytes(self) -> int:
        """Memory that it takes: weights, optimizer state, the two gradients compared last."""
        weights = sum(value.nbytes for value in self.weights.values())
        trained = sum(tensor.nbytes for tensor in self.twin.tensors.values())
        kept = max((2 if "betas" in g else bool(g.get("momentum"))) for g in self.trained.optimizer.param_groups)
        return weights + (kept + 2) * trained + sum(value.nbytes for _, value in self._companions)

    # ---- places -----------------------------------------------------------------------------------------------------

    def _placed(self, value: Tensor, like: nn.Parameter) -> Tensor:
        return value.detach().to(self.asked.device or like.device, like.dtype, copy=True)

    def _device(self, name: str) -> torch.device:
        return self.twin.tensors[name].device


@dataclass
class Team:
    """The replicas of one asked shadow, and which examples they take."""

    asked: Shadow
    replicas: list[Replica]
    turns: Turns = field(init=False)

    def __post_init__(self) -> None:
        self.turns = Turns(self.asked.thin * self.asked.replicas, self.asked.replicas)

    def live(self) -> list[Replica]:
        """Those that were not dropped."""
        return [replica for replica in self.replicas if replica.status == "recording"]

    def due(self, step: int) -> bool:
        """Whether gradients are compared at the step after this one."""
        return step % self.asked.every == 0


def factual_gradients(trained: Trained, loss: PartLoss, part: Any, scale: Tensor | None) -> dict[str, Tensor]:
    """The gradient of a part at the model's weights."""
    with trained.surroundings.guarded():
        return gradients(loss.loss_of, part, trained.updated, scale)


def _wide(gradient: Any) -> Any:
    """Half precision in single, so that differences of gradients keep their digits."""
    return gradient.float() if gradient is not None and gradient.dtype in (torch.float16, torch.bfloat16) else gradient
