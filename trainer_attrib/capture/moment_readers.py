"""Registry of the optimizers whose second moments can be read: what the step just executed divided its update by.

An optimizer is known by its class, never by the names in its state: the same key means another thing elsewhere (8-bit
codes, lazily updated rows, sums instead of means), and a wrong reading is worse than raw rows with a reason. A subclass
is known through its base class unless it brings its own ``step``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop


@dataclass(frozen=True)
class Factored:
    """A second moment that the optimizer itself keeps as row means [R] and column means [C]."""

    rows: Tensor
    columns: Tensor


Moment = Tensor | Factored
Reader = Callable[[Mapping[str, Any], Mapping[str, Any]], Moment | None]
"""(state of one parameter, its group) -> what the step divided by the root of; None where it did not divide yet."""

_READERS: dict[str, Reader] = {}
_WITHOUT: dict[str, str] = {}


def register_moments(optimizer: type | str, reader: Reader) -> None:
    """Teach the recorder an optimizer, given as a class or as its qualified name (so that nothing needs importing).

    The reader returns a tensor shaped like the parameter, corrected for its bias as the step does it, or
    :class:`Factored` for a matrix. It may raise ``KeyError`` where the state is not what it expects.
    """
    _READERS[optimizer if isinstance(optimizer, str) else _qualified(optimizer)] = reader


def correction_unavailable(optimizer: Optimizer) -> str:
    """Why this optimizer's second moments cannot be used, or ``""``. Raw rows are stored where there is a reason."""
    name, known = type(optimizer).__name__, _known_as(optimizer)
    if known in _READERS:
        return ""
    if known in _WITHOUT:
        return f"{name} keeps no second moments: {_WITHOUT[known]}; rows are raw gradients"
    if "8bit" in name or "4bit" in name or _qualified(type(optimizer)).startswith("bitsandbytes."):
        return f"{name} keeps its second moments in a packed form that is not read; rows are raw gradients"
    return (
        f"{name} is not an optimizer whose state is known; rows are raw gradients. If it divides by second moments, "
        "register a reader of them (docs/extending.md)"
    )


def second_moment(optimizer: Optimizer, parameter: Tensor) -> Moment | None:
    """What the step just executed divided this parameter's update by the root of; None before its first update.

    Raises:
        KeyError: the state lacks what the optimizer's reader expects.
    """
    reader, state = _READERS.get(_known_as(optimizer)), optimizer.state.get(parameter)
    if reader is None or not state:
        return None
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    return reader(state, group)


def overwrites_gradients(optimizer: Optimizer) -> bool:
    """Whether ``step`` leaves something else in ``.grad``: schedule-free optimizers divide it in place (1.4)."""
    return any(base.__module__.split(".")[0] == "schedulefree" for base in type(optimizer).__mro__)


def _known_as(optimizer: Optimizer) -> str:
    """Name of the nearest registered class whose ``step`` the optimizer runs, or ``""``."""
    kind = type(optimizer)
    for base in kind.__mro__:
        name = _qualified(base)
        if name in _READERS or name in _WITHOUT:
            return name if inspect.unwrap(kind.step) is inspect.unwrap(base.step) else ""
    return ""


def _qualified(optimizer: type) -> str:
    return f"{optimizer.__module__}.{optimizer.__qualname__}"


def _adam(state: Mapping[str, Any], group: Mapping[str, Any]) -> Moment:
    """v / (1 - beta2^t) (Kingma & Ba 2015, algorithm 1), with the running maximum of v for amsgrad (Reddi et al. 2018,
    algorithm 2). NAdam (Dozat 2016) divides by the same; its momentum schedule is part of the numerator."""
    moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return moment / _unbiased(group, state["step"])


def _radam(state: Mapping[str, Any], group: Mapping[str, Any]) -> Moment | None:
    """v / (1 - beta2^t) once the rectification allows dividing by it, rho_t > 5 (Liu et al. 2020, algorithm 2, with
    torch's bound). Ignored: the rectification r_t, one number per step that all weights share."""
    beta2, step = float(group["betas"][1]), float(state["step"])
    rho = 2 / (1 - beta2) - 1 - 2 * step * beta2**step / (1 - beta2**step)
    return state["exp_avg_sq"] / _unbiased(group, step) if rho > 5 else None


def _rmsprop(state: Mapping[str, Any], group: Mapping[str, Any]) -> Moment:
    """Mean of squares, not corrected for its bias as the step does not either (Tieleman & Hinton 2012, lecture 6.5).
    Centered, the step divides by the variance instead (Graves 2013, equation 39), which rounding may leave below 0."""
    if not group.get("centered"):
        return state["square_avg"]
    return (state["square_avg"] - state["grad_avg"].square()).clamp_min(0)


def _adagrad(state: Mapping[str, Any], group: Mapping[str, Any]) -> Moment:
    """Sum of squares since the first step (Duchi et al. 2011, figure 1). Ignored: ``lr_decay``, one number per step."""
    return state["sum"]


def _torch_adafactor(state: Mapping[str, Any], group: Mapping[str, Any]) -> Moment:
    """Row and column means (Shazeer & Stern 2018, algorithm 4): their decay 1 - t^-0.8 is 0 at t = 1, so there is no
    bias to correct. Vectors are kept whole. Ignored: update clipping and the relative step size, numbers per step."""
    if "variance" in state:
        return state["variance"]
    return _factored(state["row_var"].squeeze(-1), state["col_var"].squeeze(-2))


def _hf_adafactor(state: Mapping[str, Any], group: Mapping[str, Any]) -> Moment:
    """As torch's, under the names of ``transformers.optimization``."""
    if "exp_avg_sq" in state:
        return state["exp_avg_sq"]
    return _factored(state["exp_avg_sq_row"], state["exp_avg_sq_col"])


def _factored(rows: Tensor, columns: Tensor) -> Moment:
    """A matrix's means as they are; a convolution's, kept per pair of channels over the kernel, multiplied out."""
    if rows.dim() == 1:
        return Factored(rows, columns)
    mean = rows.mean(-1, keepdim=True).unsqueeze(-1)
    return rows.unsqueeze(-1) * columns.unsqueeze(-2) / mean.clamp_min(torch.finfo(mean.dtype).tiny)


def _schedule_free_adamw(state: Mapping[str, Any], group: Mapping[str, Any]) -> Moment:
    """v / (1 - beta2^k) (Defazio et al. 2024, algorithm 1); the count of steps ``k`` is the group's."""
    return state["exp_avg_sq"] / _unbiased(group, group["k"])


def _unbiased(group: Mapping[str, Any], step: Any) -> float:
    return 1 - float(group["betas"][1]) ** float(step)


for _optimizer in (Adam, AdamW, NAdam):
    register_moments(_optimizer, _adam)
register_moments(RAdam, _radam)
register_moments(RMSprop, _rmsprop)
register_moments(Adagrad, _adagrad)
register_moments(Adafactor, _torch_adafactor)
register_moments("transformers.optimization.Adafactor", _hf_adafactor)
register_moments("schedulefree.adamw_schedulefree.AdamWScheduleFree", _schedule_free_adamw)
_WITHOUT |= {
    "torch.optim.sgd.SGD": "its update is the gradient or its momentum",
    "schedulefree.sgd_schedulefree.SGDScheduleFree": "its update is the gradient",
    "torch.optim.Muon": "it makes its momentum orthogonal",
    "torch.optim._muon.Muon": "it makes its momentum orthogonal",
    "lion_pytorch.lion_pytorch.Lion": "its update is a sign",
    "bitsandbytes.optim.lion.Lion": "its update is a sign",
}
