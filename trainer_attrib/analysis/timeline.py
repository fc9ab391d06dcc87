"""Values of a model's weights at the boundaries of the stages that led to it, in the model's own terms.

A snapshot holds what its stage trained. What it froze is found in other stages' snapshots or in the model itself; what
was added later stands as it was added; an adapter that was merged since is part of the weights it was merged into.

Boundaries are counted: 2i is the start of stage i, 2i + 1 its end, 2n the model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.links import Link
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name

_NEVER_NEUTRAL = {"lora_magnitude_vector": "DoRA's magnitudes", "prompt_encoder": "virtual tokens"}


class Timeline:
    """The weights of ``model`` through the ``stages`` that led to it; ``link`` says how it continues the last one."""

    def __init__(self, model: nn.Module, stages: Sequence[StageReader], link: Link) -> None:
        self._stages, self._parameters = list(stages), parameters_by_name(model)
        self._links = [
            *(Link.of(stage.meta) for stage in stages),
            link,
        ]  # link i leads to stage i, the last to the model
        self._trained = [set(stage.meta["trainable"]) for stage in stages]
        self._read: dict[tuple[int, str], dict[str, Tensor]] = {}

    def at(self, stage: StageReader, when: str) -> dict[str, Tensor]:
        """Values at a stage's ``"start"`` or ``"end"`` of all weights that are others now.

        Raises:
            NotComparableError: weights whose values then are not known, or mean nothing with the adapters of now.
        """
        boundary = 2 * self._index(stage) + (when == "end")
        later = [name for name in self._parameters if self._has_changed(name, boundary)]
        found = {name: self._value(name, boundary) for name in later}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise NotComparableError(
                f"The {when} of stage '{stage.name}' is not known for {len(missing)} weights of this model "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}).",
                cause="an adapter that is more than a product of two matrices was merged into weights that no stage "
                "trained, so that their values before the merge were never stored.",
                fix="analyze the model with its adapter, as it was before the merge, or ask for later stages only.",
            )
        known = {name: value for name, value in found.items() if value is not None}
        self._check_neutral(known, boundary, stage, when)
        return known

    def _snapshot(self, stage: int, when: str) -> dict[str, Tensor]:
        """Each is read once."""
        if (stage, when) not in self._read:
            self._read[stage, when] = self._stages[stage].snapshot(when)
        return self._read[stage, when]

    def change(self, stage: StageReader) -> Displacement:
        """What a stage did to the model's weights: its end minus its start."""
        start, end = self.at(stage, "start"), self.at(stage, "end")
        pairs = ((n, end.get(n, self._parameters[n].data).cpu().double(), start[n].cpu().double()) for n in start)
        return {name: after - before for name, after, before in pairs if not after.equal(before)}

    def check_trainable(self, stages: Sequence[StageReader]) -> None:
        """Stages can be run again on a model that has all weights that they train.

        Raises:
            NotComparableError: it has not.
        """
        here = self._parameters.keys()
        for stage in stages:
            missing = sorted(self._trained[self._index(stage)] - here)
            if missing:
                raise NotComparableError(
                    f"Stage '{stage.name}' cannot be run again on this model: it trained {len(missing)} weights that "
                    f"the model does not have ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}).",
                    cause="its adapter was merged or its head replaced after the stage.",
                    fix="use method='subtract' or 'change', or analyze the model as it was at the end of that stage.",
                )

    def caveats(self) -> list[str]:
        """What is compared in another way than between stages that train the same weights."""
        here, said = self._parameters.keys(), []
        for stage, trained in zip(self._stages, self._trained, strict=True):
            gone = sorted(trained - here - stage.adapters)
            if gone:
                said.append(
                    f"stage '{stage.name}' also trained weights that the model no longer has: {', '.join(gone)}"
                )
        for stage, link in zip(self._stages[1:], self._links[1:], strict=False):
            if stage.meta.get("weights_replaced"):
                said.append(
                    f"stage '{stage.name}' ended with other weights than its last step left (averages, an earlier "
                    "checkpoint): first_order, propagate and shadow do not follow that, replay where its program does"
                )
            new = sorted({*link.added, *link.reshaped} & here - stage.adapters)
            if new:
                said.append(
                    f"before stage '{stage.name}', {', '.join(new)} are taken as they were when they were added"
                )
        return said

    # ---- one weight -----------------------------------------------------------------------------------------------

    def _index(self, stage: StageReader) -> int:
        return [s.name for s in self._stages].index(stage.name)

    def _born(self, name: str, before: int) -> int:
        """The boundary from which a weight that exists at ``before`` is there."""
        links = [i for i in range(1, before // 2 + 1) if name in {*self._links[i].added, *self._links[i].reshaped}]
        return 2 * max(links, default=0)

    def _changes(self, name: str, boundary: int) -> bool:
        """Whether something happens to a weight between a boundary and the next one."""
        if boundary % 2 == 0:
            return name in self._trained[boundary // 2]
        link = self._links[boundary // 2 + 1]
        return any(name in names for names in (link.added, link.removed, link.reshaped, link.merged))

    def _has_changed(self, name: str, boundary: int) -> bool:
        return any(self._changes(name, b) for b in range(boundary, 2 * len(self._stages)))

    def _stored(self, name: str, boundary: int) -> Tensor | None:
        """A weight's own value at a boundary: from the nearest snapshot that nothing separates from it."""
        end = 2 * len(self._stages)
        for step in (-1, 1):
            at = boundary
            while True:
                if at < end and name in self._trained[at // 2]:
                    return self._snapshot(at // 2, "end" if at % 2 else "start")[name]
                if at == end:
                    return self._parameters[name].data.cpu()
                if (step < 0 and at == 0) or self._changes(name, at if step > 0 else at - 1):
                    break
                at += step
        return None

    def _value(self, name: str, boundary: int) -> Tensor | None:
        """A weight's value in terms of the model: with what adapters merged later added to it then."""
        boundary = max(boundary, self._born(name, 2 * len(self._stages)))
        merge = next((i for i in range(boundary // 2 + 1, len(self._links)) if name in self._links[i].merged), None)
        if merge is None:
            return self._stored(name, boundary)
        if boundary == 2 * merge - 1:
            return self._value(name, 2 * merge)
        stored, update = self._stored(name, boundary), self._update(name, merge, boundary)
        if stored is None and not any(self._changes(name, b) for b in range(boundary, 2 * merge - 1)):
            after, whole = self._value(name, 2 * merge), self._update(name, merge, 2 * merge - 1)
            stored = None if after is None or whole is None else after.double() - whole
        if stored is None or update is None:
            return None
        return stored if not update.any() else stored.double() + update

    def _update(self, name: str, merge: int, boundary: int) -> Tensor | None:
        """What the adapters that are merged into a weight by a link added to it at an earlier boundary; None if that is
        not known."""
        stage = self._stages[merge - 1]
        owned = [a for a in stage.adapters if a.startswith(f"{name.removesuffix('weight')}")]
        updates = [u for u in stage.low_rank_updates if u["weight"] == name]
        if not updates:
            known = bool(owned) and all(boundary <= self._born(a, 2 * merge - 1) for a in owned)
            return torch.zeros(()).double() if known else None
        total = torch.zeros(()).double()
        for update in updates:
            if boundary < self._born(update["A"], 2 * merge - 1):
                continue
            a, b = self._stored(update["A"], boundary), self._stored(update["B"], boundary)
            if a is None or b is None:
                return None
            product = update["scaling"] * (b.double() @ a.double())
            total = total + (product.T if update["transposed"] else product)
        return total

    def _check_neutral(self, values: dict[str, Tensor], boundary: int, stage: StageReader, when: str) -> None:
        """Adapters stand as they were added: that is no change to the model, except for those named here, once the
        weights below them are others than when they were added."""
        end = 2 * len(self._stages)
        for name in self._parameters:
            kind = next((said for part, said in _NEVER_NEUTRAL.items() if part in name.split(".")), None)
            born = self._born(name, end)
            layer = name.partition(".lora_magnitude_vector")[0] + "."
            moved = [n for n in values if n.startswith(layer) and self._changed_between(n, boundary, born)]
            if kind and boundary < born and (moved or "prompt_encoder" in name.split(".")):
                raise NotComparableError(
                    f"The {when} of stage '{stage.name}' cannot be measured on this model: it has {kind} that "
                    f"came later ({name}).",
                    cause="with other weights below them they are not what the model was without them.",
                    fix="analyze the merged model (`model.merge_and_unload()`), or the model at the end of that stage.",
                )

    def _changed_between(self, name: str, first: int, last: int) -> bool:
        return any(self._changes(name, boundary) for boundary in range(first, last))
