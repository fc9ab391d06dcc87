"""Hooks as they are hung on modules: what copies, pickles and compilers of the model may do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


class Unwatched:
    """A hook that stays behind: deep copies and pickles of the model carry one that does nothing.

    Training code copies its model for an average of the weights or pickles it whole; neither may fail on what the
    hooks hold, nor may the copy's passes be recorded.
    """

    def __init__(self, hook: Callable[..., Tensor | None]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Call the hook."""
        return self._hook(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Unwatched, (_nothing,)


class Untraced(Unwatched):
    """A hook that leaves compiled graphs as they are: it does nothing where dynamo traces through it.

    A compiled module's own hooks run outside its graph, but where dynamo compiles every frame that it meets. So this
    frame is passed over, and what it calls is none of dynamo's business.
    """

    def __init__(self, hook: Callable[..., None]) -> None:
        from torch._dynamo.eval_frame import skip_code  # imports dynamo, as every optimizer does

        super().__init__(cast(Callable[..., None], torch.compiler.disable(hook)))
        skip_code(Untraced.__call__.__code__)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the hook, unless this is being traced."""
        if not torch.compiler.is_compiling():
            self._hook(*args, **kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
