"""What a shadow begins with: the weights, buffers and optimizer state that a stage would have begun with without an
earlier one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from trainer_attrib.errors import ConfigurationError, StageNotFoundError
from trainer_attrib.ledger.links import Link
from trainer_attrib.ledger.reader import Ledger, StageReader

_FOLLOWED = ("same", "adapter added", "weights added or replaced")


@dataclass(frozen=True)
class Origin:
    """The first values of a shadow, by name, on the CPU; what is not named is as in the model."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: Mapping[str, Mapping[str, Tensor]]


def find_origin(ledger: Ledger | None, link: Link, of: str, replica: int, parameters: Iterable[str]) -> Origin:
    """Where the shadow of a stage begins, in a stage that continues another.

    That is what the earlier stage began with if it is the parent, else where the shadow was at the parent's end.

    Args:
        ledger: None where nothing is recorded yet.
        link: of the new stage to its parent.
        of: the earlier stage.
        replica: number of the shadow.
        parameters: names of the model's weights. What the shadow has of others is gone from the model as well.

    Raises:
        ConfigurationError: the stage is no ancestor, its shadow was not trained along, or weights were changed between
            the stages in a way that cannot be done to the shadow as well.
    """
    if ledger is None or link.parent is None:
        raise ConfigurationError(
            f"shadow of '{of}': this stage continues no recorded stage"
            + (f": {link.reason}." if link.reason else "; its starting weights are not the end of any."),
            fix="record the earlier stages into the same ledger, and begin with the weights that they ended with.",
        )
    ancestry = {stage.name: stage for stage in ledger.ancestry(link.parent)}
    if of not in ancestry:
        raise ConfigurationError(
            f"shadow of '{of}': the stages before this one are {list(ancestry)}.",
            fix="name one of them.",
        )
    _check_followed(link, of)
    parent, names = ancestry[link.parent], set(parameters)
    found = _of_parent(parent) if parent.name == of else _of_shadow(parent, of, replica)
    if not found.weights:
        raise ConfigurationError(f"shadow of '{of}': it trained no weights.", fix="name another stage.")
    weights = {name: value for name, value in found.weights.items() if name in names}
    if not weights:
        raise ConfigurationError(
            f"shadow of '{of}': none of the weights that it trained are in the model any more.",
            fix="leave this shadow out: the stage has no effect on what follows.",
        )
    return Origin(weights, found.buffers, found.state)


def _check_followed(link: Link, of: str) -> None:
    changed = "reshaped" if link.reshaped else "merged" if link.merged else ""
    if link.kind in _FOLLOWED and not changed:
        return
    names = link.reshaped or link.merged
    raise ConfigurationError(
        f"shadow of '{of}': {len(names)} weights were {changed} since '{link.parent}' ended ({', '.join(names[:3])}), "
        "which cannot be done to the shadow's as well.",
        fix="leave this shadow out and use another method for this stage's effect.",
    )


def _of_parent(stage: StageReader) -> Origin:
    try:
        weights = stage.snapshot("start")
    except StageNotFoundError as error:
        raise ConfigurationError(
            f"shadow of '{stage.name}': the weights that it began with are not stored.", fix="record it again."
        ) from error
    trained = {name: value for name, value in weights.items() if name in set(stage.meta["trainable"])}
    state = {name: entries for states in stage.optimizer_state().values() for name, entries in states.items()}
    return Origin(trained, stage.buffers("start"), state)


def _of_shadow(parent: StageReader, of: str, replica: int) -> Origin:
    try:
        weights = parent.shadow(of, replica)
    except StageNotFoundError as error:
        raise ConfigurationError(
            f"shadow of '{of}': '{parent.name}' was recorded without a complete one (replica {replica}). {error.what}",
            fix=f"pass shadow=('{of}',) from the stage after '{of}' on.",
        ) from error
    state = parent.shadow_optimizer_state(of, replica).get(0, {})
    return Origin(weights, parent.shadow_buffers(of, replica), state)
