"""Runners by name."""

from __future__ import annotations

from trainer_attrib.errors import ConfigurationError
from trainer_attrib.execution.runner import Runner, Serial


def runner_of(runner: str | Runner) -> Runner:
    """A runner by name: ``"serial"``, ``"torchrun"`` or ``"ray"``; or the runner itself.

    Raises:
        ConfigurationError: an unknown name, or ``"torchrun"`` in a process that torchrun did not start.
        MissingExtraError: ``"ray"`` without the extra ``ray``.
    """
    if not isinstance(runner, str):
        return runner
    if runner == "serial":
        return Serial()
    if runner == "torchrun":
        from trainer_attrib.execution.torchrun import Torchrun  # loads torch.distributed

        return Torchrun()
    if runner == "ray":
        from trainer_attrib.execution.ray_actors import Ray

        return Ray()
    raise ConfigurationError(f"Unknown runner {runner!r}.", fix="use 'serial', 'torchrun' or 'ray'.")
