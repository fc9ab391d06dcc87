"""Which stage the weights at hand come from, weight by weight, where the whole set of weights has changed since.

The hash of all weights links a stage to the one that ended with the same weights. Adapters come and go and heads are
replaced between stages, so the end of each stage also has a fingerprint per weight, and samples of what merging
its adapters would make of the weights below them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.ledger.snapshots import combine, fingerprint_tensors
from trainer_attrib.ledger.storage import Storage

SAMPLES = 64  # entries of each merged weight that are compared

Described = dict[str, dict[str, Any]]
"""Weight -> its ``shape`` and ``hash``, JSON-ready."""


@dataclass(frozen=True)
class Link:
    """How weights continue a stage.

    Args:
        parent: the stage, or None.
        kind: ``"none"``, ``"same"``, ``"adapter added"``, ``"merged"`` or ``"weights added or replaced"``.
        added: weights that the parent's model did not have.
        removed: weights of the parent's model that are gone.
        reshaped: weights whose shape changed; their values are not those of the parent.
        merged: weights that are the parent's with its adapter merged in.
        frozen: weights that the parent trained and that are there, but do not train now.
        reason: why a stage that shares weights is not the parent, if there is no parent.
    """

    parent: str | None = None
    kind: str = "none"
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @staticmethod
    def of(meta: dict[str, Any]) -> Link:
        """As ``stage.json`` stores it; a stage recorded without one continues its parent as that ended."""
        if "link" not in meta:
            return Link(meta["parent"], "same" if meta["parent"] else "none")
        known = {field.name: meta["link"].get(field.name) for field in fields(Link)}
        stored: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in known.items() if v is not None
        }
        return Link(**stored)

    @property
    def changes(self) -> str:
        """What is different from the parent's end, as a person reads it; empty where nothing is."""
        what = "adapter weights" if self.kind == "adapter added" else "weights"
        counts = {"weights merged": self.merged, f"{what} added": self.added, "weights removed": self.removed,
                  "weights of another shape": self.reshaped, "trained weights now frozen": self.frozen}  # fmt: skip
        return ", ".join(f"{len(names)} {said}" for said, names in counts.items() if names)

    def __str__(self) -> str:
        if self.parent is None:
            return f"no parent: {self.reason or 'starts from weights not recorded here'}"
        return f"continues '{self.parent}'" + (f" ({self.changes})" if self.changes else "")


def describe_weights(weights: dict[str, Tensor]) -> Described:
    """Shape and hash of each weight, JSON-ready."""
    hashes = fingerprint_tensors(weights)
    return {name: {"shape": list(weights[name].shape), "hash": hashes[name]} for name in hashes}


def describe_merged(weights: Iterable[tuple[str, Tensor]]) -> Described:
    """Hash, precision and sampled entries of each weight with its adapter merged in, JSON-ready."""
    return {
        name: {**describe_weights({name: w})[name], "dtype": _dtype(w), "values": sample(w).double().tolist()}
        for name, w in weights
    }


def combined(described: Described) -> str:
    """The hash of all weights."""
    return combine({name: entry["hash"] for name, entry in described.items()})


def find_link(
    stages: Sequence[StageReader],
    described: Described,
    weights: Mapping[str, Tensor],
    adapters: Iterable[str] = (),
) -> Link:
    """The stage that these weights come from.

    That is the newest which ended with exactly these, else the one that shares most weights among those whose training
    is in them: all shared weights are the stage's, or the stage's with its adapter merged in, and some of them it
    trained. Weights that only that stage's untouched base shares say nothing of the stage.

    Args:
        stages: all of the ledger.
        described: the weights' shapes and hashes (:func:`describe_weights`).
        weights: the weights, or a :func:`sample` of each.
        adapters: the names of those that belong to adapters.
    """
    ended = [stage for stage in stages if stage.meta["weights"].get("end")]
    whole = combined(described)
    same = [stage for stage in ended if stage.meta["weights"]["end"] == whole]
    if same:
        return Link(max(same, key=lambda stage: stage.meta["began"]).name, "same")
    compared = [_Comparison(stage, described, weights, set(adapters)) for stage in ended if stage.weights_at("end")]
    parents = [c for c in compared if not c.other and c.inherited]
    if parents:
        return max(parents, key=lambda c: (len(c.equal) + len(c.merged), c.stage.meta["began"])).link()
    near = [c for c in compared if c.other and c.close]
    best = max(near, key=lambda c: (len(c.equal) + len(c.merged), c.stage.meta["began"]), default=None)
    return Link(reason=best.reason if best else "")


def inherited(storage: Storage, link: Link, trainable: set[str]) -> dict[str, Any]:
    """What a stage's start may point to instead of storing it again: its parent's last snapshot, as ``stage.json``
    lists it, and whether that has ``all_weights`` that train. Empty without a parent."""
    if link.parent is None:
        return {}
    parent = StageReader(storage, link.parent)
    kept = set(parent.meta["trainable"]) - {*link.added, *link.reshaped, *link.merged}
    return parent.snapshot_entry("end") | {"all_weights": trainable <= kept}


class _Comparison:
    """Weights against the end of one stage."""

    def __init__(self, stage: StageReader, now: Described, weights: Mapping[str, Tensor], adapters: set[str]) -> None:
        then, self._could_merge = stage.weights_at("end"), stage.weights_at("merged")
        self.stage, self._adapters = stage, adapters
        both = then.keys() & now.keys()
        shared = {name for name in both if then[name]["shape"] == now[name]["shape"]}
        self.equal = {name for name in shared if then[name]["hash"] == now[name]["hash"]}
        self.merged = {n for n in shared - self.equal if _is_merged(weights[n], now[n], self._could_merge.get(n))}
        # An adapter made after the old one was merged may have its name.
        anew = adapters & stage.adapters & both - self.equal if self.merged else set()
        self.other = shared - self.equal - self.merged - anew
        self.added, self.removed = now.keys() - both | anew, then.keys() - both | anew
        self.reshaped = both - shared - anew
        began = stage.weights_at("start")
        self._moved = {n for n in stage.meta["trainable"] if n in then and began.get(n) != then[n]}

    @property
    def inherited(self) -> bool:
        """Whether something that the stage trained is in the weights."""
        return bool(self.merged or self.equal & self._moved)

    @property
    def close(self) -> bool:
        """Whether a person would have expected this stage to be the parent."""
        base = self.other - self._adapters
        return bool(self.equal) and (self.inherited or bool(base and base <= self._could_merge.keys()))

    @property
    def reason(self) -> str:
        """Why the stage is not the parent."""
        shared = len(self.equal) + len(self.merged) + len(self.other)
        theirs = f"those at the end of '{self.stage.name}'"
        found = f"neither {theirs} nor what merging its adapter gives" if self._could_merge else f"not {theirs}"
        names = f"{', '.join(sorted(self.other)[:3])}{', ...' if len(self.other) > 3 else ''}"
        return f"{len(self.other)} of {shared} weights are {found} ({names}); something not recorded changed them"

    def link(self) -> Link:
        """The weights as a continuation of the stage."""
        if self.merged:
            kind = "merged"
        elif self.added <= self._adapters and not self.removed and not self.reshaped:
            kind = "adapter added"
        else:
            kind = "weights added or replaced"
        added, removed, reshaped, merged = (
            tuple(sorted(names)) for names in (self.added, self.removed, self.reshaped, self.merged)
        )
        return Link(self.stage.name, kind, added, removed, reshaped, merged)


def _is_merged(weight: Tensor, now: dict[str, Any], merged: dict[str, Any] | None) -> bool:
    """Whether a weight is what merging gives: bit for bit, or up to rounding in the coarser of the two precisions."""
    if merged is None or merged["shape"] != now["shape"]:
        return False
    if merged["hash"] == now["hash"]:
        return True
    expected = torch.tensor(merged["values"], dtype=torch.float64)
    precisions = [p for p in (getattr(torch, merged["dtype"], None), weight.dtype) if isinstance(p, torch.dtype)]
    if len(precisions) < 2 or not all(p.is_floating_point for p in precisions):
        return False
    rounding = max(torch.finfo(p).eps for p in precisions)
    allowed = 2 * rounding * (expected.abs() + expected.square().mean().sqrt())
    return bool(((sample(weight).double() - expected).abs() <= allowed).all())


def sample(weight: Tensor) -> Tensor:
    """Evenly spaced entries, [at most 64], on the CPU; the sample of a sample is itself."""
    flat = weight.detach().reshape(-1)
    return flat[sampled(flat.numel()).to(flat.device)].cpu()


def sampled(entries: int) -> Tensor:
    """Which entries of a flat weight its sample holds."""
    return torch.linspace(0, entries - 1, min(SAMPLES, entries), dtype=torch.float64).round().long()


def _dtype(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
