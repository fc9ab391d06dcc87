"""Shadows that were trained along with a stage: weights as they would be without an earlier one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from trainer_attrib.errors import LedgerFormatError, StageNotFoundError
from trainer_attrib.ledger.schema import shadow_name, shadow_state_name
from trainer_attrib.ledger.snapshots import load_tensors
from trainer_attrib.ledger.storage import Storage


class Shadowed:
    """The shadows of one stage."""

    name: str
    meta: dict[str, Any]
    _storage: Storage
    _folder: str

    def shadows(self) -> list[dict[str, Any]]:
        """Every shadow that was asked for: the stage that it is without (``of``), ``replica``, ``thin``, ``every``,
        ``steps`` taken, ``share`` of the examples used, ``status`` (``recording``, ``complete``, ``incomplete``) with
        ``reason``, and ``caveats``."""
        return self.meta.get("shadows", [])

    def shadow(self, of: str, replica: int = 0) -> dict[str, Tensor]:
        """Weights at the stage's end as they would be had an earlier stage not been executed: all that may differ from
        the model's, by name.

        Raises:
            StageNotFoundError: there is no such shadow, or it is not complete.
        """
        self._shadow(of, replica)
        return load_tensors(self._storage, f"{self._folder}/{shadow_name(of, replica)}")

    def shadow_buffers(self, of: str, replica: int = 0) -> dict[str, Tensor]:
        """The shadow's persistent buffers at the stage's end; empty where the model has none."""
        return self._of_shadow(of, replica, "buffers")

    def shadow_optimizer_state(self, of: str, replica: int = 0) -> dict[int, dict[str, dict[str, Tensor]]]:
        """The state of the shadow's optimizer at the stage's end, as :meth:`StageTensors.optimizer_state` has it."""
        return nested(self._of_shadow(of, replica, "optimizer"))

    def shadow_state(self, of: str, replica: int, step: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """A shadow after a step that a checkpoint was taken at: its entry, and everything of it by ``weights/...``,
        ``buffers/...``, ``optimizer/...``, ``last-factual/...`` and ``last-shadow/...`` (gradients of the part compared
        last), ``control/...`` (sums of its control variate); None where it was not stored."""
        for entry in self.meta.get("shadow_states", []):
            if (entry["of"], entry["replica"], entry["step"]) == (of, replica, step):
                return entry, load_tensors(self._storage, f"{self._folder}/{shadow_state_name(of, replica, step)}")
        return None

    def _shadow(self, of: str, replica: int) -> dict[str, Any]:
        for entry in self.shadows():
            if (entry["of"], entry["replica"]) == (of, replica) and entry["status"] == "complete":
                return entry
        found = [f"{e['of']} {e['replica']} ({e['status']}{e['reason'] and ': '}{e['reason']})" for e in self.shadows()]
        raise StageNotFoundError(
            f"Stage '{self.name}' has no complete shadow of '{of}', replica {replica}; it has {found or 'none'}.",
            fix=f"pass shadow=('{of}',) when the stage is recorded.",
        )

    def _of_shadow(self, of: str, replica: int, kind: str) -> dict[str, Tensor]:
        if kind not in self._shadow(of, replica):
            return {}
        return load_tensors(self._storage, f"{self._folder}/{shadow_name(of, replica, kind)}")

    def _shadow_files(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for entry in self.shadows():
            if entry["status"] != "complete":
                continue
            of, replica = entry["of"], entry["replica"]
            yield f"shadow of {of}", f"{self._folder}/{shadow_name(of, replica)}", entry
            for kind in ("buffers", "optimizer"):
                if kind in entry:
                    yield f"shadow of {of}", f"{self._folder}/{shadow_name(of, replica, kind)}", entry[kind]
        for entry in self.meta.get("shadow_states", []):
            name = shadow_state_name(entry["of"], entry["replica"], entry["step"])
            yield f"shadow of {entry['of']}", f"{self._folder}/{name}", entry


def nested(flat: dict[str, Tensor]) -> dict[int, dict[str, dict[str, Tensor]]]:
    """``NUMBER/PARAMETER/KEY`` -> number -> parameter -> key.

    Raises:
        LedgerFormatError: a name is another.
    """
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for path, value in flat.items():
        number, _, rest = path.partition("/")
        parameter, _, key = rest.rpartition("/")
        if not number.isdecimal() or not parameter:
            raise LedgerFormatError(
                f"An optimizer's state has an entry '{path}'.", cause="its file was made elsewhere."
            )
        found.setdefault(int(number), {}).setdefault(parameter, {})[key] = value
    return found
