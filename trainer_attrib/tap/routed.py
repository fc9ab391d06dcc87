"""Finds the products of routed tokens with their experts while a module's own forward runs.

Nothing is replaced: a torch function mode sees each call after it was made. Which token a row of a product is follows
from how it was gathered, as what is done to the tokens is done to the numbers of their examples as well. The gradient
of a product is projected by the same call with the projection in the stack's place: an expert picked from the stack is
picked from the projection too, whether experts run one by one, in groups or in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

_PICKS = {Tensor.__getitem__, torch.transpose, Tensor.transpose}
_GATHERS = {Tensor.__getitem__, Tensor.repeat_interleave, torch.repeat_interleave}
_FLATTENS = {Tensor.reshape, Tensor.view, torch.reshape}
_KEEPS_ROWS = {Tensor.to, Tensor.contiguous, Tensor.unsqueeze}
_GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}


class Stack(NamedTuple):
    """What stands for a parameter, or for the experts picked from it."""

    name: str
    held: Tensor  # so that no other tensor gets its id
    projection: Tensor  # of the output's side, laid out like the parameter
    picked: Any = None  # the index that picked it


class Product(NamedTuple):
    """One product of tokens with experts."""

    stack: str
    x: Tensor  # [P, in]
    owner: Tensor  # [P], the example of each row
    output: Tensor
    project: Callable[[Tensor], Tensor]  # gradient of the output -> [P, K]


class RoutedProducts(TorchFunctionMode):
    """Reports the products of ``stacks`` with tokens, between ``__enter__`` and :meth:`leave`.

    Args:
        module: whose forward runs.
        tokens: [T, H] or [B, S, H].
        owner_T: the example of each token.
        stacks: the parameters to watch.
        found: called with every product.
        skipped: where a stack that cannot be followed is to be told, with why.
        on_fault: called with any exception raised here.
    """

    def __init__(
        self,
        module: nn.Module,
        tokens: Tensor,
        owner_T: Tensor,
        stacks: list[Stack],
        found: Callable[[Product], None],
        skipped: dict[str, str],
        on_fault: Callable[[Exception], None],
    ) -> None:
        super().__init__()
        self.module = module
        self._found, self._skipped, self._on_fault = found, skipped, on_fault
        self._stacks = {id(stack.held): stack for stack in stacks}
        self._tokens = {id(tokens): (tokens, owner_T)}
        self._last: tuple[Any, Tensor] | None = None  # who was routed to the experts last, and the rows' examples
        self._unseen = {stack.name for stack in stacks}

    def leave(self) -> None:
        """Stop looking. Stacks without a product were used out of sight, by a kernel of its own."""
        self._skipped |= dict.fromkeys(self._unseen - self._skipped.keys(), "no product of its experts was seen")
        self._stacks.clear()
        self._tokens.clear()
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The call itself, then a look at it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            try:
                with torch.no_grad():
                    self._look(func, args, kwargs, result)
            except Exception as fault:
                self._on_fault(fault)
        return result

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> None:
        at = next((i for i, value in enumerate(args) if id(value) in self._stacks), None)
        if at is None:
            if args and id(args[0]) in self._tokens and func in _GATHERS | _FLATTENS | _KEEPS_ROWS:
                self._follow(func, args, kwargs, result)
            return
        stack = self._stacks[id(args[at])]
        if at == 0 and func in _PICKS:
            picked = args[1] if func is Tensor.__getitem__ else stack.picked
            projection = _picked(func, stack.projection, args[1:], kwargs)
            self._stacks[id(result)] = Stack(stack.name, result, projection, picked)
        elif (x := _multiplied(func, args, at)) is None:
            self._skipped[stack.name] = f"its experts run through {getattr(func, '__name__', func)}, which is not known"
        else:
            self._multiply(func, args, kwargs, result, stack, at, x)

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> None:
        """A gather of tokens gathers their examples."""
        tokens, owner_T = self._tokens[id(args[0])]
        if func in _FLATTENS or func in _KEEPS_ROWS:
            axis = -1 if func in _FLATTENS else 0
            if result.shape[axis] == tokens.shape[axis]:
                self._tokens[id(result)] = (result, owner_T)
        elif tokens.dim() == 2 and (func is not Tensor.__getitem__ or _is_list(args[1])):
            self._tokens[id(result)] = (result, func(owner_T, *args[1:], **kwargs))

    def _multiply(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Tensor,
        stack: Stack,
        at: int,
        x: Tensor,
    ) -> None:
        offsets = kwargs.get("offs", args[2] if len(args) > 2 and at == 1 else None)
        routed = stack.picked if offsets is None else offsets
        x_PI = x.squeeze(-1) if at == 0 else x.reshape(-1, x.shape[-1])
        owner_P = self._owners(x, routed)
        if owner_P is None or len(owner_P) != len(x_PI):
            self._skipped[stack.name] = "the tokens of a product cannot be told apart"
            return
        self._last = (routed, owner_P)
        projection = stack.projection

        def project(gradient: Tensor) -> Tensor:
            gradient = gradient.to(projection.dtype).contiguous()
            pair = (projection, gradient) if at == 0 else (gradient, projection)
            rest = {} if offsets is None else {"offs": offsets}
            return func(*pair, **rest).reshape(len(owner_P), -1)

        self._unseen.discard(stack.name)
        self._found(Product(stack.name, x_PI, owner_P, result, project))

    def _owners(self, x: Tensor, routed: Any) -> Tensor | None:
        """Of tokens, known; of what was made of them, those of the product before, if it had the same experts."""
        if id(x) in self._tokens:
            return self._tokens[id(x)][1]
        return self._last[1] if self._last is not None and routed is not None and self._last[0] is routed else None


def _is_list(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dim() == 1


def _picked(func: Any, projection: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The same part of the projection; an index that lies on the device is not waited for."""
    if func is Tensor.__getitem__ and isinstance(args[0], Tensor) and args[0].dim() == 0:
        return projection.index_select(0, args[0].reshape(1)).squeeze(0)
    return func(projection, *args, **kwargs)


def _multiplied(func: Any, args: tuple[Any, ...], at: int) -> Tensor | None:
    """The tokens of a known product, else None."""
    if func is torch.bmm and at == 0:
        return args[1] if args[1].shape[-1] == 1 else None
    linear = func is F.linear and len(args) == 2
    if at == 1 and (linear or getattr(func, "__name__", "").split(".")[0] in _GROUPED):
        return args[0]
    return None
